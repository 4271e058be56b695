"""The field's errors as pure functions; no alignment inside but PA-MPJPE's own. Protocols remove the root."""

from __future__ import annotations

from torch import Tensor

from fasthmr.geometry.alignment import similarity_align

_MM_PER_METRE = 1000.0


def mpjpe(pred: Tensor, target: Tensor) -> Tensor:
    """Mean per-joint position error: (..., J, 3) metres -> (...,) millimetres per frame.

    Raises:
        ValueError: shapes differ or are not (..., J, 3). The same for all functions here.
    """
    _require_same_points(pred, target)
    return _MM_PER_METRE * (pred - target).norm(dim=-1).mean(-1)


def pa_mpjpe(pred: Tensor, target: Tensor) -> Tensor:
    """MPJPE after the best similarity alignment of each frame: (..., J, 3) metres -> (...,) millimetres."""
    _require_same_points(pred, target)
    return mpjpe(similarity_align(pred, target), target)


def pve(pred: Tensor, target: Tensor) -> Tensor:
    """Per-vertex error: (..., V, 3) metres -> (...,) millimetres per frame."""
    return mpjpe(pred, target)


def acceleration_error(pred: Tensor, target: Tensor, fps: float) -> Tensor:
    """Error of the joints' acceleration: (..., T, J, 3) metres at `fps` frames/s -> (..., T-2) m/s^2.

    Value t is about frame t+1: the length of the second difference of the error, times fps^2, averaged over joints
    (WHAM, `lib/eval/eval_utils.py`, `compute_error_accel`). Which of the T-2 values count is the protocols' business.

    Raises:
        ValueError: shapes differ, fewer than three frames, or fps is not positive.
    """
    _require_same_points(pred, target)
    if pred.ndim < 3 or pred.shape[-3] < 3:
        raise ValueError(f"acceleration needs (..., T, J, 3) with 3 or more frames, got {tuple(pred.shape)}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    error = (pred - target).double()
    second = error[..., 2:, :, :] - 2 * error[..., 1:-1, :, :] + error[..., :-2, :, :]
    return (fps**2 * second.norm(dim=-1).mean(-1)).to(pred.dtype)


def _require_same_points(pred: Tensor, target: Tensor) -> None:
    if pred.shape != target.shape or pred.ndim < 2 or pred.shape[-1] != 3:
        raise ValueError(
            f"pred and target must both be (..., points, 3), got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
