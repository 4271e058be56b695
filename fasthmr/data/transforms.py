"""From a stored clip to one training sample: HMR2.0's 256-pixel crop, its labels, and the augmentation of both.

Every frame is resampled ONCE: network crop <- (mirror, jitter, HMR2.0's box) <- full image <- stored crop are affine,
so they are composed and a single `cv2.warpAffine` cuts the network input straight from the stored JPEG crop. A flip is
part of that affine (the mirror of the full image, so that pixels and labels agree to the sub-pixel; reversing the
finished array would be off by one pixel). How it is interpolated is in `fasthmr.data.crops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import cv2
import numpy as np
import torch

from fasthmr.conventions import CROP_PX, MASK_BACKGROUND, SWAP24, SWAP29
from fasthmr.data.batch import ClipSample
from fasthmr.data.crops import CROP_SCALE, cut_image, cut_mask
from fasthmr.data.schema import Clip, ClipError
from fasthmr.geometry.boxes import apply_affine, compose_affine, crop_affine, invert_affine
from fasthmr.geometry.rotations import axis_angle_to_matrix

#: shortest side of an occluding rectangle, as a fraction of the crop.
_SMALLEST_OCCLUDER = 0.1


@dataclass(frozen=True)
class Augmentation:
    """How training samples are varied. The defaults are for training; `Augmentation.off()` is for validation.

    Args:
        scale: the crop's side is multiplied by 1 +- scale, once per clip.
        shift: the crop's centre moves by +- shift (fraction of the person box) along both axes, once per clip.
        frame_jitter: additional +- change of scale and centre (same units), drawn for every frame.
        brightness: colours are multiplied by 1 +- brightness, once per clip, as are all colour changes.
        contrast: colours move away from or towards mid grey by a factor 1 +- contrast.
        gamma: colours in [0, 1] are raised to the power 1 +- gamma.
        channel_gain: red, green and blue are each multiplied by 1 +- channel_gain (HMR2.0 uses 0.2).
        occlusion: probability that a frame gets an occluding rectangle (plain colour or noise; not person in the mask).
        occlusion_size: longest side of that rectangle as a fraction of the crop; the shortest is 0.1.
        flip: probability that a clip is mirrored, with left and right of all labels exchanged.
    """

    scale: float = 0.2
    shift: float = 0.08
    frame_jitter: float = 0.02
    brightness: float = 0.2
    contrast: float = 0.2
    gamma: float = 0.2
    channel_gain: float = 0.15
    occlusion: float = 0.3
    occlusion_size: float = 0.4
    flip: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # probabilities may be 1; relative changes of 1 would make an empty crop or a black picture
            largest = 1.0 if field.name in ("occlusion", "occlusion_size", "flip") else 0.9
            smallest = _SMALLEST_OCCLUDER if field.name == "occlusion_size" else 0.0
            if not smallest <= value <= largest:
                raise ValueError(f"Augmentation.{field.name} must lie in [{smallest}, {largest}], got {value}")

    @classmethod
    def off(cls) -> Augmentation:
        """No augmentation at all: the sample is a pure function of clip and frames."""
        return cls(**{field.name: 0.0 for field in fields(cls) if field.name != "occlusion_size"})


def make_sample(
    clip: Clip,
    frame_index: Sequence[int] | np.ndarray,
    rng: np.random.Generator,
    augmentation: Augmentation,
    crop_scale: float = CROP_SCALE,
) -> ClipSample:
    """Cut the chosen frames of a clip to the network's crop, with labels, augmented.

    Args:
        clip: the stored clip.
        frame_index: T indices into its frames.
        rng: the only source of randomness; the same state gives the same sample. Untouched when augmentation is off.
        augmentation: what to vary.
        crop_scale: side of the network crop over that of the tight person box, before jitter.

    Returns:
        The sample; its fields are described at `ClipBatch`. Where a jittered crop leaves the stored crop it is black
        (as HMR2.0's is outside the picture). joints2d and joints3d have confidence 0 in frames that are not valid.

    Raises:
        ClipError: a chosen frame is damaged.
    """
    index = np.asarray(frame_index, dtype=np.int64)
    valid = clip.valid[index]
    labels = _Labels.of(clip, index)
    mirror = bool(augmentation.flip) and rng.random() < augmentation.flip
    if mirror:
        labels = labels.mirrored(float(clip.image_size[0]))
    center, size = _jittered_box(labels.box_center, clip.box_size[index], crop_scale, augmentation, rng)

    network_from_image = np.asarray(crop_affine(center, size, CROP_PX))
    network_from_stored = compose_affine(
        compose_affine(network_from_image, _mirror_affine(float(clip.image_size[0]))) if mirror else network_from_image,
        invert_affine(clip.crop_from_image[index].astype(np.float64)),
    )
    images, masks = _cut(clip, index, network_from_stored)
    _recolour(images, augmentation, rng)
    _occlude(images, masks, augmentation, rng)

    joints2d = labels.joints2d.copy()
    joints2d[..., :2] = apply_affine(network_from_image, joints2d[..., :2]) / CROP_PX - 0.5
    joints2d[..., 2] *= valid[:, None] * (clip.status["joints2d"] != "missing")
    joints3d = labels.joints3d.copy()
    joints3d[..., 3] *= valid[:, None] * (clip.status["joints3d"] != "missing")
    has_body = clip.body is not None
    return ClipSample(
        key=clip.key,
        gender=clip.gender,
        images=images,
        masks=masks,
        joints2d=joints2d,
        joints3d=joints3d,
        rotations=labels.rotations,
        betas=clip.betas,
        translation=labels.translation,
        has_pose=has_body and clip.status["pose"] != "missing",
        has_betas=has_body and clip.status["betas"] != "missing" and clip.gender == "neutral",
        has_masks=clip.status["masks"] != "missing",
        valid=valid,
        box_center=center,
        box_size=size,
        image_size=clip.image_size,
        intrinsics=labels.intrinsics,
        fps=clip.fps,
        frame_index=index,
    )


@dataclass(frozen=True)
class _Labels:
    """Those labels of the chosen frames that change under a mirror."""

    joints2d: np.ndarray
    joints3d: np.ndarray
    rotations: np.ndarray
    translation: np.ndarray
    box_center: np.ndarray
    intrinsics: np.ndarray

    @classmethod
    def of(cls, clip: Clip, index: np.ndarray) -> _Labels:
        return cls(
            joints2d=clip.joints2d[index],
            joints3d=clip.joints3d[index],
            rotations=axis_angle_to_matrix(torch.from_numpy(clip.pose[index])).numpy(),
            translation=clip.translation[index],
            box_center=clip.box_center[index],
            intrinsics=clip.intrinsics if clip.status["intrinsics"] != "missing" else _assumed_camera(clip.image_size),
        )

    def mirrored(self, width_px: float) -> _Labels:
        """The labels of the full image mirrored left to right, left and right joints exchanged.

        In the camera frame the mirror is x -> -x, so a rotation R becomes M R M with M = diag(-1, 1, 1). Bodies are
        taken to be symmetric: the mirrored translation is exact but for the rest pelvis' distance from the body's
        plane of symmetry (about 1 mm in SMPL).
        """
        swap29, swap24 = list(SWAP29), list(SWAP24)
        sign = np.array([-1.0, 1.0, 1.0], dtype=np.float32)
        joints2d = self.joints2d[:, swap29]
        joints2d[..., 0] = width_px - 1 - joints2d[..., 0]
        joints3d = self.joints3d[:, swap29]
        joints3d[..., 0] *= -1
        intrinsics = self.intrinsics.copy()
        intrinsics[0, 2] = width_px - 1 - intrinsics[0, 2]
        return _Labels(
            joints2d=joints2d,
            joints3d=joints3d,
            rotations=self.rotations[:, swap24] * (sign[:, None] * sign),
            translation=self.translation * sign,
            box_center=np.stack([width_px - 1 - self.box_center[:, 0], self.box_center[:, 1]], axis=-1),
            intrinsics=intrinsics,
        )


def _assumed_camera(image_size: np.ndarray) -> np.ndarray:
    """(3, 3) px: a pinhole at the image's centre, its focal length the diagonal, as `fasthmr.pipeline` assumes it."""
    focal_px, (x, y) = np.hypot(*image_size), image_size / 2
    return np.array([[focal_px, 0, x], [0, focal_px, y], [0, 0, 1]], dtype=np.float32)


def _mirror_affine(width_px: float) -> np.ndarray:
    """Full image -> its mirror image; pixel centres are integers, so column 0 becomes column width - 1."""
    return np.array([[-1.0, 0.0, width_px - 1], [0.0, 1.0, 0.0]])


def _jittered_box(
    center: np.ndarray, tight_size: np.ndarray, crop_scale: float, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Centre (T, 2) and side (T,) of the network crop in full-image px."""
    scale = np.full(len(tight_size), crop_scale)
    shift = np.zeros((len(tight_size), 2))
    if augmentation.scale or augmentation.shift:
        scale = scale * (1 + augmentation.scale * rng.uniform(-1, 1))
        shift = shift + augmentation.shift * rng.uniform(-1, 1, 2)
    if augmentation.frame_jitter:
        scale = scale * (1 + augmentation.frame_jitter * rng.uniform(-1, 1, len(scale)))
        shift = shift + augmentation.frame_jitter * rng.uniform(-1, 1, shift.shape)
    # in float32, as the batch keeps them: the crop is cut exactly where its label says
    return (
        (center + shift * tight_size[:, None]).astype(np.float32),
        (tight_size * scale).astype(np.float32),
    )


def _cut(clip: Clip, index: np.ndarray, network_from_stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (T, 3, 256, 256) and masks (T, 256, 256), uint8, warped from the stored crops."""
    images = np.empty((len(index), 3, CROP_PX, CROP_PX), dtype=np.uint8)
    masks = np.empty((len(index), CROP_PX, CROP_PX), dtype=np.uint8)
    for i, (frame, affine) in enumerate(zip(index, network_from_stored, strict=True)):
        cut_image(_decoded(clip, "frames", int(frame), 3), affine, images[i])
        cut_mask(_decoded(clip, "masks", int(frame), 2), affine, masks[i])
    return images, masks


def _decoded(clip: Clip, field: str, frame: int, dimensions: int) -> np.ndarray:
    try:
        image = getattr(clip, field).decode(frame)
    except ClipError as error:
        raise ClipError(f"clip {clip.key}: {field}: {error}") from error
    if image.ndim != dimensions:
        raise ClipError(f"clip {clip.key}: {field}: frame {frame} must have {dimensions} dimensions, got {image.shape}")
    return image


def _recolour(images: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> None:
    """Change the colours of a clip's images in place, the same way in every frame (one table look-up per channel)."""
    if not (augmentation.brightness or augmentation.contrast or augmentation.gamma or augmentation.channel_gain):
        return
    brightness, contrast, gamma = 1 + np.array(
        [augmentation.brightness, augmentation.contrast, augmentation.gamma]
    ) * rng.uniform(-1, 1, 3)
    gain = brightness * (1 + augmentation.channel_gain * rng.uniform(-1, 1, 3))
    level = np.linspace(0, 1, 256)
    level = np.clip(contrast * (level - 0.5) + 0.5, 0, 1) ** gamma
    table = np.clip(np.rint(255 * gain[:, None] * level), 0, 255).astype(np.uint8)
    for frame in images:
        for channel, values in zip(frame, table, strict=True):
            cv2.LUT(channel, values, dst=channel)


def _occlude(images: np.ndarray, masks: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> None:
    """Cover part of some frames in place by a rectangle of one colour or of noise; it is background in the mask."""
    if not augmentation.occlusion:
        return
    for image, mask in zip(images, masks, strict=True):
        if rng.random() >= augmentation.occlusion:
            continue
        height, width = (CROP_PX * rng.uniform(_SMALLEST_OCCLUDER, augmentation.occlusion_size, 2)).astype(int)
        top, left = rng.integers(0, (CROP_PX - height + 1, CROP_PX - width + 1))
        where = np.s_[top : top + height, left : left + width]
        if rng.random() < 0.5:
            fill = rng.integers(0, 256, (3, 1, 1), dtype=np.uint8)
        else:
            fill = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
        image[:, where[0], where[1]] = fill
        mask[where] = MASK_BACKGROUND
