"""Train from config files: `python -m fasthmr.fit -c conf/fasthmr.yaml [-c more.yaml ...] [--key value ...]`.

A file has one of two shapes.

One stage, in LightningCLI's shape (`model`, `data`, `trainer`, plus `run_dir`, `seed_everything`, `ckpt_path`):
every key can be overridden by a later file or on the command line (`--trainer.max_epochs 2`), lists with `+` are
appended to (`--trainer.callbacks+ ...`), `${run_dir}` and other keys can be interpolated.

A recipe, which names stages in order:

    name: fasthmr                       # stages run in runs/<name>/<stage>
    stages:
      encoder:
        config: encoder_tiny.yaml       # a one-stage file, relative to the recipe
        trainer: {max_epochs: 20}       # and any keys of it to override

Keys of a stage are overridden with its name in front: `--encoder.trainer.max_epochs 2`. `--stage encoder` runs one.
A finished stage is skipped, an interrupted one resumes where it was.

`--ckpt_path last` goes on from the newest checkpoint of `run_dir`; a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from fasthmr.cli import FitParser, UsageError, flatten
from fasthmr.files import write_text
from fasthmr.lit.checkpoint_io import AtomicCheckpointIO

DONE_FILE = "done.json"  # written when a stage has finished: its metrics and the config that gave them


@dataclass(frozen=True)
class StageResult:
    """What a stage ended with: where it wrote, its last validation metrics and its best checkpoint."""

    run_dir: Path
    metrics: dict[str, float]
    checkpoint: str
    resumed: bool = False
    skipped: bool = False


class SaveResolvedConfig(SaveConfigCallback):
    """Writes the resolved config to run_dir/config.yaml and into TensorBoard's text page."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            text = self.parser.dump(self.config, skip_none=False)
            trainer.logger.experiment.add_text("config", f"```yaml\n{text}\n```")


class FitCLI(LightningCLI):
    """LightningCLI without subcommands, with a few top-level keys of our own."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=list(args),
            parser_class=FitParser,
            # "omegaconf+" resolves ${...} after all files and arguments are merged, so that overrides reach them.
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "python -m fasthmr.fit", "description": __doc__},
            seed_everything_default=0,
            # Our samplers split the data over ranks themselves, without padding or duplicates.
            trainer_defaults={"use_distributed_sampler": False},
            save_config_callback=SaveResolvedConfig,
            save_config_kwargs={"overwrite": True},
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        plugins = config.get("plugins") or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        return super()._instantiate_trainer(config, callbacks)

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/run", help="where everything of this run is written")
        # Keys that the files in conf/ pass on with ${...}:
        parser.add_argument("--data_dir", type=str, default="data/synth", help="where shards are, or are made")
        parser.add_argument("--motion", type=str, default="procedural", help="who moves how in made training clips: "
                            "procedural, or an AMASS-format folder or pack")  # fmt: skip
        parser.add_argument("--motion_val", type=str, default="procedural", help="the same for validation clips")
        parser.add_argument(
            "--backgrounds", type=str, default="procedural", help="procedural, or a folder of photographs"
        )
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to go on from, or `last`")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("run_dir", "trainer.default_root_dir")


# ---- one stage -----------------------------------------------------------------------------------


def run_stage(args: Sequence[str], *, resume_if_possible: bool = False) -> StageResult:
    """Run one config to its end.

    Args:
        args: command-line arguments, `-c FILE` among them.
        resume_if_possible: go on from run_dir's last checkpoint, and skip a finished run, instead of refusing to
            write into a folder that already holds one.

    Raises:
        UsageError: `run_dir` holds another run, or there is nothing to resume.
    """
    cli = FitCLI(args)
    run_dir = Path(cli.config.run_dir)
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    last = run_dir / "checkpoints" / "last.ckpt"
    ckpt_path = cli.config.ckpt_path
    if resume_if_possible:
        finished = _finished(run_dir, config)
        if finished is not None:
            return finished
        if ckpt_path is None and last.exists():
            ckpt_path = "last"
    if ckpt_path == "last":
        if not last.exists():
            raise UsageError(f"--ckpt_path last: there is no checkpoint at {last}; start without --ckpt_path")
        ckpt_path = str(last)
    elif ckpt_path is not None and not Path(ckpt_path).is_file():
        raise UsageError(f"--ckpt_path: there is no file {ckpt_path}")
    elif ckpt_path is None and last.exists():
        raise UsageError(
            f"{run_dir} already holds a run ({last}): add --ckpt_path last to go on with it, "
            "or choose another folder with --run_dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to run_dir {run_dir}: {error}; choose another with --run_dir") from error
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    result = StageResult(
        run_dir=run_dir,
        metrics={k: float(v) for k, v in sorted(cli.trainer.callback_metrics.items()) if k.startswith("val/")},
        checkpoint=_best_checkpoint(cli.trainer),
        resumed=ckpt_path is not None,
    )
    if cli.trainer.is_global_zero:
        done = {"config": config, "metrics": result.metrics, "checkpoint": result.checkpoint}
        write_text(run_dir / DONE_FILE, json.dumps(done, indent=1, default=str))
    return result


def _best_checkpoint(trainer: L.Trainer) -> str:
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    best = [c.best_model_path for c in saved if c.monitor is not None and c.best_model_path]
    return (best + [c.last_model_path for c in saved if c.last_model_path] + [""])[0]


def _finished(run_dir: Path, config: dict[str, Any]) -> StageResult | None:
    """The result of an earlier run of the same config in `run_dir`; None when it has not finished."""
    path = run_dir / DONE_FILE
    if not path.exists():
        return None
    done = json.loads(path.read_text())
    before, now = flatten(done["config"]), flatten(json.loads(json.dumps(config, default=str)))
    changed = [k for k in sorted({*before, *now}) if k != "ckpt_path" and before.get(k) != now.get(k)]
    if changed:
        shown = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in changed[:5])
        raise UsageError(
            f"{run_dir} holds a finished run of another config ({shown}): give the new one another `--name`, "
            f"or remove {run_dir}"
        )
    return StageResult(run_dir, done["metrics"], done["checkpoint"], skipped=True)


# ---- a recipe ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Stages in order; each is the list of arguments that its one-stage run gets."""

    name: str
    stages: dict[str, list[str]]


def load_recipe(files: Sequence[str], rest: Sequence[str]) -> Recipe | None:
    """Read a recipe and its overrides; None if no file names stages (then it is a one-stage config).

    Raises:
        UsageError: a file is missing or is no YAML, a stage has no config, an argument belongs to no stage.
    """
    contents: dict[str, Any] = {"stages": {}}
    folder = Path()
    for file in files:
        try:
            loaded = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"cannot read config {file}: {error}") from error
        if not isinstance(loaded, dict):
            raise UsageError(f"config {file} must be a mapping of keys, got {type(loaded).__name__}")
        if "stages" in loaded:
            folder = Path(file).parent
        if unknown := set(loaded) - {"name", "stages"}:
            if contents["stages"] or "stages" in loaded:
                raise UsageError(f"unknown key {sorted(unknown)[0]!r} in recipe {file}; it may have: name, stages")
            return None
        for stage, keys in loaded.get("stages", {}).items():
            contents["stages"].setdefault(stage, {}).update(keys)
        contents["name"] = loaded.get("name", contents.get("name", Path(file).stem))
    if not contents["stages"]:
        return None

    parser = argparse.ArgumentParser(prog="python -m fasthmr.fit", usage="%(prog)s -c RECIPE [--STAGE.KEY VALUE ...]")
    parser.add_argument("--name", default=contents["name"], help="stages run in runs/NAME/STAGE")
    parser.add_argument("--stage", choices=list(contents["stages"]), help="run only this stage")
    parser.add_argument("--print_config", action="store_true", help="print the resolved config of each stage")
    options, overrides = parser.parse_known_args(rest)
    stages = {}
    for stage, keys in contents["stages"].items():
        if "config" not in keys:
            raise UsageError(f"stage {stage!r} needs the key `config`, the file that it runs")
        own = [f"--{k}={_as_argument(v)}" for k, v in flatten({k: v for k, v in keys.items() if k != "config"}).items()]
        stages[stage] = ["-c", str(folder / keys["config"]), f"--run_dir=runs/{options.name}/{stage}", *own]
    current: list[str] | None = None
    for argument in overrides:
        if argument.startswith("--"):
            stage, _, key = argument[2:].partition(".")
            if stage not in stages or not key:
                raise UsageError(
                    f"unknown option {argument}; a recipe's keys start with a stage: --{next(iter(stages))}.KEY"
                )
            current = stages[stage]
            current.append(f"--{key}")
        elif current is None:
            raise UsageError(f"unexpected argument {argument!r}")
        else:
            current.append(argument)
    if options.print_config:
        for arguments in stages.values():
            arguments.append("--print_config")
    if options.stage is not None:
        stages = {options.stage: stages[options.stage]}
    return Recipe(options.name, stages)


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- the command ---------------------------------------------------------------------------------


def fit(argv: Sequence[str]) -> dict[str, StageResult]:
    """Run what the command line says; results by stage name ("fit" where the config has only one)."""
    files_parser = argparse.ArgumentParser(add_help=False)
    files_parser.add_argument("-c", "--config", action="append", default=[])
    files, rest = files_parser.parse_known_args(argv)
    recipe = load_recipe(files.config, rest)
    if recipe is None:
        return {"fit": run_stage(argv)}
    results = {}
    for number, (stage, arguments) in enumerate(recipe.stages.items(), 1):
        _say(f"stage {number} of {len(recipe.stages)}: {stage}")
        results[stage] = run_stage(arguments, resume_if_possible=True)
    return results


@rank_zero_only
def _say(message: str) -> None:
    print(f"[fit] {message}", flush=True)


@rank_zero_only
def print_results(results: dict[str, StageResult]) -> None:
    """Print the metrics of every stage and where everything was written."""
    console = Console()
    for stage, result in results.items():
        state = "finished earlier" if result.skipped else "finished"
        table = Table(title=f"{stage}: {state}", title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in result.metrics.items():
            table.add_row(name, f"{value:.2f}")
        console.print(table)
        print(f"run folder   {result.run_dir}")
        print(f"checkpoint   {result.checkpoint}")
        if result.skipped:
            print(f"             (remove {result.run_dir} or use another --name to train again)")
    print(f"TensorBoard  tensorboard --logdir {os.path.commonpath([r.run_dir for r in results.values()])}")


def main() -> int:
    """Entry point; user errors end in one line and exit code 2 (FASTHMR_TRACEBACK=1 shows where they arose)."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s")
    # Our own way of calling it; and the moving average is in evaluation mode on purpose.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
    # Lightning advertises other products at start-up.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    try:
        print_results(fit(sys.argv[1:]))
    except KeyboardInterrupt:
        print("[fit] interrupted; go on with --ckpt_path last", file=sys.stderr)
        return 130
    except (UsageError, ValueError, OSError) as error:
        if os.environ.get("FASTHMR_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
