"""How far each joint may turn, in the axes of the T-pose body, and keeping a pose inside these limits.

A joint's three numbers are degrees about x, y, z of the rest body (x to its left, y up, z forward), split at the bone:
the number of the bone's own axis is the twist about it, the other two are the swing (see quaternions.swing_twist).
For the left side, with the everyday name of the positive direction:

    hip       x back (extension), y toes outwards, z leg outwards (abduction)
    knee      x bend             ankle  x point the toes (plantar flexion)      foot  x curl the toes
    shoulder  z raise, y back, x twist so that the palm turns back              elbow y straighten (bends at y < 0)
    spine, neck, head  x bow, y turn left, z lean right

The right side mirrors the left: same x, opposite y and z. Ranges are rounded textbook ranges of motion for healthy
adults (e.g. Boone and Azen 1979), shared among the spine's joints, widened where the split moves a corner.
"""

from __future__ import annotations

import numpy as np

from fasthmr.conventions import JOINTS24, NUM_JOINTS, PELVIS
from fasthmr.data.synth.quaternions import Array, X, Y, from_swing_twist, swing_twist

# joint: bone axis, then (lowest, highest) about x, y, z for the middle or the left side
_DEGREES: dict[str, tuple[int, tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "hip": (Y, (-125, 35), (-45, 50), (-30, 60)),
    "knee": (Y, (-1, 150), (-5, 5), (-5, 5)),
    "ankle": (Y, (-40, 60), (-30, 30), (-25, 25)),
    "foot": (Y, (-60, 30), (-5, 5), (-5, 5)),
    "spine1": (Y, (-20, 40), (-20, 20), (-18, 18)),
    "spine2": (Y, (-20, 40), (-20, 20), (-18, 18)),
    "spine3": (Y, (-20, 40), (-20, 20), (-18, 18)),
    "neck": (Y, (-30, 35), (-40, 40), (-25, 25)),
    "head": (Y, (-30, 30), (-40, 40), (-25, 25)),
    "collar": (X, (-15, 15), (-25, 25), (-15, 35)),
    "shoulder": (X, (-100, 90), (-140, 60), (-100, 110)),
    "elbow": (X, (-90, 90), (-150, 1), (-5, 5)),
    "wrist": (X, (-20, 20), (-35, 35), (-75, 75)),
    "hand": (X, (-5, 5), (-10, 10), (-80, 20)),
}


def _tables() -> tuple[tuple[int, ...], Array]:
    axes, limits = [], np.zeros((NUM_JOINTS, 3, 2))
    for j, name in enumerate(JOINTS24):
        if j == PELVIS:  # the body may turn anywhere in the world
            axes.append(Y)
            limits[j] = (-180, 180)
            continue
        axis, *ranges = _DEGREES[name.removeprefix("left_").removeprefix("right_")]
        axes.append(axis)
        limits[j] = ranges
        if name.startswith("right_"):
            limits[j, 1:] = -limits[j, 1:, ::-1]
    return tuple(axes), np.radians(limits)


#: (24,) axis of the bone that leaves each joint, and (24, 3, 2) lowest and highest joint angle in radians.
BONE_AXES, LIMITS = _tables()
_JOINTS_ALONG = {axis: [j for j, along in enumerate(BONE_AXES) if along == axis] for axis in (X, Y)}


def joint_angles(local: Array) -> Array:
    """Angles (..., 24, 3) in radians, in the axes of the table, of local rotations (..., 24, 4)."""
    angles = np.empty((*local.shape[:-1], 3))
    for axis, joints in _JOINTS_ALONG.items():
        angles[..., joints, :] = swing_twist(local[..., joints, :], axis)
    return angles


def limited(local: Array) -> Array:
    """The same pose (..., 24, 4) with every joint angle moved to the nearest allowed one; the pelvis is left alone."""
    inside = np.clip(joint_angles(local), LIMITS[..., 0], LIMITS[..., 1])
    result = np.empty_like(local)
    for axis, joints in _JOINTS_ALONG.items():
        result[..., joints, :] = from_swing_twist(inside[..., joints, :], axis)
    result[..., PELVIS, :] = local[..., PELVIS, :]
    return result
