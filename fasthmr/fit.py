"""Train from config files: `python -m fasthmr.fit -c conf/fasthmr.yaml [-c more.yaml ...] [--key value ...]`.

A file has one of two shapes.

One stage, in LightningCLI's shape (`model`, `data`, `trainer`, plus `run_dir`, `seed_everything`, `ckpt_path`):
every key can be overridden by a later file or on the command line (`--trainer.max_epochs 2`), lists with `+` are
appended to (`--trainer.callbacks+ ...`), `${run_dir}` and other keys can be interpolated.
`--ckpt_path last` goes on from the newest checkpoint of `run_dir`; a run that was killed goes on as if it had not been.
`--ckpt_path auto` does so if there is one, and starts otherwise, as does every job that SLURM starts again. Keys that
change what is trained must be as they were; `fasthmr/resume.py` lists those that may differ.

Ctrl-C, SIGUSR1 and SIGTERM end a run after the step it is in, with a checkpoint. Exit codes: 0 done, 2 a mistake that
is named, 75 stopped by a signal (the same command goes on), 130 stopped by Ctrl-C. docs/clusters.md has the rest.

A recipe, which names stages in order, each a one-stage file with some keys overridden: finished stages are skipped, an
interrupted one goes on. `python -m fasthmr.fit -c RECIPE --help` explains it and lists the recipe's stages.
"""

from __future__ import annotations

from fasthmr import stopping

if __name__ == "__main__":
    stopping.listen()  # before the imports below, which take seconds in which a signal would end the process

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import distributed

from callbacks.batch_size import SayBatchSize
from callbacks.curves import Curves
from callbacks.heartbeat import Heartbeat
from callbacks.interrupt import SaveOnInterrupt
from callbacks.progress import RunProgress
from callbacks.step_numbers import StepNumbers
from callbacks.summary import Summary
from callbacks.validated import LastValidation
from fasthmr.checkpoint_files import CheckpointError, read_checkpoint
from fasthmr.cli import FitParser, HelpFormatter, UsageError, one_line
from fasthmr.evaluation_stage import EvaluationStage, finished_table
from fasthmr.files import write_text
from fasthmr.lit.checkpoint_io import AtomicCheckpointIO
from fasthmr.lit.sharding import require_supported
from fasthmr.losses import NonFiniteLossError
from fasthmr.precision import has_bf16
from fasthmr.processes import Process, environment, require_gpus
from fasthmr.ranks import from_first_rank
from fasthmr.recipe import (
    Commands,
    StageResult,
    load_recipe,
    resolved_configs,
    run_recipe,
    save_result,
)
from fasthmr.resume import AUTO, CONFIG_FILE, LAST_CHECKPOINT, checkpoint_to_resume, require_resumable
from fasthmr.run_lock import locked

log = logging.getLogger("fit")

#: seconds in which a file that one machine has written must be seen by the others
_SEEN_S = 120.0


class SaveResolvedConfig(SaveConfigCallback):
    """Writes the resolved config to run_dir/config.yaml and into TensorBoard's text page.

    Only once training starts: a checkpoint that cannot be gone on from, or data that cannot be read, leaves both alone.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        text = self.parser.dump(self.config, skip_none=False)
        run_dir = Path(self.config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / CONFIG_FILE, text)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", f"```yaml\n{text}\n```", trainer.global_step)


class GoOnFrom(L.Callback):
    """Has all processes go on from the checkpoint that the first one has chosen, once they can talk to each other.

    If each chose for itself, one that does not see a new file yet would go on from another step.

    Args:
        checkpoint: the choice, None to start anew; only the first process' counts.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        chosen = None
        if self.checkpoint is not None:
            chosen = self.checkpoint, read_checkpoint(self.checkpoint)["global_step"]
        chosen = from_first_rank(chosen)
        if chosen is not None:
            _wait_until_seen(*chosen)
            # What Lightning does a little later with `fit(ckpt_path=...)`, which each process would have to know.
            trainer._checkpoint_connector.resume_start(chosen[0])


class FitCLI(LightningCLI):
    """One stage of training: LightningCLI without subcommands, with a few top-level keys of our own.

    It parses its arguments when it is made, and makes data, model and trainer when it runs.
    """

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
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "prog": "python -m fasthmr.fit",
                "description": __doc__,
                "formatter_class": HelpFormatter,
            },
            seed_everything_default=0,
            trainer_defaults=_trainer_defaults(),
            save_config_callback=SaveResolvedConfig,
            # The modules bring their own optimiser: --optimizer would silently replace it.
            auto_configure_optimizers=False,
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config["plugins"] = [*plugins, AtomicCheckpointIO(), *environment(self.alone)]
        self._validated = LastValidation()
        stop = SaveOnInterrupt(Path(self.config.run_dir) / LAST_CHECKPOINT)
        ours: list[L.Callback] = [self._validated, SayBatchSize(), Summary(), stop]
        given = config["callbacks"] or []
        given = [StepNumbers(), Curves(Path(self.config.run_dir)), *(given if isinstance(given, list) else [given])]
        config["callbacks"] = given
        if not any(isinstance(callback, Heartbeat) for callback in given):
            ours.insert(0, Heartbeat())
        # The bar comes first: a run that goes on may begin with a validation.
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in given):
            ours.insert(0, RunProgress())
        return super()._instantiate_trainer(config, [*callbacks, *ours])

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
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to go on from, `last`, or "
                            "`auto`: the last one if there is one")  # fmt: skip
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("run_dir", "trainer.default_root_dir")

    def instantiate_classes(self) -> None:
        """Nothing yet: arguments are checked, and finished stages skipped, without making a model."""

    @property
    def resolved(self) -> str:
        """The config as YAML, all files, overrides and interpolations applied."""
        text: str = self.parser.dump(self.config, skip_none=False)
        return text

    def completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """As the parser's."""
        parser: Any = self.parser  # a FitParser
        completed: dict[str, Any] = parser.completed(config)
        return completed

    @property
    def alone(self) -> bool:
        """Whether the config asks for one process."""
        devices = self.config.trainer.devices
        one = len(devices) == 1 if isinstance(devices, list) else str(devices) == "1"
        return one and self.config.trainer.num_nodes == 1

    def run(self, *, resume: bool) -> StageResult:
        """Train to the end.

        Args:
            resume: go on from run_dir's last checkpoint if there is one, instead of refusing to write into a folder
                that already holds a run.

        Raises:
            UsageError: `run_dir` holds another run or cannot be written, or there is nothing to resume.
        """
        run_dir = Path(self.config.run_dir)
        _require_writable(run_dir)
        require_gpus(self.config.trainer.accelerator, self.config.trainer.devices)
        if Process.this().rank > 0:
            return self._run(run_dir, None)  # the first process says from where
        with locked(run_dir):
            ckpt_path = self.config.ckpt_path
            checkpoint = checkpoint_to_resume(run_dir, AUTO if resume and ckpt_path is None else ckpt_path)
            if checkpoint is not None:
                require_resumable(checkpoint, yaml.safe_load(self.resolved), self.completed)
                _remove_unfinished(run_dir / LAST_CHECKPOINT)
            return self._run(run_dir, checkpoint)

    def _run(self, run_dir: Path, checkpoint: Path | None) -> StageResult:
        super().instantiate_classes()
        require_supported(self.trainer.strategy)
        device = self.trainer.strategy.root_device
        if self.trainer.is_global_zero and "bf16" in str(self.trainer.precision) and not has_bf16(device):
            log.warning(
                "this %s has no instructions for bfloat16, so float32 is faster: --trainer.precision 32-true",
                "GPU" if device.type == "cuda" else "CPU",
            )
        self.trainer.callbacks.append(GoOnFrom(checkpoint))  # type: ignore[attr-defined]
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule)
        except SystemExit as left:
            if self.trainer.interrupted:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from left
            raise
        path = _best_checkpoint(self.trainer, run_dir)
        metrics, validated_step = _metrics_of(path, self._validated)
        protocol = getattr(getattr(self.model, "errors", None), "protocol", None)
        return StageResult(
            run_dir=run_dir,
            metrics=metrics,
            checkpoint=path,
            protocol=protocol.describe() if protocol is not None else "",
            resumed=checkpoint is not None,
            validated_step=validated_step,
        )


#: kinds of stages that a recipe can name; a stage without `command` is a "fit"
COMMANDS: Commands = {"fit": FitCLI, "evaluate": EvaluationStage}


def _trainer_defaults() -> dict[str, Any]:
    """Defaults of the trainer: as many processes as there are, in the precision that is faster here."""
    process = Process.this()
    # Our samplers split the data over ranks themselves, without padding or duplicates.
    defaults: dict[str, Any] = {"use_distributed_sampler": False}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults["precision"] = "bf16-mixed" if has_bf16(device) else "32-true"
    if process.size > 1:
        defaults |= {"devices": process.per_node, "num_nodes": process.nodes}
    return defaults


def _require_writable(run_dir: Path) -> None:
    """Write a little where `run_dir` is, or will be, and leave nothing: before minutes go into what comes first."""
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"?")
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write to run_dir {run_dir} ({reason}); choose another with --run_dir") from error


def _remove_unfinished(checkpoint: Path) -> None:
    """Remove what a killed process left of checkpoints that it was writing (see `fasthmr.files.written_whole`)."""
    for file in checkpoint.parent.glob(".*.ckpt.*.tmp"):
        file.unlink(missing_ok=True)


def _wait_until_seen(checkpoint: Path, step: int) -> None:
    """Wait until a checkpoint is, for this process as well, the one of `step`; network folders may take a while.

    Raises:
        UsageError: it is not in time.
    """
    began = time.monotonic()
    while True:
        try:
            seen = f"one of step {read_checkpoint(checkpoint).get('global_step')}"
        except (FileNotFoundError, CheckpointError) as error:
            seen = str(error)
        if seen == f"one of step {step}":
            return
        if time.monotonic() - began > _SEEN_S:
            raise UsageError(
                f"the first process goes on from {checkpoint}, of step {step}, but process {Process.this().rank} sees "
                f"something else there ({seen}): use a run_dir that all machines share"
            )
        time.sleep(1)


def _metrics_of(checkpoint: str, last: LastValidation) -> tuple[dict[str, float], int | None]:
    """The metrics of a checkpoint, and None; if it was not validated, those of the run's last validation and its step.

    A checkpoint that was saved between validations holds the metrics of an earlier step, maybe of a deeper model.
    """
    if not Path(checkpoint).is_file():
        return last.metrics, last.step
    content = read_checkpoint(Path(checkpoint))
    stored = content.get("callbacks", {}).get(LastValidation.STATE_KEY, {})
    if stored.get("metrics") and stored["step"] == content["global_step"]:
        return dict(stored["metrics"]), None
    return last.metrics, None if last.step == content["global_step"] else last.step


def _best_checkpoint(trainer: L.Trainer, run_dir: Path) -> str:
    """Path of the best checkpoint, else of the last, else ""; as relative as `run_dir`, so that folders can move."""
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    best = [c.best_model_path for c in saved if c.monitor is not None and c.best_model_path]
    path = (best + [c.last_model_path for c in saved if c.last_model_path] + [""])[0]
    inside = Path(path).is_relative_to(run_dir.resolve())
    return str(run_dir / Path(path).relative_to(run_dir.resolve())) if inside else path


# ---- the command ---------------------------------------------------------------------------------


def fit(argv: Sequence[str]) -> dict[str, StageResult]:
    """Run what the command line says; results by stage name ("fit" where the config has only one)."""
    files_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files_parser.add_argument("-c", "--config", action="append", default=[])
    files, rest = files_parser.parse_known_args(argv)
    recipe = load_recipe(files.config, rest)
    if recipe is None:
        command = FitCLI(argv)
        processes = Process.this().size
        if command.alone and processes > 1:
            raise UsageError(
                f"the config asks for one process (trainer.devices: 1, trainer.num_nodes: 1), the job has {processes}: "
                "take these keys out, or submit a job of one"
            )
        result = command.run(resume=False)
        save_result(result, command, inputs={})
        return {"fit": result}
    if recipe.print_config:
        print(resolved_configs(recipe, COMMANDS), end="")
        raise SystemExit(0)
    return run_recipe(recipe, COMMANDS)


@rank_zero_only
def print_results(results: dict[str, StageResult]) -> None:
    """Print the metrics of every stage and where everything was written."""
    console = Console()
    compared = {stage: text for stage, result in results.items() if (text := finished_table(result.run_dir))}
    for stage, result in results.items():
        if stage in compared:
            continue
        state = "finished earlier" if result.skipped else "finished"
        name = Path(result.checkpoint).name or "no checkpoint"
        if result.protocol:
            print(f"protocol     {result.protocol}")
        metrics_of = f"metrics of {name}"
        if result.validated_step is not None:
            metrics_of = f"{name}, last validated at step {result.validated_step}"
        table = Table(title=f"{stage}: {state}; {metrics_of}", title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in result.metrics.items():
            table.add_row(name, f"{value:.2f}")
        console.print(table)
        print(f"run folder   {result.run_dir}")
        print(f"checkpoint   {result.checkpoint}")
        if result.skipped:
            print(f"             (remove {result.run_dir} or use another --name to train again)")
    for stage, text in compared.items():
        state = "finished earlier" if results[stage].skipped else "finished"
        print(f"\n{stage}: {state}; written to {results[stage].run_dir}\n\n{text}")
    print(f"TensorBoard  tensorboard --logdir {os.path.commonpath([r.run_dir for r in results.values()])}")


def main() -> int:
    """Entry point; user errors end in one line and exit code 2 (FASTHMR_TRACEBACK=1 shows where they arose)."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s")
    # Our own way of calling it; and the moving average is in evaluation mode on purpose.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
    # Our metrics add up over all processes before they are logged.
    warnings.filterwarnings("ignore", r".*It is recommended to use `self\.log\('val/")
    # Lightning advertises other products at start-up.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # the config says it
    try:
        print_results(fit(sys.argv[1:]))
    except KeyboardInterrupt:
        print(
            "[fit] interrupted; a recipe goes on with the same command, one stage with --ckpt_path last",
            file=sys.stderr,
        )
        return 130
    except stopping.Stopped as stopped:
        process = Process.this()
        if process.rank == 0:
            print(f"[fit] {stopped}; the same command goes on (one stage: with --ckpt_path auto)", file=sys.stderr)
        # Lightning ends the first process as soon as one that it started has failed.
        return 0 if process.started_by == "lightning" else stopping.EXIT_CODE
    except (UsageError, NonFiniteLossError, MisconfigurationException, ValueError, OSError) as error:
        if os.environ.get("FASTHMR_TRACEBACK"):
            raise
        rank = f" in process {Process.this().rank}" if distributed.is_initialized() else ""
        print(f"error{rank}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def leave(code: int) -> NoReturn:
    """End this process; loader processes that an error has left are ended first, as they do not hear SIGTERM."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
