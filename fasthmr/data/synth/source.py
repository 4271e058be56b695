"""The source `synth`: clips of bodies that move, filmed and labelled exactly; clip i is a function of (config, i)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d, minimum_filter1d
from scipy.spatial.transform import Rotation

from fasthmr.body import BodyModel
from fasthmr.conventions import MASK_SUBJECT, NUM_BETAS, NUM_JOINTS
from fasthmr.data.schema import LABELS, MIN_CROP_PX, Clip, PackedImages
from fasthmr.data.synth.amass import MotionFolder
from fasthmr.data.synth.backgrounds import find_photos, random_background
from fasthmr.data.synth.film import Figure, Film
from fasthmr.data.synth.motion import Motion, load_motion_source
from fasthmr.data.synth.occluders import random_things
from fasthmr.data.synth.people import paint_coordinates, random_appearance
from fasthmr.data.synth.scene import CameraPath, random_camera, random_light
from fasthmr.geometry.boxes import crop_affine

#: raised whenever the same config gives other clips than before, so that no set is continued with different ones
_VERSION = 3
#: side of the stored crop over the side of the person's box: room for jitter
CROP_OVER_BOX = 1.5
_MAX_BETA = 2.5
_NO_WINDOWS = "false for procedural motion, which has no windows (name a motion set: --motion, --motion_val)"
_LONGEST_FLIGHT_S = 1.0
_MIN_BOX_PX = 32.0
#: nobody who passes by comes nearer to the camera
_NEAREST_M = 1.0
#: a frame in which less than this is seen of the person is not valid
_MIN_VISIBLE_PX = 16


@dataclass(frozen=True)
class SynthConfig:
    """What to make.

    Args:
        clips: how many; 0 with `motion_windows` for all windows.
        frames: per clip.
        fps: frames per second.
        seed: of everything; the same config gives the same bytes.
        motion: "procedural", or an AMASS-format folder or pack.
        procedural_share: of clips that move procedurally all the same, where `motion` is a motion folder.
        motion_windows: take the motion set's windows one after the other instead of drawing at random, to cover a
            validation set; only for a motion folder.
        backgrounds: "procedural", or a folder of photographs.
        crop_px: side of the stored crops.
        second_person_share: of clips in which somebody else walks through.
        occluder_share: of clips in which things stand in front.
        moving_camera_share: of clips with a moving camera.
        noise: largest standard deviation of the sensors' noise, grey values of 255; each clip draws its own below.
        jpeg_quality: of the stored crops, 1 to 100.
        full_frames: also store the full images; slow, and large.

    Raises:
        ValueError: a value that cannot be; names the field.
    """

    clips: int = 100
    frames: int = 81
    fps: float = 30.0
    seed: int = 0
    motion: str = "procedural"
    procedural_share: float = 0.0
    motion_windows: bool = False
    backgrounds: str = "procedural"
    crop_px: int = 384
    second_person_share: float = 0.2
    occluder_share: float = 0.2
    moving_camera_share: float = 0.6
    noise: float = 8.0
    jpeg_quality: int = 90
    full_frames: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("clips", 0 if self.motion_windows else 1, 10**9),
            ("frames", 1, 10**6),
            ("seed", 0, 2**63 - 1),
            ("crop_px", MIN_CROP_PX, 4096),
            ("jpeg_quality", 1, 100),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and least <= value <= most, name, f"a whole number from {least} to {most}", value)
        for name in ("procedural_share", "second_person_share", "occluder_share", "moving_camera_share"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value <= 1, name, "a share from 0 to 1", value)
        _require(_is_number(self.fps) and 0 < self.fps <= 1000, "fps", "frames a second above 0", self.fps)
        _require(_is_number(self.noise) and 0 <= self.noise <= 100, "noise", "grey values from 0 to 100", self.noise)
        for name in ("motion_windows", "full_frames"):
            _require(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        for name in ("motion", "backgrounds"):
            value = getattr(self, name)
            _require(isinstance(value, str) and value != "", name, '"procedural" or a path', value)
        procedural_windows = self.motion_windows and self.motion == "procedural"
        _require(not procedural_windows, "motion_windows", _NO_WINDOWS, True)
        mixed_windows = self.motion_windows and self.procedural_share > 0
        _require(not mixed_windows, "procedural_share", "0 with motion_windows", self.procedural_share)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _require(holds: bool, field: str, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"synth: {field} must be {what}, got {got!r}")


@dataclass(frozen=True)
class _Person:
    """Somebody in a scene and what moved them: `shift` (T,3) was added to the motion's translation; `vertices` (T,V,3)
    and `joints` (T,29,3) float32, world, metres."""

    motion: Motion
    betas: np.ndarray
    shift: np.ndarray
    vertices: np.ndarray
    joints: np.ndarray


class SynthSource:
    """Clips of synthetic people.

    Args:
        config: what to make.
        body: the body that the people have; the look is painted for the free body's T pose.
    """

    def __init__(self, config: SynthConfig, body: BodyModel) -> None:
        self.config = config
        self.body = body
        self._faces = np.ascontiguousarray(body.faces.numpy(), np.int32)
        self._paint_on = paint_coordinates(body)
        self._motions = load_motion_source(config.motion)
        self._procedural = load_motion_source("procedural")
        self._photos = () if config.backgrounds == "procedural" else find_photos(Path(config.backgrounds))
        self._length = config.clips
        if config.motion_windows:
            windows = self._windows().num_windows(config.frames, config.fps)
            self._length = min(windows, config.clips) if config.clips else windows

    def __len__(self) -> int:
        return self._length

    def describe(self) -> dict[str, Any]:
        """What the clips depend on, for the manifest and for telling two sets apart; paths only by what they hold."""
        told = asdict(self.config) | {"clips": len(self)}
        told["motion"] = f"{self._motions.name}:{self._motions.fingerprint()}"
        if self.config.procedural_share:
            told["procedural"] = self._procedural.fingerprint()
        else:
            del told["procedural_share"]  # sets that were made before there was this setting go on
        told["backgrounds"] = [f"{p.name}:{p.stat().st_size}" for p in self._photos] or "procedural"
        return {"kind": "synth", "version": _VERSION, "body": self.body.id, **told}

    def make(self, index: int) -> Clip:
        """Film clip `index`.

        Raises:
            IndexError: there is no such clip.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        config = self.config
        rng = np.random.default_rng(np.random.SeedSequence([config.seed, index]))
        with _one_thread():
            source = self._motions
            if config.motion_windows:
                motion = self._windows().window(index, config.frames, config.fps, rng)
            else:
                # No number is drawn where there is no choice.
                procedural = config.procedural_share > 0 and rng.uniform() < config.procedural_share
                source = self._procedural if procedural else source
                motion = source.sample(rng, config.frames, config.fps)
            subject = self._person(rng, motion, np.zeros((config.frames, 3)))
            camera = random_camera(rng, subject.joints[:, 0], bool(rng.uniform() < config.moving_camera_share))
            people = [subject]
            if rng.uniform() < config.second_person_share:
                people.append(self._passer_by(rng, subject, camera))
            occluded = rng.uniform() < config.occluder_share
            things = random_things(rng, subject.joints, camera.position) if occluded else []
            center, size = _track(rng, camera, subject.vertices)
            crop_from_image = crop_affine(center, CROP_OVER_BOX * size, config.crop_px)
            film = Film(
                camera=camera,
                light=random_light(rng),
                background=random_background(rng, self._photos),
                figures=[Figure(p.vertices, random_appearance(rng)) for p in people],
                things=things,
                faces=self._faces,
                paint_on=self._paint_on,
                rng=rng,
                noise=config.noise,
                grain_px=float(crop_from_image[:, 0, 0].mean()),
            )
            crops = [film.frame(t, crop_from_image[t], config.crop_px, config.crop_px) for t in range(config.frames)]
            full = self._full_frames(film, camera) if config.full_frames else None
        return Clip(
            key=f"synth-{config.seed}-{index:06d}",
            source=f"synth/{source.name}:{motion.name}",
            fps=config.fps,
            body=self.body.id,
            image_size=camera.image_size.astype(np.int64),
            intrinsics=camera.intrinsics.astype(np.float32),
            frames=PackedImages.encode_jpeg((image for image, _ in crops), config.jpeg_quality),
            masks=PackedImages.encode_png(label for _, label in crops),
            crop_from_image=crop_from_image.astype(np.float32),
            box_center=center.astype(np.float32),
            box_size=size.astype(np.float32),
            valid=np.array([np.count_nonzero(label == MASK_SUBJECT) >= _MIN_VISIBLE_PX for _, label in crops]),
            **self._labels(subject, camera),
            status=dict.fromkeys(LABELS, "ground_truth"),
            full_frames=full,
            gender="neutral",
        )

    def _windows(self) -> MotionFolder:
        assert isinstance(self._motions, MotionFolder)  # SynthConfig lets nothing else through
        return self._motions

    def _full_frames(self, film: Film, camera: CameraPath) -> PackedImages:
        width, height = (int(v) for v in camera.image_size)
        whole = np.array([[1.0, 0, 0], [0, 1, 0]])
        frames = (film.frame(t, whole, width, height)[0] for t in range(self.config.frames))
        return PackedImages.encode_jpeg(frames, self.config.jpeg_quality)

    def _person(self, rng: np.random.Generator, motion: Motion, shift: np.ndarray) -> _Person:
        """Give a motion a body: a shape, and feet on the ground."""
        betas = np.clip(rng.normal(0, 1, NUM_BETAS), -_MAX_BETA, _MAX_BETA)
        shift = shift.copy()
        rotations = torch.from_numpy(Rotation.from_rotvec(motion.pose.reshape(-1, 3)).as_matrix().astype(np.float32))
        with torch.no_grad():
            posed = self.body(
                rotations.reshape(-1, NUM_JOINTS, 3, 3),
                torch.from_numpy(betas.astype(np.float32)).expand(len(motion), -1),
                torch.from_numpy((motion.translation + shift).astype(np.float32)),
            )
        vertices, joints = posed.vertices.numpy(), posed.joints29.numpy()
        drop = _height_over_ground(vertices[:, :, 1].min(1), motion.fps)
        shift[:, 1] -= drop
        vertices[:, :, 1] -= drop[:, None]
        joints[:, :, 1] -= drop[:, None]
        return _Person(motion, betas.astype(np.float32), shift, vertices, joints)

    def _passer_by(self, rng: np.random.Generator, subject: _Person, camera: CameraPath) -> _Person:
        """Somebody else, crossing the view in front of the subject or behind, who keeps clear of subject and camera."""
        frames = len(subject.motion)
        motion = self._motions.sample(rng, frames, self.config.fps)
        middle = subject.joints[:, 0].mean(0)
        away = middle - camera.position.mean(0)
        away[1] = 0
        away /= max(float(np.linalg.norm(away)), 1e-6)
        across = np.array([away[2], 0, -away[0]]) * rng.choice([-1, 1])
        own = motion.translation - motion.translation.mean(0)
        # Distances along the line of sight, over the clip: to the subject, and from the camera.
        ahead = (subject.joints[:, 0] - own - middle) @ away
        to_camera = (camera.position - own - middle) @ away
        depth = ahead.max() + rng.uniform(0.5, 1.8)
        in_front = ahead.min() - rng.uniform(0.5, 1.0)
        if rng.uniform() < 0.4 and in_front > to_camera.max() + _NEAREST_M:
            depth = in_front
        start, end = rng.uniform(-1.8, 0.3), rng.uniform(-0.3, 1.8)
        path = middle + depth * away + across * np.linspace(start, end, frames)[:, None]
        path[:, 1] = 0
        path[:, [0, 2]] -= motion.translation[:, [0, 2]].mean(0)
        return self._person(rng, motion, path)

    def _labels(self, person: _Person, camera: CameraPath) -> dict[str, np.ndarray]:
        """Pose, translation and joints in the camera frame, and the joints' pixels."""
        rotvec = person.motion.pose.astype(np.float64)
        root = Rotation.from_matrix(camera.rotation) * Rotation.from_rotvec(rotvec[:, 0])
        pose = np.concatenate([root.as_rotvec()[:, None], rotvec[:, 1:]], axis=1).astype(np.float32)
        # The body turns about its pelvis j0, not about the origin: R (j0 + t - c) = j0 + t', solved for t'.
        with torch.no_grad():
            j0 = self.body.rest_joints(torch.from_numpy(person.betas)[None])[0, 0].numpy()
        in_world = j0 + person.motion.translation + person.shift
        translation = camera.from_world(in_world[:, None])[:, 0] - j0
        joints3d = camera.from_world(person.joints)
        homogeneous = joints3d @ camera.intrinsics.T
        pixels = homogeneous[..., :2] / homogeneous[..., 2:]
        inside = ((pixels >= 0) & (pixels <= camera.image_size - 1)).all(-1) & (joints3d[..., 2] > 0)
        return {
            "pose": pose,
            "betas": person.betas,
            "translation": translation.astype(np.float32),
            "joints3d": np.concatenate([joints3d, np.ones((*joints3d.shape[:2], 1))], -1).astype(np.float32),
            "joints2d": np.concatenate([pixels, inside[..., None]], -1).astype(np.float32),
        }


def _height_over_ground(lowest: np.ndarray, fps: float) -> np.ndarray:
    """How far to lower a person (T,) so that the ground is touched: motions were recorded, or made, with other bodies.

    Args:
        lowest: (T,) height of the lowest vertex, metres.

    The result follows what is lowest within about a second, smoothly: a jump stays a jump, a slow drift goes away.
    """
    touching = minimum_filter1d(lowest, max(1, round(_LONGEST_FLIGHT_S * fps)), mode="nearest")
    return gaussian_filter1d(touching, 0.3 * fps, mode="nearest").astype(np.float32)


def _track(rng: np.random.Generator, camera: CameraPath, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square boxes, centres (T,2) and sides (T,), as a tracker reports them: around what is in the image, and shaky."""
    in_camera = camera.from_world(vertices[:, ::5])
    homogeneous = in_camera @ camera.intrinsics.T
    pixels = homogeneous[..., :2] / np.maximum(homogeneous[..., 2:], 1e-3)
    low = np.clip(pixels.min(1), 0, camera.image_size - 1)
    high = np.clip(pixels.max(1), 0, camera.image_size - 1)
    center, size = (low + high) / 2, np.maximum((high - low).max(1), _MIN_BOX_PX)
    center, size = gaussian_filter1d(center, 1.5, axis=0, mode="nearest"), gaussian_filter1d(size, 1.5, mode="nearest")
    wobble = gaussian_filter1d(rng.normal(0, 1, (len(size), 3)), 2, axis=0, mode="nearest")
    return center + 0.01 * size[:, None] * wobble[:, :2], size * (1 + 0.01 * wobble[:, 2])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in torch depend on the number of threads in their last bits, and so would the bytes of a clip."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
