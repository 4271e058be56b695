"""Unit quaternions (w, x, y, z) in numpy, batched over leading dimensions, to blend and resample motions in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

X, Y, Z = 0, 1, 2


def multiply(a: Array, b: Array) -> Array:
    """Rotation `a` after rotation `b`: (..., 4), broadcast."""
    aw, ax, ay, az = a[..., 0], a[..., 1], a[..., 2], a[..., 3]
    bw, bx, by, bz = b[..., 0], b[..., 1], b[..., 2], b[..., 3]
    return np.stack(
        (
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ),
        axis=-1,
    )


def inverse(q: Array) -> Array:
    """The inverse rotation: (..., 4)."""
    return q * np.array((1.0, -1.0, -1.0, -1.0))


def rotate(q: Array, v: Array) -> Array:
    """Vectors (..., 3) turned by quaternions (..., 4), broadcast."""
    w, u = q[..., :1], q[..., 1:]
    twice = 2 * cross(u, v)
    return v + w * twice + cross(u, twice)


def cross(a: Array, b: Array) -> Array:
    """Cross product (..., 3), broadcast; several times as fast as numpy's own on small arrays."""
    ax, ay, az = a[..., 0], a[..., 1], a[..., 2]
    bx, by, bz = b[..., 0], b[..., 1], b[..., 2]
    return np.stack((ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx), axis=-1)


def from_rotvec(rotvec: Array) -> Array:
    """Quaternions of axis-angle vectors (..., 3) in radians: (..., 4)."""
    half = 0.5 * np.linalg.norm(rotvec, axis=-1, keepdims=True)
    return np.concatenate((np.cos(half), 0.5 * np.sinc(half / np.pi) * rotvec), axis=-1)


def to_rotvec(q: Array) -> Array:
    """Axis-angle vectors (..., 3) of unit quaternions, angle in [0, pi]."""
    q = np.where(q[..., :1] < 0, -q, q)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., :1])
    return np.where(sine > 1e-9, angle / np.maximum(sine, 1e-9), 2.0) * q[..., 1:]


def about(axis: int, angle: Array | float) -> Array:
    """Turn by `angle` (...) radians about the x (0), y (1) or z (2) axis: (..., 4)."""
    half = 0.5 * np.asarray(angle, dtype=np.float64)
    q = np.zeros((*half.shape, 4))
    q[..., 0], q[..., 1 + axis] = np.cos(half), np.sin(half)
    return q


def from_axes(first: Array, second: Array) -> Array:
    """The turn that takes x to `first` and y to `second`'s part perpendicular to it: (..., 4).

    `first` (..., 3) need not have length 1; `second` must not be parallel to it.
    """
    x = first / np.linalg.norm(first, axis=-1, keepdims=True)
    y = second - (second * x).sum(-1, keepdims=True) * x
    y = y / np.linalg.norm(y, axis=-1, keepdims=True)
    z = cross(x, y)
    (m00, m10, m20), (m01, m11, m21), (m02, m12, m22) = (np.moveaxis(a, -1, 0) for a in (x, y, z))
    # Each row of this matrix is 4 q_i q; the one with the largest diagonal is well conditioned.
    rows = np.stack(
        [
            np.stack(row, axis=-1)
            for row in (
                (1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01),
                (m21 - m12, 1 + m00 - m11 - m22, m01 + m10, m02 + m20),
                (m02 - m20, m01 + m10, 1 - m00 + m11 - m22, m12 + m21),
                (m10 - m01, m02 + m20, m12 + m21, 1 - m00 - m11 + m22),
            )
        ],
        axis=-2,
    )
    best = np.diagonal(rows, axis1=-2, axis2=-1).argmax(-1)
    q = np.take_along_axis(rows, best[..., None, None], axis=-2).squeeze(-2)
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def slerp(a: Array, b: Array, weight: Array) -> Array:
    """Spherical interpolation from `a` (weight 0) to `b` (weight 1) on the shorter arc: (..., 4); weight is (...)."""
    cosine = (a * b).sum(-1, keepdims=True)
    b = np.where(cosine < 0, -b, b)
    angle = np.arccos(np.clip(np.abs(cosine), 0.0, 1.0))
    weight = np.asarray(weight, dtype=np.float64)[..., None]
    sine = np.sin(angle)
    near = sine < 1e-6
    safe = np.where(near, 1.0, sine)
    wa = np.where(near, 1 - weight, np.sin((1 - weight) * angle) / safe)
    wb = np.where(near, weight, np.sin(weight * angle) / safe)
    q = wa * a + wb * b
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def resample(q: Array, times: Array) -> Array:
    """Rows of `q` (T, ..., 4) at fractional row numbers `times` (N,) in [0, T-1], by slerp: (N, ..., 4)."""
    low, weight = _neighbours(len(q), times)
    shape = (len(times),) + (1,) * (q.ndim - 2)
    return slerp(q[low], q[np.minimum(low + 1, len(q) - 1)], np.broadcast_to(weight.reshape(shape), q[low].shape[:-1]))


def resample_linear(values: Array, times: Array) -> Array:
    """Rows of `values` (T, ...) at fractional row numbers `times` (N,), linearly: (N, ...)."""
    low, weight = _neighbours(len(values), times)
    weight = weight.reshape((-1,) + (1,) * (values.ndim - 1))
    return (1 - weight) * values[low] + weight * values[np.minimum(low + 1, len(values) - 1)]


def _neighbours(rows: int, times: Array) -> tuple[NDArray[np.int64], Array]:
    # Times that should be whole numbers are, up to rounding: reading a clip at its own rate must return its rows.
    snapped = np.where(np.abs(times - np.round(times)) < 1e-6, np.round(times), times)
    low = np.clip(np.floor(snapped).astype(np.int64), 0, rows - 1)
    return low, snapped - low


def swing_twist(q: Array, axis: int) -> Array:
    """Joint angles (..., 3) of rotations `q` for a bone along `axis`: number `axis` is the twist about the bone, the
    other two are the swing's rotation vector (it is perpendicular to the bone). Inverse of `from_swing_twist`."""
    twist = np.zeros_like(q)
    twist[..., 0], twist[..., 1 + axis] = q[..., 0], q[..., 1 + axis]
    norm = np.linalg.norm(twist, axis=-1, keepdims=True)
    identity = np.zeros_like(q)
    identity[..., 0] = 1.0
    twist = np.where(norm > 1e-9, twist / np.maximum(norm, 1e-9), identity)
    return to_rotvec(multiply(q, inverse(twist))) + to_rotvec(twist)


def from_swing_twist(angles: Array, axis: int) -> Array:
    """Rotations (..., 4) with twist `angles[..., axis]` about the bone first, then the swing of the other two."""
    swing = np.array(angles, dtype=np.float64)
    swing[..., axis] = 0.0
    return multiply(from_rotvec(swing), about(axis, angles[..., axis]))
