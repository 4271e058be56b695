"""A track: one person's labels and pictures as a foreign set has them; and how it becomes a clip."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from fasthmr.body import BodyModel
from fasthmr.conventions import JOINTS29, NUM_BETAS, NUM_JOINTS
from fasthmr.data.convert.reading import ConvertError, Picture, read_picture, text
from fasthmr.data.crops import STORED_SCALE, cut_stored
from fasthmr.data.schema import LABELS, Clip, Gender, PackedImages, Status
from fasthmr.data.shards import Dropped
from fasthmr.geometry.boxes import crop_affine, square_box
from fasthmr.geometry.rotations import axis_angle_to_matrix

#: a person who shows less than this is not in the picture
_SMALLEST_BOX_PX = 4.0
#: a person is about so much larger than the box of the joints
_BOX_OVER_JOINTS = 1.15
#: nearer points are behind the camera, or in it
_NEAREST_M = 0.05
#: frames posed at once, to bound the memory for vertices
_POSED_AT_ONCE = 64
#: a clip's key has 80 characters at most, and a part's number takes six
_LONGEST_KEY = 74
#: betas that differ by less are the same
_SAME_BETA = 1e-5

#: why a frame stays in its clip with `valid` off; the first one that applies
UNUSABLE_FRAME = "the set says so, or they hold NaN"
_CAMERA, _BEHIND, _AWAY = "the camera's rotation is none", "the person is behind the camera", "nobody in the picture"
#: what `Dropped` says of such frames, whether their clip is kept or they are all that it has
KEPT, LOST = "kept without labels", "left out with the clip"
OFF = re.compile(rf"(?P<fate>{KEPT}|{LOST}): (?P<times>\d+) frames: (?P<reason>[^:]*): (?P<key>.*)")
BAD_PICTURE = "a picture or mask that cannot be used"

#: what sets that use whole words call them
GENDERS: dict[str, Gender] = {"neutral": "neutral", "male": "male", "female": "female"}

_ARRAYS: dict[str, tuple[int, ...]] = {
    "intrinsics": (3, 3),
    "pose": (NUM_JOINTS, 3),
    "betas": (NUM_BETAS,),
    "translation": (3,),
    "pelvis": (3,),
    "cam_from_world": (4, 4),
    "joints2d": (len(JOINTS29), 3),
    "joints3d": (len(JOINTS29), 4),
    "center": (2,),
    "size": (),
}


#: what a clip stores of them, and of these what it has one of
_STORED = ("joints2d", "joints3d", "pose", "translation", "betas", "intrinsics")
_OF_A_CLIP = ("betas", "intrinsics")


@dataclass(frozen=True)
class Track:
    """One person's T frames. Every array begins with T, is float64, and may hold NaN in frames without that label.

    Args:
        key: unique in the set; letters, digits, `_` and `-`.
        source: where it came from, for people.
        fps: frames per second.
        pictures: T full images.
        valid: (T,) frames whose labels may be used, as far as the set says.
        gender: which body of its family the labels belong to.
        quarter_turns: clockwise turns by 90 degrees that bring the stored pictures upright, as the labels are.
        intrinsics: (T,3,3) px.
        pose: (T,24,3) axis-angle.
        betas: (T,10).
        translation: (T,3) metres, as the body takes it: the pelvis is at rest_pelvis(betas) + translation.
        pelvis: (T,3) metres, instead of `translation`: where the pelvis is.
        cam_from_world: (T,4,4); if given, pose, translation and pelvis are in its world, else in the camera frame.
        joints2d: (T,29,3) px and confidence; None: the 3D joints, projected.
        joints3d: (T,29,4) camera frame, metres, and confidence; None: the body's.
        center, size: (T,2), (T,) tight square box of the person, px; None: that of the body's mesh.
        mask: frame -> (H,W) uint8 instances of the upright picture; None: the set has no masks.
        status: of labels that are given and not ground truth.
    """

    key: str
    source: str
    fps: float
    pictures: Sequence[Picture]
    valid: np.ndarray
    gender: Gender = "neutral"
    quarter_turns: int = 0
    intrinsics: np.ndarray | None = None
    pose: np.ndarray | None = None
    betas: np.ndarray | None = None
    translation: np.ndarray | None = None
    pelvis: np.ndarray | None = None
    cam_from_world: np.ndarray | None = None
    joints2d: np.ndarray | None = None
    joints3d: np.ndarray | None = None
    center: np.ndarray | None = None
    size: np.ndarray | None = None
    mask: Callable[[int], np.ndarray] | None = None
    status: Mapping[str, Status] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tail in _ARRAYS.items():
            array = getattr(self, name)
            if array is not None and array.shape != (len(self), *tail):
                raise ConvertError(f"{self.key}: {name} must have shape {(len(self), *tail)}, got {array.shape}")

    def __len__(self) -> int:
        return len(self.pictures)

    def labelled(self) -> np.ndarray:
        """(T,) frames whose labels may be used: the set says so, and all are finite."""
        valid = self.valid.copy()
        for name in _ARRAYS.keys() - {"center", "size"}:  # a frame without a box may have its mesh's
            array = getattr(self, name)
            if array is not None:
                valid &= np.isfinite(array).reshape(len(self), -1).all(1)
        return valid

    def given(self) -> dict[str, np.ndarray]:
        """The labels that there are, by name, with zeros for what is not finite and confidences from 0 to 1."""
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        arrays = {name: np.where(np.isfinite(array), array, 0.0) for name, array in arrays.items()}
        if self.center is not None and self.size is not None:  # a box that is nowhere is none
            arrays["size"] = np.where(np.isfinite(self.center).all(1), arrays["size"], 0.0)
        for name in {"joints2d", "joints3d"} & arrays.keys():
            arrays[name][..., -1] = np.clip(arrays[name][..., -1], 0, 1)
        return arrays

    def part(self, first: int, last: int) -> Track:
        """Frames `first` to `last` (exclusive), as a track of its own."""
        if (first, last) == (0, len(self)):
            return self
        mask = self.mask
        arrays = {n: getattr(self, n)[first:last] for n in _ARRAYS if getattr(self, n) is not None}
        return replace(
            self,
            key=f"{self.key}_{first:05d}",
            pictures=self.pictures[first:last],
            valid=self.valid[first:last],
            mask=None if mask is None else lambda frame: mask(first + frame),
            **arrays,
        )

    def pieces(self, longest: int, usable: np.ndarray) -> Iterator[tuple[int, int]]:
        """Runs of frames that can be clips: all usable, one camera, at most `longest` frames (0: any number)."""
        breaks = np.diff(usable.astype(int)) != 0
        if self.intrinsics is not None:
            breaks |= (np.abs(np.diff(self.intrinsics, axis=0)) > 1e-6).any((1, 2))
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self)]
        for first, last in pairwise(edges):
            if usable[first]:
                step = longest or last - first
                yield from ((i, min(i + step, last)) for i in range(first, last, step))


class Tracks(Protocol):
    """Tracks by number; all there at once, or made when they are asked for.

    Attributes:
        unlabelled: names of pictures that come with the labels, but have none themselves.
    """

    @property
    def unlabelled(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Track:
        """Track `number`.

        Raises:
            ConvertError: its labels cannot be used; the other tracks can.
        """
        ...


class TrackList(list[Track]):
    """Tracks that are all there at once."""

    def __init__(self, tracks: Iterable[Track], unlabelled: Sequence[str] = ()) -> None:
        super().__init__(tracks)
        self.unlabelled = unlabelled


def gender_of(value: Any, genders: Mapping[str, Gender], where: str) -> Gender:
    """What a set's word for a gender means.

    Raises:
        ConvertError: it is none of `genders`.
    """
    if (word := text(value)) not in genders:
        raise ConvertError(f"{where}: gender must be one of {', '.join(genders)}, got {word!r}")
    return genders[word]


def clean_key(name: str) -> str:
    """A name as a clip's key: what is not allowed in one becomes `-`; a long one ends in a checksum of itself."""
    key = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    if len(key) <= _LONGEST_KEY:
        return key
    return f"{key[: _LONGEST_KEY - 9]}-{zlib.crc32(name.encode()):08x}"


def square_of_corners(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (T,4) x0 y0 x1 y1 -> centre (T,2) and side (T,) of the square around each, px."""
    low, high = corners[:, :2], corners[:, 2:]
    return (low + high) / 2, (high - low).max(1)


@dataclass(frozen=True)
class Crops:
    """How crops are stored: side in px, JPEG quality."""

    crop_px: int = 384
    jpeg_quality: int = 90


def make_clips(
    track: Track, first: int, last: int, root: Path, bodies: Mapping[Gender, BodyModel], crops: Crops
) -> list[Clip | Dropped]:
    """Read the pictures of frames `first` to `last` (exclusive) of a track and make a clip of them.

    A picture or mask that cannot be used costs its frame: it cuts the clip in two, as one that is missing would. All
    pictures of such a clip are read once more, to find every one of them.

    Returns:
        Clips, and what was left out.
    """
    part = track.part(first, last)
    try:
        return _make_clip(part, root, bodies, crops)
    except ConvertError:
        harm = [_harm(part, frame, root) for frame in range(len(part))]
        left_out = [Dropped(f"{BAD_PICTURE}: {why}") for why in harm if why]
        pieces = part.pieces(0, np.array([not why for why in harm]))
        clips = [_make_clip(track.part(first + start, first + end), root, bodies, crops) for start, end in pieces]
        return [*chain.from_iterable(clips), *left_out]


def _harm(track: Track, frame: int, root: Path) -> str:
    """What is wrong with a picture or its mask; empty if nothing is."""
    try:
        _mask(track, frame, _upright(root, track, frame))
    except ConvertError as error:
        return f"{track.key}, frame {frame}: {error}"
    return ""


def _make_clip(track: Track, root: Path, bodies: Mapping[Gender, BodyModel], crops: Crops) -> list[Clip | Dropped]:
    """The clip of a track, and which of its frames are off; no clip if all are.

    Raises:
        ConvertError: a picture or mask cannot be used.
    """
    first = _upright(root, track, 0)
    labels = _Labels.of(track, bodies, np.array([first.shape[1], first.shape[0]]))
    fate = KEPT if labels.valid.any() else LOST
    off = [Dropped(f"{fate}: {times} frames: {why}: {track.key}") for why, times in labels.off.items()]
    if not labels.valid.any():
        return [*off]
    crop_from_image = crop_affine(labels.center, STORED_SCALE * labels.size, crops.crop_px)
    images, masks = [], []
    for frame in range(len(track)):
        image = _upright(root, track, frame) if frame else first
        if image.shape != first.shape:
            return [Dropped(f"pictures of different sizes: {track.key}: {first.shape[:2]} and {image.shape[:2]} px")]
        images.append(cut_stored(image, crop_from_image[frame], crops.crop_px))
        mask = _mask(track, frame, image)
        side = (crops.crop_px, crops.crop_px)
        masks.append(cv2.warpAffine(mask, crop_from_image[frame], side, flags=cv2.INTER_NEAREST))
    clip = Clip(
        key=track.key,
        source=track.source,
        fps=track.fps,
        body=labels.body,
        image_size=np.array([first.shape[1], first.shape[0]], np.int64),
        frames=PackedImages.encode_jpeg(images, crops.jpeg_quality),
        masks=PackedImages.encode_png(masks),
        crop_from_image=crop_from_image.astype(np.float32),
        box_center=labels.center.astype(np.float32),
        box_size=labels.size.astype(np.float32),
        valid=labels.valid,
        gender=track.gender,
        **labels.arrays,
        status=labels.status,
        full_frames=None,
    )
    return [clip, *off]


def _upright(root: Path, track: Track, frame: int) -> np.ndarray:
    return np.rot90(read_picture(root, track.pictures[frame]), -track.quarter_turns)


def _mask(track: Track, frame: int, image: np.ndarray) -> np.ndarray:
    """The mask (H,W) uint8 of a picture (H,W,3); without anybody if the set has none."""
    if track.mask is None:
        return np.zeros(image.shape[:2], np.uint8)
    mask = track.mask(frame)
    if mask.shape != image.shape[:2]:
        (height, width), (high, wide) = mask.shape, image.shape[:2]
        raise ConvertError(f"the mask is {width}x{height} px, the picture {wide}x{high}")
    return mask


# ---- labels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Labels:
    """A clip's labels in the camera frame. `off`: why frames are not valid -> how many."""

    body: str | None
    arrays: dict[str, np.ndarray]
    status: dict[str, Status]
    valid: np.ndarray
    off: dict[str, int]
    center: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, track: Track, bodies: Mapping[Gender, BodyModel], image_size: np.ndarray) -> _Labels:
        given, valid = track.given(), track.labelled()
        stages = [(UNUSABLE_FRAME, valid)]
        status: dict[str, Status] = {name: track.status.get(name, "ground_truth") for name in LABELS}
        body = bodies[track.gender] if {"pose", "betas"} & given.keys() else None
        given, proper = _in_camera(given, len(track))
        stages.append((_CAMERA, valid := valid & proper))
        if "betas" in given and body is not None:
            known = given["betas"][valid] if valid.any() else given["betas"]
            status["betas"] = status["betas"] if np.ptp(known, axis=0).max() < _SAME_BETA else "pseudo"
            given = _one_shape(given, known.mean(0), body)
        else:  # without a shape there is no rest pelvis to count from
            given.pop("translation", None)
        vertices = None
        if body is not None and {"pose", "betas", "translation"} <= given.keys():
            without_box = "size" not in given or bool((given["size"] < _SMALLEST_BOX_PX).any())
            joints, vertices = _posed(given, body, with_vertices=without_box)
            stages.append((_BEHIND, valid := valid & (joints[:, :, 2].min(1) > _NEAREST_M)))
            given.setdefault("joints3d", np.concatenate([joints, np.ones((*joints.shape[:2], 1))], -1))
        if {"joints3d", "intrinsics"} <= given.keys() and "joints2d" not in given:
            pixels = _projected(given["joints3d"][..., :3], given["intrinsics"])
            inside = ((pixels >= 0) & (pixels <= image_size - 1)).all(-1) & (given["joints3d"][..., 2] > _NEAREST_M)
            confidence = inside * given["joints3d"][..., 3]
            given["joints2d"] = np.concatenate([pixels, confidence[..., None]], -1)
        center, size, seen = _boxes(given, vertices, image_size)
        stages.append((_AWAY, valid := valid & seen))
        frames = len(track)
        left = [frames, *(int(still.sum()) for _, still in stages)]
        off = {why: a - b for (why, _), (a, b) in zip(stages, pairwise(left), strict=True) if a > b}
        arrays = {}
        for name in _STORED:
            if name not in given:
                status[name] = "missing"
            value = given.get(name, np.zeros((frames, *_ARRAYS[name])))
            arrays[name] = (value[int(valid.argmax())] if name in _OF_A_CLIP else value).astype(np.float32)
        status["masks"] = "missing" if track.mask is None else status["masks"]
        return cls(body.id if body else None, arrays, status, valid, off, *_filled(center, size, valid))


def _in_camera(given: dict[str, np.ndarray], frames: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Root rotation turned into the camera frame, and (T,) where that is possible. Translations follow in `_one_shape`,
    which knows the pelvis."""
    given = dict(given)
    if "cam_from_world" not in given:
        return given, np.ones(frames, bool)
    turn = given["cam_from_world"][:, :3, :3]
    proper = np.abs(turn @ turn.swapaxes(1, 2) - np.eye(3)).max((1, 2)) < 1e-2
    proper &= np.linalg.det(turn) > 0
    given["cam_from_world"] = np.where(proper[:, None, None], given["cam_from_world"], np.eye(4))
    turn = given["cam_from_world"][:, :3, :3]
    if "pose" in given:
        pose = given["pose"].copy()
        pose[:, 0] = (Rotation.from_matrix(turn) * Rotation.from_rotvec(pose[:, 0])).as_rotvec()
        given["pose"] = pose
    return given, proper


def _one_shape(given: dict[str, np.ndarray], mean: np.ndarray, body: BodyModel) -> dict[str, np.ndarray]:
    """One shape (10,) a clip, and the translation in the camera frame that leaves the pelvis where it was.

    The body turns about its pelvis j0, not about the origin: with camera R, T the pelvis moves from j0 + t to
    R (j0 + t) + T, so the new translation is R (j0 + t) + T - j0. Where a set's shape differs from frame to frame
    (fits to single pictures), the clip's is the mean, and the mean's j0 is taken off.
    """
    given = dict(given)
    betas = given["betas"]
    pelvis = given.pop("pelvis", None)
    if pelvis is None and "translation" in given:
        pelvis = _rest_pelvis(body, betas) + given["translation"]
    given["betas"] = np.broadcast_to(mean, betas.shape)
    if pelvis is not None:
        if "cam_from_world" in given:
            camera = given["cam_from_world"]
            pelvis = np.einsum("tij,tj->ti", camera[:, :3, :3], pelvis) + camera[:, :3, 3]
        given["translation"] = pelvis - _rest_pelvis(body, mean[None])
    return given


def _rest_pelvis(body: BodyModel, betas: np.ndarray) -> np.ndarray:
    """(N,10) -> (N,3) metres."""
    with torch.no_grad():
        return body.rest_joints(torch.from_numpy(betas.astype(np.float32)))[:, 0].numpy().astype(np.float64)


def _posed(
    given: dict[str, np.ndarray], body: BodyModel, with_vertices: bool
) -> tuple[np.ndarray, list[np.ndarray] | None]:
    """Joints (T,29,3), and if wanted every fifth vertex of each frame (boxes need no more)."""
    joints, vertices = [], []
    with torch.no_grad():
        for i in range(0, len(given["pose"]), _POSED_AT_ONCE):
            rows = slice(i, i + _POSED_AT_ONCE)
            rotations = axis_angle_to_matrix(torch.from_numpy(given["pose"][rows])).float()
            betas, translation = (
                torch.from_numpy(np.array(given[n][rows], dtype=np.float32)) for n in ("betas", "translation")
            )
            if with_vertices:
                posed = body(rotations, betas, translation)
                vertices += list(posed.vertices[:, ::5].numpy())
                joints.append(posed.joints29.numpy())
            else:
                joints.append(body.joints29(rotations, betas, translation).numpy())
    return np.concatenate(joints), vertices if with_vertices else None


def _projected(points: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """(T,N,3) camera frame, (T,3,3) -> (T,N,2) px."""
    homogeneous = points @ intrinsics.swapaxes(-1, -2)
    return homogeneous[..., :2] / np.maximum(homogeneous[..., 2:], _NEAREST_M)


def _boxes(
    given: dict[str, np.ndarray], vertices: list[np.ndarray] | None, image_size: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre (T,2), side (T,), and whether the person shows (T,): the set's own box, or what shows of the mesh, or of
    the labelled joints."""
    frames = len(next(iter(given.values())))
    center, size = np.zeros((frames, 2)), np.zeros(frames)
    if "size" in given and "center" in given:
        center, size = given["center"].copy(), given["size"].copy()
    for frame in np.flatnonzero(size < _SMALLEST_BOX_PX):
        if vertices is not None and "intrinsics" in given:
            shown = _inside(_projected(vertices[frame], given["intrinsics"][frame]), image_size)
            if len(shown):
                center[frame], size[frame] = square_box(shown)
        elif "joints2d" in given:  # few: the box reaches towards those that do not show, as the person does
            points = given["joints2d"][frame][given["joints2d"][frame, :, 2] > 0, :2]
            shown = _inside(points, image_size)
            enough = len(shown) > 1 and np.ptp(shown, axis=0).max() >= _SMALLEST_BOX_PX
            if enough or _surround(points, image_size):  # or it would be a box on the picture's edge
                center[frame], size[frame] = square_box(np.clip(points, 0, image_size - 1), _BOX_OVER_JOINTS)
    overlap = (center + size[:, None] / 2 > 0) & (center - size[:, None] / 2 < image_size - 1)
    return center, size, (size >= _SMALLEST_BOX_PX) & overlap.all(-1)


def _inside(points: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Those of the points (N,2) px that lie in the picture."""
    return points[((points >= 0) & (points <= image_size - 1)).all(1)]


def _surround(points: np.ndarray, image_size: np.ndarray) -> bool:
    """Whether the whole picture lies within the outline of points (N,2) px, as of a person who fills it."""
    if len(points) < 3:
        return False
    outline = cv2.convexHull(points.astype(np.float32))
    corners = np.array([(0, 0), (0, 1), (1, 0), (1, 1)]) * (image_size - 1.0)
    return all(cv2.pointPolygonTest(outline, corner.tolist(), False) >= 0 for corner in corners)


def _filled(center: np.ndarray, size: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of frames that are not valid are those of the nearest valid frame: they hold pictures, not labels."""
    known = np.flatnonzero(valid)
    if not len(known):
        return center, np.maximum(size, 1.0)
    nearest = known[np.abs(np.arange(len(valid))[:, None] - known).argmin(1)] if len(known) < len(valid) else known
    return center[nearest], size[nearest]
