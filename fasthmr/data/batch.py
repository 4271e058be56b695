"""ClipBatch: what a model is fed: frames of several clips with their labels, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.utils.data import default_collate

from fasthmr.conventions import CROP_PX, MASK_OTHER, MASK_SUBJECT
from fasthmr.data.crops import normalised
from fasthmr.geometry.cameras import box_info

#: shape (after the leading batch dimension) and dtype of every array of a sample; "T" is the number of frames.
_LAYOUT: dict[str, tuple[tuple[int | str, ...], torch.dtype]] = {
    "images": (("T", 3, CROP_PX, CROP_PX), torch.uint8),
    "masks": (("T", CROP_PX, CROP_PX), torch.uint8),
    "joints2d": (("T", 29, 3), torch.float32),
    "joints3d": (("T", 29, 4), torch.float32),
    "rotations": (("T", 24, 3, 3), torch.float32),
    "betas": ((10,), torch.float32),
    "translation": (("T", 3), torch.float32),
    "has_pose": ((), torch.bool),
    "has_betas": ((), torch.bool),
    "valid": (("T",), torch.bool),
    "box_center": (("T", 2), torch.float32),
    "box_size": (("T",), torch.float32),
    "image_size": ((2,), torch.float32),
    "intrinsics": ((3, 3), torch.float32),
    "fps": ((), torch.float32),
    "frame_index": (("T",), torch.int64),
}


@dataclass(frozen=True)
class ClipSample:
    """One clip's share of a `ClipBatch`: the same fields without the batch dimension, as numpy arrays."""

    key: str
    gender: str
    images: np.ndarray
    masks: np.ndarray
    joints2d: np.ndarray
    joints3d: np.ndarray
    rotations: np.ndarray
    betas: np.ndarray
    translation: np.ndarray
    has_pose: bool
    has_betas: bool
    has_masks: bool
    valid: np.ndarray
    box_center: np.ndarray
    box_size: np.ndarray
    image_size: np.ndarray
    intrinsics: np.ndarray
    fps: float
    frame_index: np.ndarray


@dataclass
class ClipBatch:
    """B clips of T frames each, cut to HMR2.0's 256-pixel network input; validated on construction.

    Frames: labels are in the camera frame (x right, y down, z forward, metres). The network crop is the square
    `box_center`, `box_size` of the full image (px), so a full-image point p is at (p - box_center) / box_size in
    the crop's normalised coordinates [-0.5, 0.5]. Where a clip was flipped, every field describes the mirrored image.

    Attributes:
        keys: B clip keys.
        has_masks: of the B clips, whether their masks are known. A list, as the keys are: asking does not wait for
            a device.
        genders: of the B clips, which body of its family ("neutral", "male", "female") betas and translation belong to.
        images: (B, T, 3, 256, 256) uint8 RGB.
        masks: (B, T, 256, 256) uint8 instance labels (`conventions.MASK_*`); all background where not `has_masks`.
        joints2d: (B, T, 29, 3) crop-normalised x, y and confidence; confidence 0 where there is no label.
        joints3d: (B, T, 29, 4) absolute camera-frame position and confidence; confidence 0 where there is no label.
        rotations: (B, T, 24, 3, 3) SMPL rotations, root in the camera frame; meaningless where not `has_pose`.
        betas: (B, 10) of the body of the clip's gender; zeros where there is no label.
        translation: (B, T, 3) SMPL translation (pelvis = rest pelvis + translation); meaningless where not `has_pose`.
        has_pose: (B,) bool. has_betas: (B,) bool, betas that the neutral body can be compared with.
        valid: (B, T) bool, frames whose labels may be used.
        box_center: (B, T, 2), box_size: (B, T) of the crop that was cut, full-image px.
        image_size: (B, 2) width and height of the full image; intrinsics: (B, 3, 3) of the full image, px; without a
            label, those of a lens whose focal length is the image's diagonal.
        fps: (B,) frame rate of the clip; frame_index: (B, T) which of the clip's frames these are.

    Raises:
        ValueError: a field has the wrong shape or dtype; the message names it, what it must be and what it is.
    """

    keys: list[str]
    has_masks: list[bool]
    genders: list[str]
    images: torch.Tensor
    masks: torch.Tensor
    joints2d: torch.Tensor
    joints3d: torch.Tensor
    rotations: torch.Tensor
    betas: torch.Tensor
    translation: torch.Tensor
    has_pose: torch.Tensor
    has_betas: torch.Tensor
    valid: torch.Tensor
    box_center: torch.Tensor
    box_size: torch.Tensor
    image_size: torch.Tensor
    intrinsics: torch.Tensor
    fps: torch.Tensor
    frame_index: torch.Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 5:
            raise ValueError(_shape_error("images", self.images, "B", "T"))
        clips, frames = self.images.shape[:2]
        for name, (tail, dtype) in _LAYOUT.items():
            tensor = getattr(self, name)
            expected = (clips, *(frames if n == "T" else n for n in tail))
            if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                raise ValueError(_shape_error(name, tensor, clips, frames))
        if len(self.keys) != clips:
            raise ValueError(f"keys must name the {clips} clips of the batch, got {len(self.keys)} keys: {self.keys}")
        for name in ("has_masks", "genders"):
            if len(getattr(self, name)) != clips:
                raise ValueError(f"{name} must hold {clips} values, one a clip, got {len(getattr(self, name))}")

    @property
    def num_clips(self) -> int:
        return self.images.shape[0]

    @property
    def frames_per_clip(self) -> int:
        return self.images.shape[1]

    def network_input(self) -> torch.Tensor:
        """(B*T, 3, 256, 256) float32 in [0, 1], normalised by ImageNet's mean and standard deviation (HMR2.0)."""
        return normalised(flatten_frames(self.images))

    def box_info(self) -> torch.Tensor:
        """(B*T, 3) where the crops were in the full images, in focal lengths: what CameraHMR is told."""
        size, focal_px = self.image_size[:, None], self.intrinsics[:, None, 0, 0]
        return flatten_frames(box_info(self.box_center, self.box_size, size, focal_px))

    def per_frame(self, per_clip: torch.Tensor) -> torch.Tensor:
        """(B, ...) one value a clip -> (B*T, ...) repeated for each of its frames."""
        return per_clip.repeat_interleave(self.frames_per_clip, dim=0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClipBatch:
        """The batch on another device. Copies from pinned memory do not block (Lightning cannot ask for it)."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking or t.is_pinned()))

    def pin_memory(self) -> ClipBatch:
        """The batch in page-locked memory; called by the data loader's `pin_memory=True`."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ClipBatch:
        tensors = {name: function(getattr(self, name)) for name in _LAYOUT}
        return ClipBatch(keys=list(self.keys), has_masks=list(self.has_masks), genders=list(self.genders), **tensors)


def flatten_frames(per_frame: torch.Tensor) -> torch.Tensor:
    """(B, T, ...) -> (B*T, ...), clip after clip."""
    return per_frame.flatten(0, 1)


def person_mask(
    batch: ClipBatch, people: Literal["subject", "all"] = "subject", required: bool = False
) -> torch.Tensor | None:
    """Pixels of the tracked person, or of all people, in the network's crop.

    Args:
        batch: clips with their instance masks.
        people: whose pixels.
        required: a clip without masks is an error that names it. Otherwise there is no mask for the batch then, which
            a network that needs none accepts.

    Returns:
        (B*T, 256, 256) bool, or None if a clip has no masks: that is not the same as a clip without a person.

    Raises:
        ValueError: masks are required, and a clip has none.
    """
    without = [key for key, has_masks in zip(batch.keys, batch.has_masks, strict=True) if not has_masks]
    if without and required:
        raise ValueError(
            f"tokens are merged by person mask, and these clips have no masks: {', '.join(without)}. Use clips with "
            "masks, or set token_merging.mask to none"
        )
    if without:
        return None
    masks = flatten_frames(batch.masks)
    return masks == MASK_SUBJECT if people == "subject" else (masks == MASK_SUBJECT) | (masks == MASK_OTHER)


def collate(samples: Sequence[ClipSample]) -> ClipBatch:
    """Stack samples of equal length into a batch.

    Raises:
        ValueError: no samples, or samples of different numbers of frames.
    """
    if not samples:
        raise ValueError("cannot make a batch of no samples")
    frames = {len(s.images) for s in samples}
    if len(frames) != 1:
        lengths = ", ".join(f"{s.key}: {len(s.images)}" for s in samples)
        raise ValueError(f"all clips of a batch must have the same number of frames, got {lengths}")
    stacked = {  # torch's own collate stacks straight into shared memory when it runs in a loader process
        name: default_collate([torch.as_tensor(getattr(s, name), dtype=dtype) for s in samples])
        for name, (_, dtype) in _LAYOUT.items()
    }
    return ClipBatch(
        keys=[s.key for s in samples],
        has_masks=[s.has_masks for s in samples],
        genders=[s.gender for s in samples],
        **stacked,
    )


def _shape_error(name: str, tensor: torch.Tensor, clips: int | str, frames: int | str) -> str:
    tail, dtype = _LAYOUT[name]
    shape = ", ".join(str(n) for n in (clips, *(frames if n == "T" else n for n in tail)))
    got = f"({', '.join(str(n) for n in tensor.shape)}) {_short(tensor.dtype)}"
    return f"{name} must have shape ({shape}) {_short(dtype)}, got {got}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
