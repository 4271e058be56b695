"""HMR2.0's losses with masks for missing labels: SMPL pose, betas, 3D and 2D joints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthmr.conventions import PELVIS
from fasthmr.geometry.boxes import TokenGrid


class NonFiniteLossError(RuntimeError):
    """The loss of a batch is NaN or infinite; the message names the step, and the clips of the batch if it has any."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts.

    HMR2.0 sums each part over the batch, the joints and their numbers, and weighs the sums with 0.05 (3D joints),
    0.01 (2D joints), 0.001 (root orientation), 0.001 (body pose) and 0.0005 (betas); 4D-Humans,
    `hmr2/configs_hydra/experiment`. Here each part is a mean over what is labelled, so that a weight depends neither on
    the size of the batch nor on how many labels are missing. Times the numbers in a frame (44 joints x 3, 44 x 2, 9,
    207, 10), HMR2.0's proportions are joints3d 6.6, joints2d 0.88, root 0.009, rotations 0.207, betas 0.005. The
    defaults weigh root, rotations and 2D joints more: they are for training from scratch, where the root orientation
    must be learnt first.

    `token_joints` is not HMR2.0's. HMR2.0 starts from a ViT that has learnt to find key points (ViTPose); without such
    weights, `token_joint_loss` teaches the tokens the same on the way. 0 leaves it out.

    `feature` keeps a model whose layers are merged near its un-merged teacher (`feature_loss`); 0 leaves it out.
    """

    rotations: float = 1.0
    root: float = 1.0
    betas: float = 0.005
    joints3d: float = 5.0
    joints2d: float = 5.0
    token_joints: float = 0.0
    feature: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"loss.{name} must be 0 or more, got {value}")


@dataclass(frozen=True)
class HMRTarget:
    """Labels of N frames. What is missing may hold anything, also NaN: it is masked before it is used.

    Args:
        rotations: (N,24,3,3), root in the camera frame.
        betas: (N,10).
        joints3d: (N,29,4) metres, any origin, and confidence.
        joints2d: (N,29,3) crop-normalised to [-0.5,0.5], and confidence.
        has_pose, has_betas: (N,) bool.
        valid: (N,) bool, frames whose labels may be used.
    """

    rotations: Tensor
    betas: Tensor
    joints3d: Tensor
    joints2d: Tensor
    has_pose: Tensor
    has_betas: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        frames = len(self.valid)
        for name, shape in _TARGET_SHAPES.items():
            got = tuple(getattr(self, name).shape)
            if got != (frames, *shape):
                raise ValueError(f"HMRTarget.{name} must be {(frames, *shape)}, got {got}")


_TARGET_SHAPES: dict[str, tuple[int, ...]] = {
    "rotations": (24, 3, 3),
    "betas": (10,),
    "joints3d": (29, 4),
    "joints2d": (29, 3),
    "has_pose": (),
    "has_betas": (),
    "valid": (),
}


def hmr_losses(
    rotations: Tensor, betas: Tensor, joints3d: Tensor, joints2d: Tensor, target: HMRTarget, weights: LossWeights
) -> dict[str, Tensor]:
    """The parts, unweighted, and their weighted sum "total".

    Args:
        rotations: (N,24,3,3) predicted.
        betas: (N,10) predicted.
        joints3d: (N,29,3) predicted, metres; compared relative to the pelvis.
        joints2d: (N,29,2) predicted, crop-normalised.
        target: labels.
        weights: of the parts.

    Returns:
        Scalars "root", "rotations", "betas", "joints3d", "joints2d", "total". A part without any label is 0, with zero
        gradient.
    """
    pose = target.valid & target.has_pose
    rotation_error = rotations - target.rotations
    # Both relative to their own pelvis: without a labelled pelvis, no joint has a label.
    pelvis = slice(PELVIS, PELVIS + 1)
    true_joints3d, confidence3d = target.joints3d[..., :3], target.joints3d[..., 3]
    joint_error = (joints3d - joints3d[:, pelvis]) - (true_joints3d - true_joints3d[:, pelvis])
    parts = {
        "root": _mean_where(rotation_error[:, :1], pose, Tensor.square),
        "rotations": _mean_where(rotation_error[:, 1:], pose, Tensor.square),
        "betas": _mean_where(betas - target.betas, target.valid & target.has_betas, Tensor.square),
        "joints3d": _mean_where(
            joint_error, confidence3d * confidence3d[:, pelvis] * target.valid[:, None], Tensor.abs
        ),
        "joints2d": _mean_where(
            joints2d - target.joints2d[..., :2], target.joints2d[..., 2] * target.valid[:, None], Tensor.abs
        ),
    }
    total = torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
    return parts | {"total": total}


def token_joint_loss(logits: Tensor, joints2d: Tensor, valid: Tensor, grid: TokenGrid) -> Tensor:
    """Cross-entropy of "which token holds this joint", averaged over the joints that lie on a token; 0 without any.

    Args:
        logits: (N,tokens,J), row-major over the grid.
        joints2d: (N,J,3) crop-normalised to [-0.5,0.5], and confidence.
        valid: (N,) bool.
        grid: where the tokens lie in the crop.
    """
    position = torch.nan_to_num(joints2d[..., :2], nan=-1.0) + 0.5
    columns = torch.floor((position[..., 0] * grid.crop_px - grid.left_px) / grid.patch_px).long()
    rows = torch.floor((position[..., 1] * grid.crop_px - grid.top_px) / grid.patch_px).long()
    on_grid = (columns >= 0) & (columns < grid.columns) & (rows >= 0) & (rows < grid.rows)
    counts = on_grid & (joints2d[..., 2] > 0) & valid[:, None]
    token = torch.where(counts, rows * grid.columns + columns, 0)
    loss = F.cross_entropy(logits.float(), token, reduction="none")
    return (loss * counts).sum() / counts.sum().clamp_min(1)


def feature_loss(feature: Tensor, teacher: Tensor) -> Tensor:
    """How far the head's token is from a teacher's, (N,D) each: mean square after both are standardised, 0 to 4."""
    size = feature.shape[-1:]
    return F.mse_loss(F.layer_norm(feature, size), F.layer_norm(teacher, size))


def _mean_where(error: Tensor, weight: Tensor, penalty: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean penalty: weighted over the leading dimensions, which `weight` has, plain over the rest; 0 without weight.

    What is not labelled becomes 0 BEFORE the penalty: since 0 * NaN is NaN, a mask that comes later still lets a NaN of
    a label through into the gradient. A NaN weight counts as 0.
    """
    weight = torch.nan_to_num(weight.to(error.dtype))
    full = weight.reshape(*weight.shape, *[1] * (error.ndim - weight.ndim)).expand_as(error)
    penalties = penalty(torch.where(full > 0, error, 0))
    return (penalties * full).sum() / full.sum().clamp_min(torch.finfo(error.dtype).tiny)
