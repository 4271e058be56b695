"""Where a synthetic clip is filmed from: perspective cameras that move, and the light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

IMAGE_SIZES = ((1280, 720), (720, 1280), (1920, 1080), (1080, 1920), (640, 480), (960, 960))
_PERSON_M = 1.7


@dataclass(frozen=True)
class CameraPath:
    """A camera over T frames. `rotation` (T,3,3) and `position` (T,3): a world point p is rotation (p - position) in
    the camera frame. `image_size` (2,) width and height, `intrinsics` (3,3), px."""

    image_size: np.ndarray
    intrinsics: np.ndarray
    rotation: np.ndarray
    position: np.ndarray

    def from_world(self, points: np.ndarray) -> np.ndarray:
        """(T,N,3) world -> (T,N,3) camera frame, metres."""
        return np.einsum("tij,tnj->tni", self.rotation, points - self.position[:, None])


@dataclass(frozen=True)
class Light:
    """A sun and the sky. `direction` (3,) unit, towards the sun, world; `sun` and `sky` (3,) linear RGB factors,
    exposure included; `shadow` in [0,1] how dark shadows on the ground are and `softness_m` how wide their edges;
    `gamma` of the camera."""

    direction: np.ndarray
    sun: np.ndarray
    sky: np.ndarray
    shadow: float
    softness_m: float
    gamma: float


def random_light(rng: np.random.Generator) -> Light:
    """Draw the light: from a clear day's sun to an overcast sky, warm or cool."""
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(np.radians(25), np.radians(80))
    direction = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(elevation), np.sin(azimuth) * np.cos(elevation)])
    warmth = rng.uniform(-0.08, 0.12)
    hard = rng.uniform(0.2, 1.0)
    exposure = rng.uniform(0.8, 1.2)
    sun = exposure * (0.1 + 0.9 * hard) * np.array([1 + warmth, 1, 1 - warmth])
    sky = exposure * (0.95 - 0.6 * hard) * np.array([1 - warmth / 2, 1, 1 + warmth / 2])
    return Light(direction, sun, sky, 0.25 + 0.4 * hard, 0.02 + 0.06 * (1 - hard), float(rng.uniform(1.7, 2.3)))


def random_camera(rng: np.random.Generator, target: np.ndarray, moving: bool) -> CameraPath:
    """Draw a camera that follows a person.

    Args:
        rng: random numbers.
        target: (T,3) the person's middle, world, metres.
        moving: a dolly, an orbit and a hand-held camera; otherwise it stands still, and only turns to follow a person
            who would leave the picture.

    Returns:
        The path; the person fills 35 to 95 % of the image's shorter usable side, seen from 1.5 to 9 m.
    """
    frames = len(target)
    width, height = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
    fov = np.radians(rng.uniform(25, 70))  # vertical
    focal = height / (2 * np.tan(fov / 2))
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])

    smooth = gaussian_filter1d(target, sigma=frames / 6, axis=0, mode="nearest")
    usable_px = min(height, 1.2 * width)
    distance = np.clip(focal * _PERSON_M / (rng.uniform(0.35, 0.95) * usable_px), 1.5, 9.0)
    # A person who walks past a camera that stands still must stay in view.
    distance = max(float(distance), float(np.ptp(target[:, [0, 2]], axis=0).max()) * 0.75 + 1.0)
    height_m = float(np.clip(rng.normal(1.4, 0.6), 0.25, 3.5))
    time = np.linspace(0, 1, frames)
    azimuth, reach = np.full(frames, rng.uniform(0, 2 * np.pi)), np.full(frames, distance)
    centre = np.repeat(smooth.mean(0)[None], frames, 0)
    offset = rng.normal(0, 0.08, 3)
    aim = smooth + offset
    if moving:
        azimuth += rng.normal(0, 0.5) * time  # orbit
        reach *= 1 + rng.uniform(-0.2, 0.2) * time  # dolly
        centre = smooth if rng.uniform() < 0.5 else centre
    elif np.abs(target - centre)[:, [0, 2]].max() < 0.5 * distance * min(width, height) / 2 / focal:
        aim = centre + offset  # a tripod: who stays this close to the middle does not leave the picture
    position = centre + np.stack([reach * np.sin(azimuth), np.zeros(frames), reach * np.cos(azimuth)], axis=1)
    position[:, 1] = height_m
    roll = np.full(frames, rng.normal(0, np.radians(2)))
    if moving:  # hand-held
        position += _shake(rng, frames, 0.03)
        aim = aim + _shake(rng, frames, 0.03)
        roll += _shake(rng, frames, 0.01)[:, 0]
    rotation = _look_at(position, aim, roll)
    return CameraPath(np.array([width, height]), intrinsics, rotation, position)


def _shake(rng: np.random.Generator, frames: int, size: float) -> np.ndarray:
    """Smooth random motion (T,3) of about `size`."""
    noise = gaussian_filter1d(rng.normal(0, 1, (frames + 40, 3)), sigma=8, axis=0)[20:-20]
    return size * noise / max(float(noise.std()), 1e-6)


def _look_at(position: np.ndarray, aim: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Rotations (T,3,3), world to camera (x right, y down, z forward), that look from `position` at `aim`."""
    forward = aim - position
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    level = np.stack([right, np.cross(forward, right), forward], axis=1)
    cos, sin, zero, one = np.cos(roll), np.sin(roll), np.zeros_like(roll), np.ones_like(roll)
    turn = np.stack([np.stack([cos, -sin, zero], 1), np.stack([sin, cos, zero], 1), np.stack([zero, zero, one], 1)], 1)
    return turn @ level
