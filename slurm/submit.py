"""Submit a recipe as one SLURM job a stage, each of which waits for the one before it; from the repository:

    python slurm/submit.py -c conf/pretrain_tiny.yaml --sbatch="--nodes=2 --gpus-per-node=4 --ntasks-per-node=4"

Arguments are those of `python -m fasthmr.fit`. `--sbatch` has the options of sbatch for all stages, `--sbatch.STAGE`
more of them for one. If a stage fails, those after it are cancelled; submit again, and finished stages are skipped.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from fasthmr.cli import UsageError
from fasthmr.recipe import load_recipe

SCRIPT = Path(__file__).with_name("fit.sbatch")


def submit(arguments: list[str]) -> list[str]:
    """Submit what the command line says; the jobs' numbers, in the order of the stages.

    Raises:
        UsageError: there is no recipe, or one of its keys is wrong.
        subprocess.CalledProcessError: sbatch refused a job.
    """
    options = {a.partition("=")[0]: a.partition("=")[2] for a in arguments if a.startswith("--sbatch")}
    arguments = [a for a in arguments if not a.startswith("--sbatch")]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    files, rest = parser.parse_known_args(arguments)
    recipe = load_recipe(files.config, rest)
    if recipe is None:
        raise UsageError("this is for recipes, which have `stages`; submit a config with sbatch slurm/fit.sbatch")
    if unknown := set(options) - {"--sbatch", *(f"--sbatch.{stage}" for stage in recipe.stages)}:
        raise UsageError(f"{', '.join(sorted(unknown))}: the recipe's stages are {', '.join(recipe.stages)}")
    jobs: list[str] = []
    for stage in recipe.to_run:
        command = ["sbatch", "--parsable", f"--job-name={recipe.name}-{stage.name}"]
        for key in ("--sbatch", f"--sbatch.{stage.name}"):
            command += shlex.split(options.get(key, ""))
        if jobs:
            command += [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"]
        command += [str(SCRIPT), *arguments]
        if recipe.only is None:
            command += ["--stage", stage.name]
        jobs.append(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
        print(f"job {jobs[-1]}: {stage.name}, in {stage.run_dir}")
    return jobs


if __name__ == "__main__":
    try:
        submit(sys.argv[1:])
    except UsageError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError:
        sys.exit("error: sbatch refused the job; the ones before are submitted")
