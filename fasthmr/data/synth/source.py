"""The source `synth`: clips of free bodies that move, filmed and labelled exactly; clip i is a function of (config, i)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from fasthmr.body import BodyModel
from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.data.schema import LABELS, MIN_CROP_PX, Clip, PackedImages
from fasthmr.data.synth.backgrounds import Background, find_photos, random_background
from fasthmr.data.synth.motion import Motion, load_motion_source
from fasthmr.data.synth.painter import NOISE_PX, paint
from fasthmr.data.synth.people import Appearance, random_appearance
from fasthmr.data.synth.scene import CameraPath, Light, random_camera, random_light
from fasthmr.geometry.boxes import crop_affine
from fasthmr.render.raster import Fragments, rasterize, vertex_normals

#: side of the stored crop over the side of the person's box: room for jitter
CROP_OVER_BOX = 1.5
_SHADOW_PX, _SHADOW_M = 160, 5.0
_BOX_FACES = np.array(
    [[0, 2, 1], [1, 2, 3], [4, 5, 6], [5, 7, 6], [0, 1, 4], [1, 5, 4], [2, 6, 3], [3, 6, 7], [0, 4, 2], [2, 4, 6], [1, 3, 5], [3, 7, 5]],
    np.int32,
)  # fmt: skip


@dataclass(frozen=True)
class SynthConfig:
    """What to make.

    Args:
        clips: how many; 0 with `motion_windows` for all windows.
        frames: per clip.
        fps: frames per second.
        seed: of everything; the same config gives the same bytes.
        motion: "procedural", or an AMASS-format folder or pack.
        motion_windows: take the motion set's windows one after the other instead of drawing at random, to cover a
            validation set; only for a motion folder.
        backgrounds: "procedural", or a folder of photographs.
        crop_px: side of the stored crops.
        second_person_share: of clips in which somebody else walks through.
        occluder_share: of clips in which things stand in front.
        moving_camera_share: of clips with a moving camera.
        jpeg_quality: of the stored crops.
        full_frames: also store the full images; slow, and large.
    """

    clips: int = 100
    frames: int = 81
    fps: float = 30.0
    seed: int = 0
    motion: str = "procedural"
    motion_windows: bool = False
    backgrounds: str = "procedural"
    crop_px: int = 384
    second_person_share: float = 0.2
    occluder_share: float = 0.2
    moving_camera_share: float = 0.6
    jpeg_quality: int = 90
    full_frames: bool = False

    def __post_init__(self) -> None:
        for name, least in (("clips", 0 if self.motion_windows else 1), ("frames", 1), ("seed", 0), ("crop_px", MIN_CROP_PX)):
            if getattr(self, name) < least:
                raise ValueError(f"synth: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("second_person_share", "occluder_share", "moving_camera_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"synth: {name} must be in [0, 1], got {getattr(self, name)}")
        if not self.fps > 0:
            raise ValueError(f"synth: fps must be positive, got {self.fps}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"synth: jpeg_quality must be in [1, 100], got {self.jpeg_quality}")
        if self.motion_windows and self.motion == "procedural":
            raise ValueError("synth: motion_windows needs a motion folder; procedural motion has no windows")


@dataclass(frozen=True)
class _Person:
    """Somebody in a scene: world vertices (T,V,3), and what made them."""

    motion: Motion
    betas: np.ndarray
    shift: np.ndarray  # (T,3) added to the motion's translation
    vertices: np.ndarray
    joints: np.ndarray  # (T,29,3)
    look: Appearance


class SynthSource:
    """Clips of synthetic people.

    Args:
        config: what to make.
        body: the body that the people have; the look is painted for the free body's T pose.
    """

    def __init__(self, config: SynthConfig, body: BodyModel) -> None:
        self.config = config
        self.body = body
        self._motions = load_motion_source(config.motion)
        self._photos = () if config.backgrounds == "procedural" else find_photos(Path(config.backgrounds))
        self._length = config.clips
        if config.motion_windows:
            windows = self._motions.num_windows(config.frames, config.fps)
            self._length = min(windows, config.clips) if config.clips else windows

    def __len__(self) -> int:
        return self._length

    def describe(self) -> dict[str, Any]:
        """What the clips depend on, for the manifest and for telling two sets apart; paths only by what they hold."""
        told = asdict(self.config) | {"clips": len(self)}
        told["motion"] = f"{self._motions.name}:{self._motions.fingerprint()}"
        told["backgrounds"] = [p.name for p in self._photos] or "procedural"
        return {"kind": "synth", "body": self.body.id, **told}

    # ---- one clip ---------------------------------------------------------------------------------------------------

    def make(self, index: int) -> Clip:
        """Film clip `index`.

        Raises:
            IndexError: there is no such clip.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        config = self.config
        rng = np.random.default_rng([config.seed, index])
        with _one_thread():
            if config.motion_windows:
                motion = self._motions.window(index, config.frames, config.fps, rng)
            else:
                motion = self._motions.sample(rng, config.frames, config.fps)
            subject = self._person(rng, motion, np.zeros((config.frames, 3)))
            camera = random_camera(rng, subject.joints[:, 0], bool(rng.uniform() < config.moving_camera_share))
            people = [subject]
            if rng.uniform() < config.second_person_share:
                people.append(self._passer_by(rng, subject, camera))
            things = _occluders(rng, subject, camera) if rng.uniform() < config.occluder_share else []
            center, size = _track(rng, camera, subject.vertices)
            film = _Film(self.body, camera, random_light(rng), random_background(rng, self._photos), people, things, rng)
            crop_from_image = crop_affine(center, CROP_OVER_BOX * size, config.crop_px)
            crops = [film.frame(t, crop_from_image[t], config.crop_px, config.crop_px) for t in range(config.frames)]
            full = None
            if config.full_frames:
                width, height = (int(v) for v in camera.image_size)
                whole = np.array([[1.0, 0, 0], [0, 1, 0]])
                full = PackedImages.encode_jpeg(
                    (film.frame(t, whole, width, height)[0] for t in range(config.frames)), config.jpeg_quality
                )
        return Clip(
            key=f"synth-{config.seed}-{index:06d}",
            source=f"synth/{self._motions.name}:{motion.name}",
            fps=config.fps,
            body=self.body.id,
            image_size=camera.image_size.astype(np.int64),
            intrinsics=camera.intrinsics.astype(np.float32),
            frames=PackedImages.encode_jpeg((image for image, _ in crops), config.jpeg_quality),
            masks=PackedImages.encode_png(label for _, label in crops),
            crop_from_image=crop_from_image.astype(np.float32),
            box_center=center.astype(np.float32),
            box_size=size.astype(np.float32),
            valid=np.ones(config.frames, bool),
            **self._labels(subject, camera),
            status=dict.fromkeys(LABELS, "ground_truth"),
            full_frames=full,
        )

    def _person(self, rng: np.random.Generator, motion: Motion, shift: np.ndarray) -> _Person:
        """Give a motion a body: shape, look, and feet on the ground."""
        betas = np.clip(rng.normal(0, 1, NUM_BETAS), -2.5, 2.5)
        look = random_appearance(rng)
        shift = shift.copy()
        rotations = torch.from_numpy(Rotation.from_rotvec(motion.pose.reshape(-1, 3)).as_matrix().astype(np.float32))
        with torch.no_grad():
            posed = self.body(
                rotations.reshape(-1, NUM_JOINTS, 3, 3),
                torch.from_numpy(betas.astype(np.float32)).expand(len(motion), -1),
                torch.from_numpy((motion.translation + shift).astype(np.float32)),
            )
        vertices, joints = posed.vertices.numpy(), posed.joints29.numpy()
        # The motion was made for the mean shape: set this one on the ground by the frames in which it stands lowest.
        drop = np.float32(np.percentile(vertices[:, :, 1].min(1), 10))
        shift[:, 1] -= drop
        vertices[:, :, 1] -= drop
        joints[:, :, 1] -= drop
        return _Person(motion, betas.astype(np.float32), shift, vertices, joints, look)

    def _passer_by(self, rng: np.random.Generator, subject: _Person, camera: CameraPath) -> _Person:
        """Somebody else, crossing the view in front of the subject or behind."""
        frames = len(subject.motion)
        motion = self._motions.sample(rng, frames, self.config.fps)
        middle = subject.joints[:, 0].mean(0)
        away = middle - camera.position.mean(0)
        away[1] = 0
        reach = float(np.linalg.norm(away))
        away /= max(reach, 1e-6)
        across = np.array([away[2], 0, -away[0]]) * rng.choice([-1, 1])
        depth = rng.uniform(0.5, 1.8) if rng.uniform() < 0.6 else -min(rng.uniform(0.5, 1.0), 0.4 * reach)
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


# ---- the film -----------------------------------------------------------------------------------------------------------


class _Film:
    """All that stays the same over a clip's frames, ready to paint any of them."""

    def __init__(
        self, body: BodyModel, camera: CameraPath, light: Light, background: Background,
        people: list[_Person], things: list[np.ndarray], rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.camera, self.people, self.things = camera, people, things
        body_faces = body.faces.numpy().astype(np.int32)
        vertices = body.num_vertices
        self.person_faces = body_faces
        parts = [body_faces + i * vertices for i in range(len(people))]
        # Labels go by number: with only one person, the second mesh is an empty one.
        counts = [len(body_faces), len(body_faces) if len(people) == 2 else 0]
        start = len(people) * vertices
        for thing in things:
            parts.append(_BOX_FACES + start)
            counts.append(len(_BOX_FACES))
            start += len(thing)
        self.faces = np.ascontiguousarray(np.concatenate(parts))
        self.first_face = np.cumsum([0, *counts], dtype=np.int64)
        meshes = len(counts)
        self.colors = np.zeros((meshes, 7, 3), np.float32)
        self.numbers = np.zeros((meshes, 8), np.float32)
        for i, person in enumerate(people):
            self.colors[i], self.numbers[i] = person.look.colors, person.look.numbers
        self.colors[2:, 0] = rng.uniform(0.05, 0.9, (len(things), 3))
        rest = body.rest_vertices(torch.zeros(1, NUM_BETAS))[0].numpy()
        corners = [np.zeros((8, 3), np.float32)] * len(things)
        self.rest = np.ascontiguousarray(np.concatenate([rest] * len(people) + corners), np.float32)

        self.light = light
        self.sun = (light.exposure * light.sun).astype(np.float32)
        self.sky = (light.exposure * light.sky).astype(np.float32)
        ramp = np.clip(np.arange(1024) / 819.2, 0, 1) ** (1 / (1.6 * light.gamma)) * 255
        self.gamma_table = ramp.astype(np.uint8)
        self.background = background
        self.ground = background.ground if background.ground is not None else np.zeros((1, 1, 3), np.uint8)
        self.ground_scale = len(self.ground) / background.tile_m if background.ground is not None else 0.0
        self.ground_mean = self.ground.reshape(-1, 3).mean(0).astype(np.float32)
        # The far picture stands where the camera looks on average and is as wide as the view and a margin.
        width, height = camera.image_size
        mean = Rotation.from_matrix(camera.rotation).mean().as_matrix()
        far_height, far_width = background.far.shape[:2]
        scale = max(far_width / width, far_height / height) / 1.3
        far_camera = np.array([[scale, 0, far_width / 2 - scale * width / 2], [0, scale, far_height / 2 - scale * height / 2], [0, 0, 1]])
        self.far_from_ray = far_camera @ camera.intrinsics @ mean
        # The sensor's noise: one pattern, shifted from frame to frame.
        self.noise = (rng.normal(0, 1, (NOISE_PX, NOISE_PX, 3)) * rng.uniform(0, 6)).astype(np.float32)
        self.noise_at = rng.integers(0, NOISE_PX, (len(camera.position), 2))

    def frame(self, t: int, crop_from_image: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Paint frame `t` as seen through a crop: (H,W,3) uint8 RGB and (H,W) uint8 instances."""
        camera = self.camera
        rotation, position = camera.rotation[t], camera.position[t]
        vertices = np.concatenate([p.vertices[t] for p in self.people] + self.things).astype(np.float32)
        in_camera = (vertices - position) @ rotation.T
        crop_camera = np.vstack([crop_from_image, [0, 0, 1]]) @ camera.intrinsics
        homogeneous = in_camera @ crop_camera.T
        depth = homogeneous[:, 2:]
        points = np.concatenate([homogeneous[:, :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth), depth], 1).astype(np.float32)
        fragments = rasterize(points, self.faces, width, height)
        shadow, origin = self._shadow(t)
        corners = crop_from_image @ np.array([[0, 0, 1], [*(camera.image_size - 1), 1]]).T
        inside = np.array([np.ceil(corners[0, 0]), np.floor(corners[0, 1]), np.ceil(corners[1, 0]), np.floor(corners[1, 1])])
        image, label = paint(
            fragments.face, fragments.bary, self.faces, self.first_face,
            vertex_normals(vertices, self.faces), self.rest, self.colors, self.numbers,
            self.light.direction.astype(np.float32), self.sun, self.sky, self.gamma_table,
            (rotation.T @ np.linalg.inv(crop_camera)).astype(np.float32), self.far_from_ray.astype(np.float32),
            np.float32(position[1]), position[[0, 2]].astype(np.float32),
            self.background.far, self.ground, np.float32(self.ground_scale), self.ground_mean,
            shadow, origin.astype(np.float32), np.float32(_SHADOW_PX / _SHADOW_M), np.float32(self.light.shadow),
            inside.astype(np.float32), self.noise, self.noise_at[t],
        )  # fmt: skip
        return image, label

    def _shadow(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """What of the ground lies in the people's shadow: (S,S) in [0,1], and its corner (x,z) in metres."""
        towards = self.light.direction
        flat = [p.vertices[t][:, [0, 2]] - p.vertices[t][:, 1:2] / towards[1] * towards[[0, 2]] for p in self.people]
        origin = flat[0].mean(0) - _SHADOW_M / 2
        fragments = Fragments.empty(_SHADOW_PX, _SHADOW_PX)
        for spots in flat:
            points = np.ones((len(spots), 3), np.float32)
            points[:, :2] = (spots - origin) * (_SHADOW_PX / _SHADOW_M)
            # Seen along the light, the triangles that turn away from the sun cover the same outline as those that face it.
            rasterize(points, self.person_faces, _SHADOW_PX, _SHADOW_PX, into=fragments)
        covered = (fragments.face >= 0).astype(np.float32)
        return cv2.GaussianBlur(covered, (0, 0), 1.2), origin


def _occluders(rng: np.random.Generator, subject: _Person, camera: CameraPath) -> list[np.ndarray]:
    """One to three boxes standing on the ground between camera and person: corners (8,3), world, metres."""
    boxes = []
    middle, viewer = subject.joints[:, 0].mean(0), camera.position.mean(0)
    for _ in range(rng.integers(1, 4)):
        spot = viewer + rng.uniform(0.35, 0.8) * (middle - viewer)
        spot += rng.normal(0, 0.35, 3)
        size = np.array([rng.uniform(0.08, 0.5), rng.uniform(0.3, 1.5), rng.uniform(0.08, 0.4)])
        low = 0.0 if rng.uniform() < 0.8 else rng.uniform(0.5, 1.5)
        corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (0, 1) for z in (-0.5, 0.5)]) * size
        angle = rng.uniform(0, np.pi)
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        boxes.append((corners @ turn.T + [spot[0], low, spot[2]]).astype(np.float32))
    return boxes


def _track(rng: np.random.Generator, camera: CameraPath, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square boxes (T,2), (T,) that a tracker would report: around what is in the image, a little late and shaky."""
    in_camera = camera.from_world(vertices[:, ::5])
    homogeneous = in_camera @ camera.intrinsics.T
    pixels = homogeneous[..., :2] / np.maximum(homogeneous[..., 2:], 1e-3)
    low = np.clip(pixels.min(1), 0, camera.image_size - 1)
    high = np.clip(pixels.max(1), 0, camera.image_size - 1)
    center, size = (low + high) / 2, np.maximum((high - low).max(1), 32.0)
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
