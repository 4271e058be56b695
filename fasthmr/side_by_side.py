"""A clip and what several systems make of it, side by side: as an mp4, and in TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fasthmr.body import BodyModel, require_same_body
from fasthmr.conventions import CROP_PX, NUM_BETAS, NUM_JOINTS, PELVIS
from fasthmr.data.batch import ClipSample
from fasthmr.data.schema import Clip
from fasthmr.data.transforms import Augmentation, make_sample
from fasthmr.geometry.cameras import predicted_lens
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.render.overlay import overlay_mesh, side_view
from fasthmr.video.writing import written_video

_TRUTH_COLOR = (0.60, 0.85, 0.60)
#: of the systems in turn
_COLORS = ((0.95, 0.65, 0.35), (0.55, 0.75, 0.95), (0.85, 0.60, 0.85), (0.90, 0.85, 0.45))
_NAME_PX, _FONT_PX, _SMALLEST_FONT_PX = 24, 16, 8
#: flesh around the outermost joints
_MARGIN_M = 0.15
#: frames whose meshes are made at a time
_MESHES = 32


@dataclass(frozen=True)
class PosedMotion:
    """What a system says about the T frames of a clip.

    Attributes:
        rotations: (T, 24, 3, 3), the root in the camera frame.
        betas: (T, 10).
        camera: (T, 3) of the network's crop, as of `HMROutput`.
        valid: (T,) bool, frames in which there is something to draw.
        full_image: whether `camera` counts on the full image's lens, as CameraHMR's does, or on one of the crop's own,
            as HMR2.0's.

    Raises:
        ValueError: a shape is wrong.
    """

    rotations: Tensor
    betas: Tensor
    camera: Tensor
    valid: Tensor
    full_image: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        frames = len(self.rotations)
        shapes = {"rotations": (NUM_JOINTS, 3, 3), "betas": (NUM_BETAS,), "camera": (3,), "valid": ()}
        for name, shape in shapes.items():
            if (got := tuple(getattr(self, name).shape)) != (frames, *shape):
                raise ValueError(f"{name} must have shape {(frames, *shape)}, got {got}")

    def __len__(self) -> int:
        return len(self.rotations)


def side_by_side(
    clip: Clip, columns: Mapping[str, PosedMotion], body: BodyModel, true_body: BodyModel | None = None
) -> Iterator[np.ndarray]:
    """Frames of the video: the network's crop, then each system's mesh over the crop; below, the same from the side.

    Below the crop is the true mesh, where the clip has one. From the side all frames and all systems have
    one scale, and the pelvis stays where it is: what trembles there is the pose.

    Args:
        clip: the frames.
        columns: systems by the name that is written over them; each of as many frames as the clip.
        body: that the systems are of.
        true_body: that the clip's labels are of, where they are of another one, such as a gendered one.

    Yields:
        T pictures (H, W, 3) uint8 RGB, of even height and width.

    Raises:
        ValueError: a system has another number of frames.
        BodyMismatchError: the clip's labels are of another body.
        ClipError: a frame is damaged.
    """
    true_body = true_body or body
    if clip.body is not None:
        require_same_body(true_body.id, clip.body, where=f"clip {clip.key}")
    for name, motion in columns.items():
        if len(motion) != len(clip):
            raise ValueError(f"{name!r} must have the clip's {len(clip)} frames, got {len(motion)}")
    return _frames(clip, columns, body, true_body)


def write_side_by_side(
    path: Path,
    clip: Clip,
    columns: Mapping[str, PosedMotion],
    body: BodyModel,
    true_body: BodyModel | None = None,
    fps: float | None = None,
) -> None:
    """Write `side_by_side` as an mp4, at `fps` frames a second or at the clip's own rate.

    Raises:
        ValueError, ClipError: as for `side_by_side`.
        OSError: it cannot be written; nothing half-written stays.
    """
    with written_video(path, fps or clip.fps) as add:
        for frame in side_by_side(clip, columns, body, true_body):
            add(frame)


def log_video(writer: SummaryWriter, tag: str, frames: Iterable[np.ndarray], fps: float, step: int) -> None:
    """Show frames (H, W, 3) uint8 RGB as a moving picture under TensorBoard's images.

    What `SummaryWriter.add_video` does, which needs moviepy and the program ffmpeg to encode the same GIF.
    """
    # One frame's colours each, and no dithering: it would flicker.
    pictures = [Image.fromarray(f).quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for f in frames]
    encoded = io.BytesIO()
    duration_ms = round(1000 / fps)
    pictures[0].save(encoded, "GIF", save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0)
    width, height = pictures[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _frames(
    clip: Clip, columns: Mapping[str, PosedMotion], body: BodyModel, true_body: BodyModel
) -> Iterator[np.ndarray]:
    truth = _true_motion(clip)
    systems = [(motion, body) for motion in columns.values()] + ([] if truth is None else [(truth, true_body)])
    extent_m = _extent(systems)
    titles = _titles(["input", *columns])
    subtitles = _titles(["" if truth is None else "ground truth, from the side", *["from the side"] * len(columns)])
    for first in range(0, len(clip), _MESHES):
        index = np.arange(first, min(first + _MESHES, len(clip)))
        sample = make_sample(clip, index, np.random.default_rng(0), Augmentation.off())
        meshes = [_meshes(motion, sample, its_body) for motion, its_body in systems]
        for place, image in enumerate(sample.images.transpose(0, 2, 3, 1)):
            over, beside = [image], []
            if truth is None:
                beside.append(np.full_like(image, 255))
            else:
                beside.append(_side_panel(meshes[-1], place, extent_m, _TRUTH_COLOR))
            for number in range(len(columns)):
                color = _COLORS[number % len(_COLORS)]
                over.append(_overlay_panel(image, meshes[number], place, color))
                beside.append(_side_panel(meshes[number], place, extent_m, color))
            yield np.concatenate([titles, np.hstack(over), subtitles, np.hstack(beside)])


@dataclass(frozen=True)
class _Meshes:
    """A system's meshes in N frames, turned as the camera sees them; `shift` moves them to where it does, metres."""

    vertices: np.ndarray  # (N, V, 3)
    pelvis: np.ndarray  # (N, 3)
    shift: np.ndarray  # (N, 3)
    focal: np.ndarray  # (N,) of the camera, px of the crop
    center: np.ndarray  # (N, 2) its principal point, px of the crop
    faces: np.ndarray  # (F, 3)
    valid: np.ndarray  # (N,)


@torch.no_grad()
def _meshes(motion: PosedMotion, sample: ClipSample, body: BodyModel) -> _Meshes:
    index = sample.frame_index
    rotations, betas = (t[index].float().to(body.faces.device) for t in (motion.rotations, motion.betas))
    posed = body(rotations, betas)
    center, size, intrinsics = map(torch.tensor, (sample.box_center, sample.box_size, sample.intrinsics))
    lens, shift = predicted_lens(motion.camera[index].float(), center, size, intrinsics, motion.full_image)
    parts = (posed.vertices, posed.joints[:, PELVIS], shift, *lens, body.faces, motion.valid[index])
    return _Meshes(*(part.cpu().numpy() for part in parts))


def _overlay_panel(image: np.ndarray, meshes: _Meshes, place: int, color: tuple[float, float, float]) -> np.ndarray:
    if not meshes.valid[place]:
        return image
    vertices, (x, y) = meshes.vertices[place] + meshes.shift[place], meshes.center[place].tolist()
    return overlay_mesh(image, vertices, meshes.faces, float(meshes.focal[place]), (x, y), color)


def _side_panel(meshes: _Meshes, place: int, extent_m: float, color: tuple[float, float, float]) -> np.ndarray:
    if not meshes.valid[place]:
        return np.full((CROP_PX, CROP_PX, 3), 255, np.uint8)
    return side_view(meshes.vertices[place], meshes.faces, CROP_PX, color, meshes.pelvis[place], extent_m)


def _true_motion(clip: Clip) -> PosedMotion | None:
    """The clip's labels, if they are true, to be seen from the side only: the crop's camera is not known."""
    if clip.status["pose"] != "ground_truth":
        return None
    frames = len(clip)
    return PosedMotion(
        rotations=axis_angle_to_matrix(torch.from_numpy(clip.pose)),
        betas=torch.from_numpy(clip.betas).expand(frames, -1),
        camera=torch.ones(frames, 3),
        valid=torch.from_numpy(clip.valid),
    )


@torch.no_grad()
def _extent(systems: Iterable[tuple[PosedMotion, BodyModel]]) -> float:
    """Metres that the side view must show, with the pelvis in the middle, so that every mesh fits in."""
    reach_m = 0.5
    for system, body in systems:
        if bool(system.valid.any()):
            rotations, betas = (t[system.valid].float().to(body.faces.device) for t in (system.rotations, system.betas))
            joints = body.joints29(rotations, betas)
            reach_m = max(reach_m, float((joints - joints[:, :1])[..., 1:].abs().max()) + _MARGIN_M)
    return 2 * reach_m


def _titles(names: Iterable[str]) -> np.ndarray:
    """Names in a row, one above each panel: (24, n * 256, 3) uint8, dark on light grey; long ones in a smaller font."""
    bands = []
    for name in names:
        band = Image.new("RGB", (CROP_PX, _NAME_PX), (235, 235, 235))
        pen = ImageDraw.Draw(band)
        size = _FONT_PX
        while pen.textlength(name, ImageFont.load_default(size)) > CROP_PX - 8 and size > _SMALLEST_FONT_PX:
            size -= 1
        pen.text((CROP_PX / 2, _NAME_PX / 2), name, (30, 30, 30), ImageFont.load_default(size), anchor="mm")
        bands.append(np.asarray(band))
    return np.hstack(bands)
