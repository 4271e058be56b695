"""Evaluation as the stage of a recipe (`command: evaluate`): conf/evaluation_tiny.yaml shows its keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fasthmr.cli import FitParser, HelpFormatter, UsageError
from fasthmr.evaluation import TABLE, VIDEO, EvaluationConfig, SystemConfig, describe, evaluate
from fasthmr.metrics import PROTOCOLS
from fasthmr.ranks import rank
from fasthmr.recipe import StageResult
from fasthmr.side_by_side import log_video
from fasthmr.video.reading import Frames

#: Keys of training stages. A recipe's keys for all stages come here, too, and mean nothing here.
_OF_TRAINING = ("model", "trainer", "motion", "motion_val", "backgrounds", "seed_everything")


class EvaluationStage:
    """Evaluates systems, in the order in which the config names them, and writes to `run_dir`.

    Args:
        arguments: as of a one-stage config: `-c FILE`, `-c YAML`, `--KEY=VALUE`.

    Raises:
        UsageError: they are wrong.
    """

    #: processes of a job share the clips
    alone = False

    def __init__(self, arguments: Sequence[str]) -> None:
        # "omegaconf+" resolves ${...} after all files and arguments are merged, as in stages of training.
        self._parser = FitParser(
            prog="python -m fasthmr.evaluate",
            parser_mode="omegaconf+",
            description=__doc__,
            formatter_class=HelpFormatter,
        )
        self._parser.add_argument("-c", "--config", action="config")
        self._parser.add_argument("--run_dir", type=str, default="runs/evaluation", help="folder to write to")
        self._parser.add_argument("--data_dir", type=str, default="data/synth", help="for ${data_dir} in `data`")
        self._parser.add_argument("--data", type=str, required=True, help="folder of shards with pose labels")
        self._parser.add_argument("--systems", type=dict[str, SystemConfig], required=True, help="by name")
        self._parser.add_class_arguments(EvaluationConfig)
        for key in _OF_TRAINING:
            self._parser.add_argument(f"--{key}", type=Any, default=None, help="of training stages; not used")
        self._config = self._parser.parse_args(list(arguments))
        for key in _OF_TRAINING:
            self._config.pop(key)
        self.run_dir = Path(self._config.run_dir)
        try:
            self._settings = EvaluationConfig(
                **{f.name: getattr(self._config, f.name) for f in fields(EvaluationConfig)}
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        self._systems = {name: SystemConfig(**vars(system)) for name, system in self._config.systems.items()}

    @property
    def resolved(self) -> str:
        """The config as YAML, all files, overrides and interpolations applied; without keys of training."""
        text: str = self._parser.dump(self._config, skip_none=False)
        return text

    def completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """As the parser's."""
        return self._parser.completed(config)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate, and show what was found in TensorBoard as well.

        Raises:
            ValueError, OSError: as `fasthmr.evaluation.evaluate`.
        """
        results = evaluate(self._systems, self._config.data, self._settings, self.run_dir)
        if rank() == 0:
            _log(self.run_dir, describe(results))
        return results

    def run(self, *, resume: bool) -> StageResult:
        """Evaluate to the end; an evaluation that was interrupted starts anew, whatever `resume` says.

        Raises:
            ValueError, OSError: as `evaluate`.
        """
        results = self.evaluate()
        metrics = {
            f"{system['name']}/{metric}": estimate["value"]
            for system in results["systems"]
            for metric, estimate in system["errors"].items()
            if estimate["value"] is not None
        }
        protocol = PROTOCOLS[self._settings.protocol].describe()
        return StageResult(self.run_dir, metrics, checkpoint="", protocol=protocol)


def finished_table(run_dir: Path) -> str | None:
    """What an evaluation wrote in `run_dir` for people; None if there was none."""
    file = run_dir / TABLE
    return file.read_text() if file.is_file() else None


def _log(run_dir: Path, table: str) -> None:
    with SummaryWriter(str(run_dir)) as writer:
        writer.add_text("table", table)
        for picture in sorted(run_dir.glob("*.png")):
            writer.add_image(picture.stem, np.asarray(Image.open(picture).convert("RGB")), dataformats="HWC")
        if (run_dir / VIDEO).exists():
            frames = Frames(run_dir / VIDEO)
            log_video(writer, "side by side", frames, frames.fps or 30.0, step=0)
