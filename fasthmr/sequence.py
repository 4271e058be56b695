"""Sequences of any length through a decoder of fixed windows: split and blended, stretched, bridged, streamed.

A decoder turns the encoder's features of a window of F frames into poses. Here a sequence of any number of frames
becomes rotations of as many:

- longer than F: windows that overlap, the last one shifted back so that all have F frames, blended by slerp with
  weights that fall to zero at a window's ends;
- shorter than F: features stretched linearly to F frames, rotations squeezed back by slerp (FastHMR, Sec. 3.3);
- frames without a detection: features interpolated linearly, or held at the sequence's ends. A gap longer than
  `max_gap` frames is not bridged by the decoder: the parts on its sides are decoded on their own, and the rotations in
  it are the turn from the one to the other.

`StreamingDecoder` does the same for frames that arrive one after the other, with bounded latency.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fasthmr.body import BodyModel, decode_pose
from fasthmr.body.pose import Representation
from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.geometry.slerp import resample_linear, resample_rotations, slerp


class Decoder(Protocol):
    """What a decoder has: see `fasthmr.models.diffusion_decoder.DiffusionDecoder`."""

    @property
    def window(self) -> int:
        """Frames F of a window."""
        ...

    @property
    def feature_dim(self) -> int:
        """Width D of a frame's feature."""
        ...

    @property
    def representation(self) -> Representation:
        """What the numbers of its poses are."""
        ...

    def __call__(self, features: Tensor, *, steps: int) -> Tensor:
        """Poses (B, T, 133 or 144) of features (B, T, D), T up to the window, in so many denoising steps."""
        ...


def _require_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True)
class SequenceConfig:
    """How sequences are put through a decoder.

    Args:
        overlap: of neighbouring windows, as a share of the window.
        max_gap: gaps of at most so many frames are bridged by the decoder.
        steps: denoising steps.
        batch: windows decoded at a time.
        adaptive_ik: how joints become rotations (`fasthmr.body.ik.from_hybrid`); of no effect on 6D rotations.

    Raises:
        ValueError: a value that cannot be; names it.
    """

    overlap: float = 0.2
    max_gap: int = 30
    steps: int = 1
    batch: int = 8
    adaptive_ik: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be a share of the window in [0, 1), got {self.overlap}")
        for name, least in (("max_gap", 0), ("steps", 1), ("batch", 1)):
            _require_whole(name, getattr(self, name), least)

    def overlap_frames(self, window: int) -> int:
        """Frames that neighbouring windows of so many frames share."""
        return min(round(self.overlap * window), window - 1)


@torch.no_grad()
def refine(
    decoder: Decoder,
    body: BodyModel,
    features: Tensor,
    betas: Tensor,
    valid: Tensor | None = None,
    config: SequenceConfig = SequenceConfig(),
) -> Tensor:
    """Rotations of a sequence of any length, from the encoder's features.

    Args:
        decoder: on the device of the features.
        body: the decoder's; its rest joints make rotations of joints.
        features: (T, D), T >= 1, in time order at the decoder's frame rate.
        betas: (T, 10), constant where the shape was averaged over the clip.
        valid: (T,) bool, frames with a detection; None: all. What features and betas hold in others does not matter.
        config: windows, gaps and denoising steps.

    Returns:
        (T, 24, 3, 3), root in the camera frame.

    Raises:
        ValueError: a shape does not fit, no frame is valid, or a number is not finite.
    """
    valid = _checked(decoder, features, betas, valid)
    if not valid.any():
        raise ValueError(f"none of the {len(valid)} frames shows the person: there is nothing to decode")
    rotations = features.new_zeros(len(features), NUM_JOINTS, 3, 3)
    decoded = torch.zeros_like(valid)
    for first, last in parts(valid, config.max_gap):
        part = slice(first, last)
        rotations[part] = _refine_part(
            decoder, body, fill_linear(features[part], valid[part]), fill_linear(betas[part], valid[part]), config
        )
        decoded[part] = True
    return fill_rotations(rotations, decoded)


def parts(valid: Tensor, max_gap: int) -> list[tuple[int, int]]:
    """First and last frame (exclusive) of the stretches between gaps of more than `max_gap` frames.

    A shorter gap at the sequence's ends belongs to the part beside it.
    """
    seen = valid.nonzero()[:, 0].tolist()
    breaks = [(a, b) for a, b in itertools.pairwise(seen) if b - a - 1 > max_gap]
    first = 0 if seen[0] <= max_gap else seen[0]
    last = len(valid) if len(valid) - 1 - seen[-1] <= max_gap else seen[-1] + 1
    return list(zip([first, *(b for _, b in breaks)], [*(a + 1 for a, _ in breaks), last], strict=True))


def window_starts(frames: int, window: int, overlap: int) -> list[int]:
    """First frames of windows that cover `frames` >= `window` frames; the last window ends with them."""
    return [*range(0, frames - window, window - overlap), frames - window]


def fill_linear(values: Tensor, valid: Tensor) -> Tensor:
    """Values (T, D) with those of frames that are not valid interpolated between the nearest that are; ends held.

    Raises:
        ValueError: no frame is valid.
    """
    before, after, weight = _neighbours(valid)
    return torch.lerp(values[before], values[after], weight[:, None].to(values.dtype))


def fill_rotations(rotations: Tensor, valid: Tensor) -> Tensor:
    """Rotations (T, J, 3, 3) with those of frames that are not valid interpolated by slerp; ends held.

    Raises:
        ValueError: no frame is valid.
    """
    filled, gap = rotations.clone(), ~valid
    before, after, weight = (t[gap] for t in _neighbours(valid))
    filled[gap] = slerp(rotations[before], rotations[after], weight[:, None].to(rotations.dtype))
    return filled


class StreamingDecoder:
    """Refines frames as they arrive; each is returned at most `latency` = look_ahead + stride - 1 frames later.

    Every `stride` frames the decoder sees the last F frames and refines the `stride` frames that lie `look_ahead`
    frames behind the newest. So a frame is refined from about F - look_ahead frames of its past and at least
    `look_ahead` of its future. The step from one window's poses to the next one's is spread over the
    min(look_ahead, stride) frames that both know; without look-ahead it is not spread at all. Until F frames have
    arrived, those that have are stretched to F. Memory and time a frame are constant.

    Frames without a detection repeat the last one until the next comes, and are interpolated from then on.

    Args:
        decoder, body: as for `refine`.
        stride: frames between two windows; the decoder's cost a frame is F / stride times that of `refine` without
            overlap.
        look_ahead: frames of the future that a refined frame has seen at least.
        steps: denoising steps.
        adaptive_ik: as of `SequenceConfig`.

    Raises:
        ValueError: a setting that cannot be, or stride + look_ahead is more than the window.
    """

    def __init__(
        self,
        decoder: Decoder,
        body: BodyModel,
        stride: int = 8,
        look_ahead: int = 8,
        steps: int = 1,
        adaptive_ik: bool = False,
    ) -> None:
        for name, value, least in (("stride", stride, 1), ("look_ahead", look_ahead, 0), ("steps", steps, 1)):
            _require_whole(name, value, least)
        if stride + look_ahead > decoder.window:
            raise ValueError(
                f"stride + look_ahead must be at most the decoder's window of {decoder.window} frames, "
                f"got {stride} + {look_ahead}"
            )
        self.decoder, self.body = decoder, body
        self.stride, self.look_ahead, self.steps, self.adaptive_ik = stride, look_ahead, steps, adaptive_ik
        self._start_over()

    @property
    def latency(self) -> int:
        """Frames that may have to follow a frame before it is returned."""
        return self.look_ahead + self.stride - 1

    @torch.no_grad()
    def push(self, features: Tensor, betas: Tensor, valid: Tensor | None = None) -> Tensor:
        """Take the next frames, any number of them, and return those that are ready, in order.

        Args:
            features: (n, D).
            betas: (n, 10), such as the mean over the frames so far.
            valid: (n,) bool, frames with a detection; None: all. The sequence's first frame must have one.

        Returns:
            (m, 24, 3, 3), m >= 0. The sequence's first rows are its first frames.

        Raises:
            ValueError: a shape does not fit, a number is not finite, or there was no detection yet.
        """
        valid = _checked(self.decoder, features, betas, valid)
        if not self._arrived and len(valid) and not valid[0]:
            raise ValueError("the first frame has no detection: leave out what comes before the person is seen")
        ready = [features.new_zeros(0, NUM_JOINTS, 3, 3)]
        for at in range(len(features)):
            frame = slice(at, at + 1)
            self._append(features[frame], betas[frame], bool(valid[at]))
            if self._arrived - self._returned == self.latency + 1:
                ready.append(self._return(self.stride))
        return torch.cat(ready)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The frames that are left, at most `latency`: (m, 24, 3, 3). The next frame begins a new sequence."""
        left = self._arrived - self._returned
        rotations = self._return(left) if left else self._features.new_zeros(0, NUM_JOINTS, 3, 3)
        self._start_over()
        return rotations

    def _start_over(self) -> None:
        self._arrived = self._returned = self._gap = 0
        self._features = self._betas = torch.zeros(0)  # of the last F frames
        self._known = torch.zeros(0)  # the last window's rotations of frames that are not returned yet

    def _append(self, features: Tensor, betas: Tensor, valid: bool) -> None:
        if not self._arrived:
            self._features, self._betas = features, betas
        elif valid:
            self._features, self._betas = self._extended(self._features, features), self._extended(self._betas, betas)
        else:
            self._features, self._betas = (
                torch.cat((old, old[-1:]))[-self.decoder.window :] for old in (self._features, self._betas)
            )
        self._gap = 0 if valid else self._gap + 1
        self._arrived += 1

    def _extended(self, values: Tensor, new: Tensor) -> Tensor:
        """The window with a new last row; what was held in the gap before it is interpolated towards it."""
        rows = min(self._gap, len(values))
        weight = 1 - torch.arange(rows, 0, -1, device=values.device) / (self._gap + 1)
        bridged = torch.lerp(values[len(values) - rows :], new, weight[:, None].to(values.dtype))
        return torch.cat((values[: len(values) - rows], bridged, new))[-self.decoder.window :]

    def _return(self, count: int) -> Tensor:
        """The next `count` frames: by the newest window, blended with the one before where that knew them."""
        decoded = _decode_any(self.decoder, self.body, self._features, self._betas, self.steps, self.adaptive_ik)
        pending = decoded[len(decoded) - (self._arrived - self._returned) :]
        rotations = pending[:count].clone()
        if shared := min(len(self._known), count):
            rotations[:shared] = slerp(self._known[:shared], rotations[:shared], _ramp(shared).to(decoded)[:, None])
        self._known = pending[count:]
        self._returned += count
        return rotations


def _refine_part(decoder: Decoder, body: BodyModel, features: Tensor, betas: Tensor, config: SequenceConfig) -> Tensor:
    """Rotations of a sequence without gaps, of any length."""
    frames, window = len(features), decoder.window
    if frames <= window:
        return _decode_any(decoder, body, features, betas, config.steps, config.adaptive_ik)
    overlap = config.overlap_frames(window)
    starts = window_starts(frames, window, overlap)
    weight = window_weights(window, overlap).to(features)
    rotations, total = features.new_zeros(frames, NUM_JOINTS, 3, 3), features.new_zeros(frames)
    for batch in (starts[i : i + config.batch] for i in range(0, len(starts), config.batch)):
        rows = torch.tensor(batch, device=features.device)[:, None] + torch.arange(window, device=features.device)
        decoded = _decode(decoder, body, features[rows], betas[rows], config.steps, config.adaptive_ik)
        for start, own in zip(batch, decoded, strict=True):
            where = slice(start, start + window)
            # The running weighted mean by slerp: of two windows it is the point on the turn between them.
            known = int((total[where] > 0).sum())
            share = weight[:known] / (total[where][:known] + weight[:known])
            blended = slerp(rotations[where][:known], own[:known], share[:, None])
            rotations[where] = torch.cat((blended, own[known:]))
            total[where] += weight
    return rotations


def window_weights(window: int, overlap: int) -> Tensor:
    """(window,) weights of a window's frames: 1 but for `overlap` frames at both ends, where they fall to zero."""
    rise = torch.ones(window)
    rise[:overlap] = _ramp(overlap)
    return rise * rise.flip(0)


def _ramp(count: int) -> Tensor:
    """(count,) numbers that rise smoothly from 0 to 1, both of which lie just outside."""
    return (0.5 * math.pi * torch.arange(1, count + 1) / (count + 1)).sin().square()


def _decode_any(
    decoder: Decoder, body: BodyModel, features: Tensor, betas: Tensor, steps: int, adaptive_ik: bool
) -> Tensor:
    """Rotations of a sequence of up to a window's frames, stretched to the window and back if it is shorter."""
    frames, window = len(features), decoder.window
    if frames == window:
        return _decode(decoder, body, features[None], betas[None], steps, adaptive_ik)[0]
    stretched = _evenly(frames, window, features.device)
    features, betas = (resample_linear(values, stretched)[None] for values in (features, betas))
    rotations = _decode(decoder, body, features, betas, steps, adaptive_ik)[0]
    return resample_rotations(rotations, _evenly(window, frames, features.device))


def _evenly(rows: int, count: int, device: torch.device) -> Tensor:
    """`count` row numbers from the first of `rows` rows to the last; the middle one if it is only one."""
    if count == 1:
        return torch.full((1,), (rows - 1) / 2, device=device, dtype=torch.float64)
    return torch.arange(count, device=device, dtype=torch.float64) * (rows - 1) / (count - 1)


def _decode(
    decoder: Decoder, body: BodyModel, features: Tensor, betas: Tensor, steps: int, adaptive_ik: bool
) -> Tensor:
    """Rotations (B, F, 24, 3, 3) of windows of features (B, F, D)."""
    poses = decoder(features, steps=steps)
    if not poses.isfinite().all():
        raise ValueError("the decoder gave poses that are not finite: its weights are damaged, or not its encoder's")
    return decode_pose(poses, betas, body, decoder.representation, adaptive_ik)


def _neighbours(valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The valid frames before and after each frame, (T,) each, and how far between them it lies, in [0, 1]."""
    known = valid.nonzero()[:, 0]
    if not len(known):
        raise ValueError(f"none of the {len(valid)} frames is valid: there is nothing to interpolate from")
    time = torch.arange(len(valid), device=valid.device)
    before = known[(torch.searchsorted(known, time, right=True) - 1).clamp_min(0)]
    after = known[torch.searchsorted(known, time).clamp_max(len(known) - 1)]
    return before, after, ((time - before) / (after - before).clamp_min(1)).clamp(0, 1)


def _checked(decoder: Decoder, features: Tensor, betas: Tensor, valid: Tensor | None) -> Tensor:
    """`valid` of the frames, after a look at shapes and numbers."""
    if features.ndim != 2 or features.shape[1] != decoder.feature_dim:
        raise ValueError(
            f"features must be (T, {decoder.feature_dim}) as the decoder's encoder gives them, "
            f"got {tuple(features.shape)}"
        )
    frames = len(features)
    if tuple(betas.shape) != (frames, NUM_BETAS):
        raise ValueError(f"betas must be ({frames}, {NUM_BETAS}) like the {frames} features, got {tuple(betas.shape)}")
    if valid is None:
        valid = torch.ones(frames, dtype=torch.bool, device=features.device)
    elif tuple(valid.shape) != (frames,) or valid.dtype != torch.bool:
        raise ValueError(f"valid must be ({frames},) bool, got {tuple(valid.shape)} {valid.dtype}")
    for name, values in (("features", features), ("betas", betas)):
        broken = (valid & ~values.isfinite().all(1)).nonzero()[:, 0]
        if len(broken):
            raise ValueError(f"{name} are not finite in frame {int(broken[0])} ({len(broken)} such frames)")
    return valid
