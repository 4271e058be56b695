"""Pictures: predicted and true meshes of fixed validation frames, in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from fasthmr.conventions import CROP_PX
from fasthmr.data.batch import ClipBatch
from fasthmr.files import write_png
from fasthmr.geometry.cameras import Lens, image_lens, predicted_lens
from fasthmr.models.hmr import HMROutput
from fasthmr.render.overlay import overlay_mesh, side_view

PREDICTION_COLOR = (0.55, 0.75, 0.95)
TRUTH_COLOR = (0.60, 0.85, 0.60)


class Pictures(L.Callback):
    """After each validation, one strip per fixed sample: input, prediction, truth, and both from the side.

    The samples are the middle frames of the first clips of the validation set, which never change: TensorBoard's slider
    shows the same person getting better. All strips together are also written to `<default_root_dir>/pictures`.

    Args:
        samples: how many.
    """

    def __init__(self, samples: int = 6) -> None:
        self.samples = samples
        self._strips: list[np.ndarray] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._strips = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ClipBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero:
            return
        net: Any = pl_module.net
        for clip in range(min(len(batch.keys), self.samples - len(self._strips))):
            self._strips.append(draw_strip(pl_module.body, batch, HMROutput(**outputs), clip, net.config.full_image))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._strips:  # on all ranks but the first
            return
        file = Path(trainer.default_root_dir) / "pictures" / f"step{trainer.global_step:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_png(file, np.concatenate(self._strips, axis=0))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, strip in enumerate(self._strips):
                    logger.experiment.add_image(f"samples/{number}", strip, trainer.global_step, dataformats="HWC")


def draw_strip(body: Any, batch: ClipBatch, output: HMROutput, clip: int, full_image: bool = False) -> np.ndarray:
    """Input | prediction | ground truth | side views of both, for the middle frame of one clip: (256, 5*256, 3) RGB.

    The truth is drawn with the full image's camera; so is the prediction if it counts on that (`full_image`, as of
    `predicted_lens`), else with the crop's own.
    """
    frames = batch.valid.shape[1]
    frame = frames // 2
    row = clip * frames + frame
    image = batch.images[clip, frame].permute(1, 2, 0).cpu().numpy()
    faces = body.faces.cpu().numpy()
    box = (batch.box_center[clip, frame], batch.box_size[clip, frame], batch.intrinsics[clip])

    def over_image(vertices: Tensor, lens: Lens, color: tuple[float, float, float]) -> np.ndarray:
        (x, y), focal = lens.center.tolist(), float(lens.focal_px)
        return overlay_mesh(image, vertices.cpu().numpy(), faces, focal, (x, y), color)

    with torch.no_grad():
        predicted = body(output.rotations[row : row + 1].float(), output.betas[row : row + 1].float())
        truth = body(batch.rotations[clip, frame : frame + 1], batch.betas[clip : clip + 1])
        lens, shift = predicted_lens(output.camera[row].float(), *box, full_image)
    vertices = predicted.vertices[0]
    panels = [image, over_image(vertices + shift, lens, PREDICTION_COLOR)]
    if bool(batch.has_pose[clip]):
        panels.append(over_image(truth.vertices[0] + batch.translation[clip, frame], image_lens(*box), TRUTH_COLOR))
    else:
        panels.append(np.full_like(image, 255))
    panels.append(side_view(vertices.cpu().numpy(), faces, CROP_PX, PREDICTION_COLOR))
    panels.append(side_view(truth.vertices[0].cpu().numpy(), faces, CROP_PX, TRUTH_COLOR))
    return np.concatenate(panels, axis=1)
