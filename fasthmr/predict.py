"""Your own video: `python -m fasthmr.predict VIDEO --masks MASKS -o OUT`.

    python -m fasthmr.predict walk.mp4 --masks background -o out              the camera stands still, one person moves
    python -m fasthmr.predict walk.mp4 --masks masks.npz --focal_px 1500 -o out
    python -m fasthmr.predict frames/ --masks masks/ --fps 25 -o out          folders of pictures

VIDEO is a video file or a folder of pictures. MASKS say where the person is: a folder of pictures, an npz with `masks`
(T, H, W), a video, or `background`, which takes what differs from the background. Writes to the folder OUT:

    motion.npz           AMASS-style: poses, trans, betas, mocap_framerate, ... (docs/predict.md)
    frame_NNNNNN.glb     the mesh of one frame
    overlay.mp4          the mesh over the video; orange where the person was not seen
"""

from __future__ import annotations

import itertools
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from numpy.typing import ArrayLike
from tqdm import tqdm

from fasthmr.body import BodyModel
from fasthmr.checkpoint import load_human_fov
from fasthmr.cli import HelpFormatter
from fasthmr.conventions import MASK_SUBJECT
from fasthmr.files import written_whole
from fasthmr.motion_file import save_motion
from fasthmr.pipeline import MotionEstimate, PipelineConfig, estimate_intrinsics, load_pipeline
from fasthmr.render.glb import mesh_glb
from fasthmr.render.overlay import overlay_mesh
from fasthmr.render.raster import project_points
from fasthmr.video.background import StaticBackground
from fasthmr.video.reading import Frames, Masks, VideoError
from fasthmr.video.writing import written_video

#: weights that come with this package
_CHECKPOINT = "shipped:encoder_tiny+shipped:decoder_tiny"
_DEFAULT_FPS = 30.0
#: frames, about, in which the focal length is looked for
_LENS_FRAMES = 16
_COLOR = (0.55, 0.75, 0.95)
_INTERPOLATED_COLOR = (0.95, 0.65, 0.35)
#: frames whose meshes are made at a time
_MESHES = 32


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m fasthmr.predict", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("video", type=str, help="video file, or folder of pictures")
    parser.add_argument("--masks", type=str, required=True, help="folder, npz or video of masks, or `background`")
    parser.add_argument("--subject", type=int | None, default=None, help="label of the person in masks of labels")
    parser.add_argument(
        "--boxes", type=str | None, default=None, help="JSON list or npz `boxes` of x0, y0, x1, y1; else from the masks"
    )
    parser.add_argument(
        "--checkpoint",
        type=str,
        default=_CHECKPOINT,
        help="of a pipeline, of an encoder alone, or ENCODER+DECODER",
    )
    parser.add_argument("--fps", type=float | None, default=None, help="frames a second; else the video's, or 30")
    parser.add_argument("--focal_px", type=float | None, default=None, help="focal length; else the image's diagonal")
    parser.add_argument(
        "--human_fov", type=str | None, default=None, help="CameraHMR's network that sees the focal length in the video"
    )
    parser.add_argument("--body", type=str, default="free", help="`free`, or a body file in SMPL's format")
    parser.add_argument("--glb_frame", type=int, default=0, help="which frame's mesh to write")
    parser.add_argument(
        "--precision",
        type=str,
        default="auto",
        help="of the encoder: bf16, 32, or auto: bf16 if there are instructions",
    )
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda; the best there is if not given")
    parser.add_argument("-o", "--out", type=str, required=True, help="folder to write to")
    return parser


def predict(options: Namespace) -> MotionEstimate:
    """Do what the command line says.

    Raises:
        ValueError: bad input; nothing was written.
        OSError: a file cannot be read or written.
    """
    for name in ("fps", "focal_px"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} must be positive, got {value}")
    if options.focal_px is not None and options.human_fov is not None:
        raise ValueError("--focal_px and --human_fov both say what the focal length is: give one")
    if options.glb_frame < 0:
        raise ValueError(f"--glb_frame must be 0 or more, got {options.glb_frame}")
    config = PipelineConfig(precision=options.precision)
    frames = Frames(options.video)
    boxes = None if options.boxes is None else read_boxes(Path(options.boxes))
    pipeline = load_pipeline(options.checkpoint, options.body, config)
    pipeline.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    intrinsics = _intrinsics(options, frames, pipeline.device)
    masks: Iterable[np.ndarray]
    if options.masks == "background":
        background = StaticBackground.learn(_watched(frames, "learning the background", frames.expected))
        masks = map(background.person_mask, frames)
    else:
        masks = Masks(options.masks, options.subject)

    motion = pipeline(
        _watched(frames, "looking at frames", frames.expected),
        masks,
        boxes,
        fps=options.fps or frames.fps or _DEFAULT_FPS,
        intrinsics=intrinsics,
        subject=MASK_SUBJECT if options.subject is None else options.subject,
    )
    if options.glb_frame >= len(motion):
        raise ValueError(f"--glb_frame must be below the {len(motion)} frames of the video, got {options.glb_frame}")

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "motion.npz", out / f"frame_{options.glb_frame:06d}.glb", out / "overlay.mp4"]
    save_motion(files[0], motion, pipeline.body)
    shown = slice(options.glb_frame, options.glb_frame + 1)
    with written_whole(files[1]) as file:
        file.write(mesh_glb(_vertices(motion, pipeline.body, shown)[0], pipeline.body.faces.cpu().numpy()))
    with written_video(files[2], motion.fps) as add:
        for picture in draw_overlays(_watched(frames, "drawing", len(motion)), motion, pipeline.body):
            add(picture)
    print(f"written: {' '.join(map(str, files))} ({_summary(motion)})")
    return motion


def draw_overlays(frames: Iterable[np.ndarray], motion: MotionEstimate, body: BodyModel) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8 RGB of a motion with the mesh over the person."""
    faces = body.faces.cpu().numpy()
    focal_px = float(motion.intrinsics.diagonal()[:2].mean())
    center = (float(motion.intrinsics[0, 2]), float(motion.intrinsics[1, 2]))
    size = motion.image_size.numpy()
    vertices = np.empty((0, 0, 3), np.float32)
    for number, frame in enumerate(frames):
        place = number % _MESHES
        if place == 0:
            vertices = _vertices(motion, body, slice(number, number + _MESHES))
        color = _INTERPOLATED_COLOR if motion.interpolated[number] else _COLOR
        # Only the part of the picture that the mesh covers: 9 instead of 39 ms for a tall person in 1280 x 720.
        corners = project_points(vertices[place], focal_px, center)[:, :2]
        left, top = (int(v) for v in np.clip(np.floor(corners.min(0)), 0, size - 1))
        right, bottom = (int(v) for v in np.clip(np.ceil(corners.max(0)) + 1, 1, size))
        part = np.s_[top : max(bottom, top + 1), left : max(right, left + 1)]
        drawn = frame.copy()
        middle = (center[0] - left, center[1] - top)
        drawn[part] = overlay_mesh(frame[part], vertices[place], faces, focal_px, middle, color)
        yield drawn


def read_boxes(path: Path) -> np.ndarray:
    """Boxes (T, 4): a JSON list with `[x0, y0, x1, y1]` or null for each frame, or an npz with `boxes`, NaN for none.

    Raises:
        VideoError: it is neither.
        OSError: it cannot be read.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays["boxes"], np.float64)
        rows = json.loads(path.read_text())
        boxes = np.array([[np.nan] * 4 if row is None else row for row in rows], np.float64)
    except (ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise VideoError(f"{path} holds no boxes: {error}; a JSON list, or an npz with `boxes` (T, 4)") from error
    return boxes.reshape(-1, 4) if not len(boxes) else boxes


def _vertices(motion: MotionEstimate, body: BodyModel, frames: slice) -> np.ndarray:
    """(N, V, 3) metres, camera frame."""
    device = body.faces.device
    with torch.no_grad():
        posed = body(*(t[frames].to(device) for t in (motion.rotations, motion.betas, motion.translation)))
    return posed.vertices.cpu().numpy()


def _intrinsics(options: Namespace, frames: Frames, device: torch.device) -> ArrayLike | None:
    """(3, 3) px, given or seen in frames all over the video; None: there is no saying."""
    if options.human_fov is not None:
        every = max(1, (frames.expected or 1) // _LENS_FRAMES)
        return estimate_intrinsics(
            load_human_fov(options.human_fov).to(device), itertools.islice(frames, 0, None, every)
        )
    if options.focal_px is None:
        return None
    height, width = next(iter(frames)).shape[:2]
    return np.array([[options.focal_px, 0, width / 2], [0, options.focal_px, height / 2], [0, 0, 1]])


def _watched(frames: Iterable[np.ndarray], what: str, total: int | None) -> Iterable[np.ndarray]:
    return tqdm(frames, desc=what, total=total, unit="frame", file=sys.stderr)


def _summary(motion: MotionEstimate) -> str:
    lost = int(motion.interpolated.sum())
    return f"{len(motion)} frames at {motion.fps:g} a second, {lost} of them interpolated"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end in one line and exit code 2."""
    options = build_parser().parse_args(arguments)
    try:
        predict(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
