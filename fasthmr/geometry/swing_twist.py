"""Swing and twist: a rotation as the shortest turn of a bone, after a turn about it. Safe at every rotation.

Convention: `rotation = swing @ twist`. The twist turns about the bone (a unit vector u before the rotation), the swing
is the shortest turn that takes u to where the rotation takes it. A worked number: for u = (0, 1, 0), a turn by pi/2
about y is all twist, a turn by pi/2 about x all swing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasthmr.geometry.rotations import cross_matrix

#: below this cosine a swing is composed of a half turn about a fixed axis and the small rest: the usual formula divides
#: by 1 + cosine there (HybrIK's is off by up to 0.8 m near the antipode).
_ANTIPODE_COSINE = -0.999


def shortest_swing(source: Tensor, target: Tensor) -> Tensor:
    """The shortest rotation that takes one unit vector to another; finite, with finite gradients, everywhere.

    Near the antipode, where it jumps, it is a half turn about a fixed perpendicular of `source`, then the small rest:
    still a rotation that takes `source` to `target`, and the same one for the same vectors.

    Args:
        source, target: (..., 3) unit vectors.

    Returns:
        (..., 3, 3) with `R @ source == target`.
    """
    cosine = (source * target).sum(-1, keepdim=True)
    opposite = cosine < _ANTIPODE_COSINE
    start = torch.where(opposite, -source, source)
    small = _swing(start, target)
    axis = _perpendicular(source)
    identity = torch.eye(3, dtype=source.dtype, device=source.device)
    half_turn = 2 * axis[..., :, None] * axis[..., None, :] - identity
    return torch.where(opposite[..., None], small @ half_turn, small)


def twist_rotation(axis: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotation about a unit vector: axis (..., 3), (cos, sin) of the angle (..., 2), normalised here -> (..., 3, 3)."""
    cos_sin = torch.nn.functional.normalize(cos_sin, dim=-1)
    cosine, sine = cos_sin[..., 0, None, None], cos_sin[..., 1, None, None]
    cross = cross_matrix(axis)
    identity = torch.eye(3, dtype=axis.dtype, device=axis.device)
    return identity + sine * cross + (1 - cosine) * (cross @ cross)


def split_swing_twist(rotation: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
    """Swing, and the twist's (cos, sin), of a rotation.

    Args:
        rotation: (..., 3, 3).
        axis: (..., 3) unit vector of the bone before the rotation.

    Returns:
        swing (..., 3, 3) and (cos, sin) (..., 2), with `swing @ twist_rotation(axis, cos_sin) == rotation`.
    """
    swing = shortest_swing(axis, (rotation @ axis[..., None])[..., 0])
    twist = swing.mT @ rotation
    sine = torch.stack(
        (
            twist[..., 2, 1] - twist[..., 1, 2],
            twist[..., 0, 2] - twist[..., 2, 0],
            twist[..., 1, 0] - twist[..., 0, 1],
        ),
        dim=-1,
    )
    trace = twist.diagonal(dim1=-2, dim2=-1).sum(-1)
    return swing, torch.stack(((trace - 1) / 2, (sine * axis).sum(-1) / 2), dim=-1)


def _swing(source: Tensor, target: Tensor) -> Tensor:
    """Rodrigues' formula by cross and dot product; fine but for opposite vectors."""
    cross = cross_matrix(torch.linalg.cross(source, target, dim=-1))
    cosine = (source * target).sum(-1)[..., None, None]
    identity = torch.eye(3, dtype=source.dtype, device=source.device)
    return identity + cross + cross @ cross / (1 + cosine)


def _perpendicular(vector: Tensor) -> Tensor:
    """A unit vector perpendicular to each (..., 3) unit vector: its cross product with the axis it is least along."""
    least = vector.detach().abs().argmin(-1)
    other = torch.nn.functional.one_hot(least, 3).to(vector.dtype)
    return torch.nn.functional.normalize(torch.linalg.cross(vector, other, dim=-1), dim=-1)
