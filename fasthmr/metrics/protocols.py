"""Evaluation protocols as data: which joints, which root, which frames. A number without its protocol means nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fasthmr.conventions import LEFT_HIP, NUM_JOINTS, RIGHT_HIP


@dataclass(frozen=True)
class JointRegressor:
    """A (num_joints, 6890) matrix that turns SMPL's vertices into joints. It is licensed, so the caller brings it.

    Args:
        name: what the field calls it.
        num_joints: its rows.
        origin: where a user gets the file.
    """

    name: str
    num_joints: int
    origin: str


@dataclass(frozen=True)
class Acceleration:
    """Which accelerations of a sequence count.

    Args:
        trim: drop the first and the last, as WHAM's evaluation does.
        gaps: what an invalid frame does: it is "remove"d before differencing, so that its neighbours touch, as in
            WHAM's evaluation of EMDB; or the differences that contain it are "skip"ped.
    """

    trim: bool
    gaps: Literal["remove", "skip"]


@dataclass(frozen=True)
class Protocol:
    """How a predicted and a true mesh are compared. Joint numbers are rows of `regressor`, or the body's own joints.

    Args:
        name: what it is called in tables.
        regressor: what gives the joints; None for the body's own 24.
        subset: the joints that are compared, in order.
        root: joints whose mean is moved to the origin, joints and vertices alike.
        root_name: the same in words.
        accel: which accelerations count; None where the protocol has none.
        ground_truth: the body of the ground truth, in words; predictions are of the neutral body.
        average_betas: the predicted shape is averaged over each clip before the mesh is made (FastHMR, Sec. 4.1), by
            `clip_betas`; not done in the single-image evaluations of CameraHMR and HMR2.0.
    """

    name: str
    regressor: JointRegressor | None
    subset: tuple[int, ...]
    root: tuple[int, ...]
    root_name: str
    accel: Acceleration | None
    ground_truth: str
    average_betas: bool = True

    def clip_betas(self, betas: Tensor, valid: Tensor) -> Tensor:
        """The predicted shape that a clip's meshes are made with: where `average_betas` says so, the mean over the
        frames that count.

        Args:
            betas: (..., T, 10), of every frame.
            valid: (..., T) bool, frames that count.

        Returns:
            (..., T, 10); zeros for a clip in which no frame counts.
        """
        if not self.average_betas:
            return betas
        weight = valid.to(betas.dtype)[..., None]
        mean = (weight * betas).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1)
        return mean.expand_as(betas)

    def select(self, joints: Tensor, vertices: Tensor | None, regressor: Tensor | None = None) -> Tensor:
        """All joints that the protocol counts in, before the subset is taken.

        Args:
            joints: (..., 24, 3) the body's own, metres.
            vertices: (..., V, 3) metres, used where the protocol has a regressor.
            regressor: (J, V) the matrix that `self.regressor` names.

        Returns:
            `joints`, or (..., J, 3) regressed from the vertices.

        Raises:
            ValueError: something that is needed is missing or does not fit.
        """
        if self.regressor is None:
            if joints.shape[-2] != NUM_JOINTS:
                raise ValueError(f"protocol {self.name} needs {NUM_JOINTS} joints, got {joints.shape[-2]}")
            return joints
        if vertices is None:
            raise ValueError(
                f"protocol {self.name} regresses its joints from vertices, got none: evaluate meshes, or use body-24"
            )
        weights = self.require_regressor(regressor, vertices.shape[-2])
        # Half precision would move joints by centimetres. One product for all frames, not one for each, is faster.
        with torch.autocast(vertices.device.type, enabled=False):
            return (vertices.mT.contiguous() @ weights.to(vertices).mT).mT

    def require_regressor(self, regressor: Tensor | None, num_vertices: int) -> Tensor:
        """`regressor` if it is what this protocol needs for a body of `num_vertices`.

        Raises:
            ValueError: it is missing or does not fit; says where to get it.
        """
        if self.regressor is None:
            raise ValueError(f"protocol {self.name} takes the body's own joints and no regressor")
        wanted = f"protocol {self.name} needs {self.regressor.name} ({self.regressor.num_joints}, 6890)"
        if regressor is None:
            raise ValueError(
                f"{wanted}, got none. It comes with {self.regressor.origin}; pass it as `regressor` (evaluation also "
                f"finds {self.regressor.name}.npy beside the body file). A body that is not SMPL's has none: use "
                "protocol body-24"
            )
        if regressor.shape != (self.regressor.num_joints, num_vertices):
            raise ValueError(
                f"{wanted} and a body with as many vertices, got a regressor of {tuple(regressor.shape)} and "
                f"{num_vertices} vertices. A body that is not SMPL's has none: use protocol body-24"
            )
        return regressor

    def align(self, joints: Tensor, vertices: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Move the root to the origin.

        Args:
            joints: (..., J, 3), what `select` returns.
            vertices: (..., V, 3) or None.

        Returns:
            The subset's joints (..., len(subset), 3) and the vertices, both shifted by the JOINT root.
        """
        root = joints[..., list(self.root), :].mean(-2, keepdim=True)
        return joints[..., list(self.subset), :] - root, None if vertices is None else vertices - root

    def describe(self) -> str:
        """One line to print above every table: joints, regressor, root, bodies, shape, accelerations, frames."""
        source = "none, the body's own" if self.regressor is None else self.regressor.name
        shape = "averaged over each clip's labelled frames" if self.average_betas else "per frame"
        if self.accel is None:
            accel = "none"
        else:
            gaps = "removed before differencing" if self.accel.gaps == "remove" else "skipped with their differences"
            accel = f"{'first and last dropped' if self.accel.trim else 'all frames'}, invalid frames {gaps}"
        return (
            f"{self.name}: {len(self.subset)} joints; regressor: {source}; root: {self.root_name}; "
            f"ground truth: {self.ground_truth}; predicted shape: {shape}; acceleration: {accel}; "
            "frames pooled over sequences"
        )


_SPIN_DATA = "SPIN's, HMR2.0's and WHAM's downloads (registration at smpl.is.tue.mpg.de)"
H36M_REGRESSOR = JointRegressor("J_regressor_h36m", 17, _SPIN_DATA)
SPIN_REGRESSOR = JointRegressor("SMPL_to_J19", 19, _SPIN_DATA)

#: the 14 joints common to the benchmarks among H36M_REGRESSOR's: right ankle, knee, hip, left hip, knee, ankle, right
#: wrist, elbow, shoulder, left shoulder, elbow, wrist, neck, head (SPIN, `constants.py`, `H36M_TO_J14`)
H36M_TO_14 = (6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10)
#: the same 14 among SPIN_REGRESSOR's, which are joints 25..43 of 4D-Humans' 44 (`hmr2/configs/datasets_eval.yaml`)
SPIN_TO_14 = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 18)

_BODY_24 = tuple(range(NUM_JOINTS))
_WHAM_ACCELERATION = Acceleration(trim=True, gaps="remove")

#: by name; `body-24` for any body, `emdb-24` and `3dpw-14` (both WHAM's) for FastHMR's Tab. 1. The three 3DPW roots
#: differ by up to 9 mm on the same prediction.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "body-24",
            None,
            subset=_BODY_24,
            root=(LEFT_HIP, RIGHT_HIP),
            root_name="mean of the hips",
            # Labels of one frame may be missing anywhere in our own sets: no acceleration across a hole.
            accel=Acceleration(trim=True, gaps="skip"),
            ground_truth="the body of its labels",
        ),
        Protocol(
            "emdb-24",
            None,
            subset=_BODY_24,
            root=(LEFT_HIP, RIGHT_HIP),
            root_name="mean of the hips",
            accel=_WHAM_ACCELERATION,
            ground_truth="gendered SMPL body",
        ),
        Protocol(
            "3dpw-14",
            H36M_REGRESSOR,
            subset=H36M_TO_14,
            root=(H36M_TO_14[2], H36M_TO_14[3]),
            root_name="mean of the regressed hips",
            accel=_WHAM_ACCELERATION,
            ground_truth="gendered SMPL body",
        ),
        Protocol(
            "3dpw-14-root0",
            H36M_REGRESSOR,
            subset=H36M_TO_14,
            root=(0,),
            root_name="H36M joint 0",
            accel=None,
            ground_truth="gendered SMPL body",
            average_betas=False,
        ),
        Protocol(
            "3dpw-14-hmr2",
            SPIN_REGRESSOR,
            subset=SPIN_TO_14,
            root=(39 - 25,),
            root_name="MPII pelvis (39 of the 44 joints)",
            accel=None,
            ground_truth="gendered SMPL body",
            average_betas=False,
        ),
    )
}
