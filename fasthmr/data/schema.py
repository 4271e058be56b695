"""The record of one clip: everything that the field's models need to know about one tracked person's frames."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import cv2
import numpy as np

from fasthmr.conventions import JOINTS29, MASK_OTHER, NUM_BETAS, NUM_JOINTS
from fasthmr.data.headers import image_shape

#: raised whenever a field is added, removed or changes its meaning.
SCHEMA_VERSION = 2
#: versions that are read; version 1 had no `gender`, and all its clips are neutral. Others are refused.
READ_VERSIONS = (1, 2)
MIN_CROP_PX = 384
MAX_IMAGE_PX = 8192
MAX_FPS = 10_000

Status = Literal["ground_truth", "pseudo", "missing"]
Gender = Literal["neutral", "male", "female"]
#: the fields that can be ground truth, somebody's estimate, or absent (then they hold zeros).
LABELS = ("joints2d", "joints3d", "pose", "betas", "translation", "masks", "intrinsics")


class ClipError(ValueError):
    """A clip breaks the schema; the message names clip, field, what is wanted and what was found."""


@dataclass(frozen=True)
class PackedImages:
    """Encoded images behind one another in one string of bytes.

    Training decodes a few frames of a clip: with offsets it reads the clip in one go and decodes only those
    (docs/shards.md has the measurements).

    Args:
        data: the encoded images.
        offsets: (T+1,) int64; image i is `data[offsets[i]:offsets[i+1]]`.
    """

    data: bytes
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        """Image `index`, encoded."""
        return self.data[self.offsets[index] : self.offsets[index + 1]]

    def decode(self, index: int) -> np.ndarray:
        """Image `index`: (H,W,3) uint8 RGB, or (H,W) uint8 where it was stored so.

        Raises:
            ClipError: the bytes are no image.
        """
        encoded = self[index]
        try:
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED) if encoded else None
        except cv2.error:  # a header that promises more pixels than OpenCV allows
            image = None
        if image is None:
            raise ClipError(f"frame {index} cannot be decoded ({len(encoded)} bytes): the file is damaged")
        return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    @classmethod
    def encode_jpeg(cls, images: Iterable[np.ndarray], quality: int = 90) -> PackedImages:
        """Pack (H,W,3) uint8 RGB images as JPEG."""
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality]
        return cls._pack(cv2.imencode(".jpg", cv2.cvtColor(i, cv2.COLOR_RGB2BGR), flags)[1].tobytes() for i in images)

    @classmethod
    def encode_png(cls, labels: Iterable[np.ndarray]) -> PackedImages:
        """Pack (H,W) uint8 label maps as PNG, which keeps them exact."""
        flags = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # label maps are nearly as small at the fastest level
        return cls._pack(cv2.imencode(".png", i, flags)[1].tobytes() for i in labels)

    @classmethod
    def _pack(cls, encoded: Iterable[bytes]) -> PackedImages:
        parts = list(encoded)
        return cls(b"".join(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64))


@dataclass(frozen=True)
class Clip:
    """One tracked person's clip of T frames.

    Pixels have their centres at integers (OpenCV's convention). The camera looks along +z, x right, y down. A label
    that `status` calls missing holds zeros.

    Args:
        key: unique in a set; letters, digits, `_` and `-` only, because it names files.
        source: where the clip came from, for people.
        fps: frames per second.
        body: id of the body that pose, betas, translation and joints belong to; None without SMPL labels.
        image_size: (2,) width and height of the full image, px.
        intrinsics: (3,3) of the full image, px.
        frames: T square RGB crops around the person, JPEG, at least 384 px wide.
        masks: T instance masks of the same crops, PNG: 0 background, 1 this person, 2 other people; visible pixels.
        crop_from_image: (T,2,3) full-image px -> crop px.
        box_center: (T,2) centre of the person's tight square box, full-image px.
        box_size: (T,) its side; the crop is wider, so that crops can be jittered.
        valid: (T,) frames whose labels may be used.
        joints2d: (T,29,3) full-image px and confidence in [0,1].
        joints3d: (T,29,4) camera frame, metres, and confidence.
        pose: (T,24,3) axis-angle, radians; the root in the camera frame.
        betas: (10,) shape.
        translation: (T,3) camera frame, metres: the pelvis is at rest_pelvis(betas) + translation.
        status: what each of LABELS is: ground truth, pseudo, or missing.
        full_frames: the T full images, JPEG, if they were kept.
        gender: which model of its family `body` is. Betas and translation of a gendered body mean nothing to the
            neutral one; pose and joints do.
    """

    key: str
    source: str
    fps: float
    body: str | None
    image_size: np.ndarray
    intrinsics: np.ndarray
    frames: PackedImages
    masks: PackedImages
    crop_from_image: np.ndarray
    box_center: np.ndarray
    box_size: np.ndarray
    valid: np.ndarray
    joints2d: np.ndarray
    joints3d: np.ndarray
    pose: np.ndarray
    betas: np.ndarray
    translation: np.ndarray
    status: dict[str, Status]
    full_frames: PackedImages | None = None
    gender: Gender = "neutral"

    def __len__(self) -> int:
        return len(self.frames)

    def validate(self) -> None:
        """Check every field; of the images only the headers, which costs a millisecond.

        Raises:
            ClipError: naming the clip, the field, what it must be and what it is.
        """
        texts: dict[str, Any] = {
            "key": str,
            "source": str,
            "fps": (int, float),
            "body": (str, type(None)),
            "status": dict,
            "gender": str,
        }
        for name, kind in texts.items():
            self._require(name, isinstance(getattr(self, name), kind), f"be {kind}", type(getattr(self, name)))
        # The key begins the names of tar members, which are 100 characters at most.
        self._require(
            "key", bool(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", self.key)), "be 1 to 80 letters, digits, _ or -", "it"
        )
        self._require("frames", len(self) > 0, "hold at least one frame", len(self))
        self._require("fps", 0 < self.fps <= MAX_FPS, f"be positive and at most {MAX_FPS}", self.fps)
        self._require("gender", self.gender in get_args(Gender), f"be one of {get_args(Gender)}", repr(self.gender))
        self._validate_arrays()
        self._validate_status()
        self._validate_headers()

    def _validate_arrays(self) -> None:
        frames, joints = len(self), len(JOINTS29)
        arrays: dict[str, tuple[tuple[int, ...], type]] = {
            "image_size": ((2,), np.int64),
            "intrinsics": ((3, 3), np.float32),
            "crop_from_image": ((frames, 2, 3), np.float32),
            "box_center": ((frames, 2), np.float32),
            "box_size": ((frames,), np.float32),
            "valid": ((frames,), np.bool_),
            "joints2d": ((frames, joints, 3), np.float32),
            "joints3d": ((frames, joints, 4), np.float32),
            "pose": ((frames, NUM_JOINTS, 3), np.float32),
            "betas": ((NUM_BETAS,), np.float32),
            "translation": ((frames, 3), np.float32),
        }
        for name, (shape, dtype) in arrays.items():
            array = getattr(self, name)
            what = f"be {np.dtype(dtype).name} of shape {shape}"
            self._require(name, array.shape == shape and array.dtype == dtype, what, f"{array.dtype} {array.shape}")
            self._require(name, bool(np.isfinite(array).all()), "be finite", "NaN or infinity")
        inside = bool(((self.image_size > 0) & (self.image_size <= MAX_IMAGE_PX)).all())
        self._require("image_size", inside, f"be from 1 to {MAX_IMAGE_PX} px", self.image_size.tolist())
        self._require("box_size", bool((self.box_size > 0).all()), "be positive", float(self.box_size.min()))
        for name in ("joints2d", "joints3d"):
            confidence = getattr(self, name)[..., -1]
            inside = bool(((confidence >= 0) & (confidence <= 1)).all())
            self._require(name, inside, "have confidences in [0,1]", [float(confidence.min()), float(confidence.max())])

    def _validate_status(self) -> None:
        self._require(
            "status", set(self.status) == set(LABELS), f"have exactly {LABELS}", sorted(map(str, self.status))
        )
        for name, value in self.status.items():
            self._require(f"status.{name}", value in get_args(Status), f"be one of {get_args(Status)}", repr(value))
            if value == "missing" and name != "masks":
                self._require(
                    name, not getattr(self, name).any(), "hold zeros, because its status is missing", "other numbers"
                )
        if self.body is None:
            labelled = [n for n in ("pose", "betas", "translation") if self.status[n] != "missing"]
            self._require("body", not labelled, f"be given, because {labelled} are labelled", None)

    def _validate_headers(self) -> None:
        crop_px = 0
        for name, images in self._images().items():
            self._require(name, len(images) == len(self), f"hold {len(self)} images", len(images))
            for number in range(len(images)):
                try:
                    shape = image_shape(images[number])
                except ValueError as error:
                    raise ClipError(f"clip {self.key}: {name}[{number}] {error}") from error
                if name == "full_frames":
                    want: tuple[int, ...] = (int(self.image_size[1]), int(self.image_size[0]), 3)
                else:
                    crop_px = crop_px or shape[0]
                    what = f"be {MIN_CROP_PX} to {MAX_IMAGE_PX} px wide"
                    self._require(f"{name}[{number}]", MIN_CROP_PX <= crop_px <= MAX_IMAGE_PX, what, crop_px)
                    want = (crop_px, crop_px, 3) if name == "frames" else (crop_px, crop_px)
                self._require(f"{name}[{number}]", shape == want, f"have shape {want}", shape)

    def check_images(self) -> None:
        """Decode every image, and check the numbers in the masks.

        Raises:
            ClipError: naming clip, field and frame.
        """
        for name, images in self._images().items():
            for number in range(len(images)):
                try:
                    image = images.decode(number)
                except ClipError as error:
                    raise ClipError(f"clip {self.key}: {name}: {error}") from error
                if name == "masks":
                    what = f"hold instances 0 to {MASK_OTHER}"
                    self._require(f"masks[{number}]", image.max() <= MASK_OTHER, what, int(image.max()))

    def _images(self) -> dict[str, PackedImages]:
        """The images that the clip has, by field."""
        fields = {"frames": self.frames, "masks": self.masks, "full_frames": self.full_frames}
        return {name: images for name, images in fields.items() if images is not None}

    def _require(self, field: str, holds: bool, what: str, got: object) -> None:
        if not holds:
            raise ClipError(f"clip {self.key}: {field} must {what}, got {got}")


ARRAYS = tuple(f.name for f in fields(Clip) if f.type == "np.ndarray")
