"""Metrics over a whole data set that agree exactly for any number of ranks and any batch sizes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fasthmr.metrics.functional import acceleration_error, mpjpe, pa_mpjpe, pve
from fasthmr.metrics.protocols import Acceleration, Protocol

#: frames compared at a time: their vertices stay in a core's cache, and memory is used again instead of asked for
_BLOCK = 8


class PoseErrors(Metric):
    """PA-MPJPE, MPJPE, PVE (mm) and Accel (m/s^2) of one protocol, frames pooled over sequences.

    The states are sums of single frames' errors and their counts, in float64. A rank that saw nothing contributes
    nothing; what nobody saw is NaN.

    Args:
        protocol: joints, root and frames.
        regressor: (J, V), for protocols that have one (`Protocol.regressor`).
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, protocol: Protocol, regressor: Tensor | None = None) -> None:
        super().__init__()
        if protocol.regressor is not None:
            protocol.require_regressor(regressor, regressor.shape[-1] if regressor is not None else 0)
        self.protocol = protocol
        self.regressor = regressor
        self.names = ("pa_mpjpe_mm", "mpjpe_mm", "pve_mm") + (("accel_m_s2",) if protocol.accel is not None else ())
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        pred_joints: Tensor,
        target_joints: Tensor,
        pred_vertices: Tensor | None,
        target_vertices: Tensor | None,
        valid: Tensor,
        fps: Tensor,
    ) -> None:
        """Add sequences.

        Args:
            pred_joints, target_joints: (B,T,24,3) metres, consecutive frames.
            pred_vertices, target_vertices: (B,T,V,3) metres, or None: then there is no PVE.
            valid: (B,T) bool, frames that count; the others may hold anything, also NaN.
            fps: (B,) frames/s.

        Raises:
            ValueError: shapes do not fit each other or the protocol.
        """
        if valid.dtype != torch.bool or valid.shape != pred_joints.shape[:2] or fps.shape != valid.shape[:1]:
            raise ValueError(
                f"valid must be (B,T) bool and fps (B,) for joints {tuple(pred_joints.shape)}, "
                f"got {valid.dtype} {tuple(valid.shape)} and {tuple(fps.shape)}"
            )
        pred_mesh, target_mesh = _flat(pred_joints, pred_vertices), _flat(target_joints, target_vertices)
        preds, targets, distances_mm = [], [], []
        for first in range(0, max(valid.numel(), 1), _BLOCK):
            (pred, moved), (target, true_moved) = (self._rooted(*mesh, first) for mesh in (pred_mesh, target_mesh))
            preds.append(pred)
            targets.append(target)
            if moved is not None and true_moved is not None:
                distances_mm.append(pve(moved, true_moved))
        pred, target = (torch.cat(part).unflatten(0, valid.shape) for part in (preds, targets))
        self._add("pa_mpjpe_mm", pa_mpjpe(pred[valid], target[valid]))
        self._add("mpjpe_mm", mpjpe(pred[valid], target[valid]))
        if distances_mm:
            self._add("pve_mm", torch.cat(distances_mm)[valid.flatten()])
        if self.protocol.accel is not None:
            for sequence in zip(pred, target, valid, fps.tolist(), strict=True):
                self._add("accel_m_s2", accelerations(*sequence, self.protocol.accel))

    def compute(self) -> dict[str, Tensor]:
        """Mean errors, float64: "pa_mpjpe_mm", "mpjpe_mm", "pve_mm" and, if the protocol has it, "accel_m_s2"."""
        return dict(zip(self.names, self.sums / self.counts, strict=True))

    def _rooted(self, joints: Tensor, vertices: Tensor | None, first: int) -> tuple[Tensor, Tensor | None]:
        """A block of frames, from `first` on, as the protocol compares them."""
        joints = joints[first : first + _BLOCK]
        vertices = None if vertices is None else vertices[first : first + _BLOCK]
        return self.protocol.align(self.protocol.select(joints, vertices, self.regressor), vertices)

    def _add(self, name: str, values: Tensor) -> None:
        position = self.names.index(name)
        self.sums[position] += values.double().sum()
        self.counts[position] += values.numel()


class BestConstantError(Metric):
    """MPJPE of the best pose that is the same for every frame: what a model must beat to have learnt anything.

    For the mean distance that is each joint's geometric median over all root-removed frames, found by Weiszfeld's
    iteration. The median needs all frames at once, so the state is the frames' joints.

    Args:
        protocol: joints and root.
        regressor: (J, V), for protocols that have one.
        iterations: of Weiszfeld's.
    """

    full_state_update = False
    coordinates: list[Tensor] | Tensor

    def __init__(self, protocol: Protocol, regressor: Tensor | None = None, iterations: int = 50) -> None:
        super().__init__()
        self.protocol = protocol
        self.regressor = regressor
        self.iterations = iterations
        # Flat, because torchmetrics lets a rank without frames take part in the gathering as a tensor of shape (0,).
        self.add_state("coordinates", [], dist_reduce_fx="cat")

    def update(self, target_joints: Tensor, valid: Tensor, target_vertices: Tensor | None = None) -> None:
        """Add ground truth: joints (B,T,24,3), valid (B,T) bool; vertices (B,T,V,3) where joints are regressed."""
        joints, _ = self.protocol.align(self.protocol.select(target_joints, target_vertices, self.regressor))
        assert isinstance(self.coordinates, list)
        self.coordinates.append(joints[valid].float().flatten())

    def compute(self) -> Tensor:
        """Millimetres; NaN without frames."""
        if not len(self.coordinates):
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        joints = dim_zero_cat(self.coordinates).reshape(-1, len(self.protocol.subset), 3)
        constant = joints.mean(0, keepdim=True)
        for _ in range(self.iterations):
            weight = 1 / (joints - constant).norm(dim=-1, keepdim=True).clamp_min(1e-6)
            constant = (weight * joints).sum(0, keepdim=True) / weight.sum(0, keepdim=True)
        return mpjpe(constant.expand_as(joints), joints).double().mean()


def accelerations(pred: Tensor, target: Tensor, valid: Tensor, fps: float, rule: Acceleration) -> Tensor:
    """One sequence's acceleration errors that count: (T,J,3) twice and (T,) bool -> (at most T-2,) m/s^2."""
    if rule.gaps == "remove":
        pred, target, valid = pred[valid], target[valid], valid[valid]
    if len(valid) < 3:
        return pred.new_zeros(0)
    values = acceleration_error(pred, target, fps)
    whole = valid[2:] & valid[1:-1] & valid[:-2]
    if rule.trim:
        values, whole = values[1:-1], whole[1:-1]
    return values[whole]


def _flat(joints: Tensor, vertices: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Meshes (B,T,...) behind one another, (B*T,...)."""
    return joints.flatten(0, 1), None if vertices is None else vertices.flatten(0, 1)
