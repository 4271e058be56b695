"""Between rotations: the point on the shortest turn from one to another, and rows at fractional positions.

Convention: as in `fasthmr.geometry.rotations`. A worked number: a third of the way from no turn to a turn by pi/2
about z is a turn by pi/6 about z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasthmr.geometry.rotations import axis_angle_to_matrix, matrix_to_axis_angle


def slerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """The rotation at `weight` of the shortest turn from `start` (weight 0) to `end` (weight 1).

    Of opposite rotations, half a turn apart, either way is taken.

    Args:
        start, end: (..., 3, 3) rotation matrices.
        weight: (...) in [0, 1], broadcast over the leading dimensions.

    Returns:
        (..., 3, 3); exactly `start` at weight 0.
    """
    turn = matrix_to_axis_angle(start.mT @ end)
    return start @ axis_angle_to_matrix(weight[..., None] * turn)


def resample_rotations(rotations: Tensor, positions: Tensor) -> Tensor:
    """Rows of rotations (T, J, 3, 3) at fractional row numbers (N,) in [0, T-1]: (N, J, 3, 3)."""
    low, weight = _below(len(rotations), positions)
    high = (low + 1).clamp_max(len(rotations) - 1)
    return slerp(rotations[low], rotations[high], weight[:, None].to(rotations.dtype))


def resample_linear(values: Tensor, positions: Tensor) -> Tensor:
    """Rows of numbers (T, D) at fractional row numbers (N,) in [0, T-1]: (N, D)."""
    low, weight = _below(len(values), positions)
    return torch.lerp(values[low], values[(low + 1).clamp_max(len(values) - 1)], weight[:, None].to(values.dtype))


def _below(rows: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The row below each position, and how far above it the position is."""
    low = positions.floor().long().clamp(0, rows - 1)
    return low, positions - low
