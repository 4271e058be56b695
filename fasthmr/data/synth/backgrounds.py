"""What synthetic people stand in front of: a far picture and a patterned ground, procedural or from photographs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

_FAR_WIDTH, _FAR_HEIGHT, _GROUND_PX = 1024, 512, 512
_PHOTO_WIDTH, _PHOTO_HEIGHT = 1600, 800
_PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Background:
    """What people stand in front of and on.

    `far` (H,W,3) uint8 RGB fills the view; `ground` (512,512,3) uint8 RGB is repeated every `tile_m` metres on y = 0.
    It may be None: then the far picture goes on below the horizon, and only shadows fall on the ground. The ground ends
    at a wall `wall_m` behind the people, or at the horizon if that is infinite.
    """

    far: np.ndarray
    ground: np.ndarray | None
    tile_m: float
    wall_m: float


def find_photos(folder: Path) -> tuple[Path, ...]:
    """All photographs under a folder, sorted.

    Raises:
        ValueError: there is no folder, or no photograph in it.
    """
    photos = tuple(sorted(p for p in folder.rglob("*") if p.suffix.lower() in _PHOTO_SUFFIXES))
    if not photos:
        kinds = ", ".join(_PHOTO_SUFFIXES)
        raise ValueError(
            f"synth: backgrounds: no photographs ({kinds}) in {folder}; name a folder with some, or procedural"
        )
    return photos


def random_background(rng: np.random.Generator, photos: tuple[Path, ...]) -> Background:
    """Draw a background; with photographs, they are the far picture and sometimes the ground."""
    wall_m = float(rng.uniform(0.5, 6.0)) if rng.uniform() < 0.6 else np.inf
    if not photos:
        return Background(_procedural_far(rng), _procedural_ground(rng), float(rng.uniform(0.8, 3.0)), wall_m)
    far = _photo_piece(rng, photos, _PHOTO_WIDTH, _PHOTO_HEIGHT)
    kind = rng.uniform()
    if kind < 0.45:
        return Background(far, None, 1.0, np.inf)
    if kind < 0.8:
        return Background(far, _procedural_ground(rng), float(rng.uniform(0.8, 3.0)), wall_m)
    ground = _seamless(_photo_piece(rng, photos, _GROUND_PX // 2, _GROUND_PX // 2))
    return Background(far, ground, float(rng.uniform(2, 6)), wall_m)


def _seamless(piece: np.ndarray) -> np.ndarray:
    """Four mirror images of a picture, which can be repeated without seams."""
    wide = np.concatenate([piece, piece[:, ::-1]], axis=1)
    return np.ascontiguousarray(np.concatenate([wide, wide[::-1]], axis=0))


@lru_cache(maxsize=64)
def _photo(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"synth: backgrounds: {path} cannot be read as a photograph; remove it")
    scale = _PHOTO_WIDTH / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _photo_piece(rng: np.random.Generator, photos: tuple[Path, ...], width: int, height: int) -> np.ndarray:
    """A random piece of a random photograph, sometimes mirrored, brighter or darker."""
    photo = _photo(photos[rng.integers(len(photos))])
    rows, columns = photo.shape[:2]
    piece_w = int(min(columns, rows * width / height) * rng.uniform(0.5, 1.0))
    piece_h = max(8, int(piece_w * height / width))
    y, x = rng.integers(0, max(1, rows - piece_h + 1)), rng.integers(0, max(1, columns - piece_w + 1))
    piece = cv2.resize(photo[y : y + piece_h, x : x + piece_w], (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.uniform() < 0.5:
        piece = piece[:, ::-1]
    return np.ascontiguousarray(np.clip(piece * rng.uniform(0.7, 1.2), 0, 255).astype(np.uint8))


def _color(rng: np.random.Generator, low: float = 0.1, high: float = 0.95) -> np.ndarray:
    return np.clip(rng.uniform(low, high) + rng.normal(0, rng.choice([0.03, 0.12]), 3), 0.02, 1) * 255


def _noise(rng: np.random.Generator, height: int, width: int, octaves: tuple[int, ...] = (8, 32, 128)) -> np.ndarray:
    """Smooth noise (H,W) with mean 0 and about unit range that repeats nowhere in the picture."""
    out = np.zeros((height, width), np.float32)
    for cells in octaves:
        coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        out += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / np.float32(cells) ** 0.35
    return out


def _procedural_far(rng: np.random.Generator) -> np.ndarray:
    """A wall or a sky with things standing in front of it, as blurred as what is far away."""
    top, bottom = _color(rng), _color(rng)
    ramp = np.linspace(0, 1, _FAR_HEIGHT, dtype=np.float32)[:, None, None]
    picture = np.broadcast_to((1 - ramp) * top + ramp * bottom, (_FAR_HEIGHT, _FAR_WIDTH, 3)).astype(np.float32)
    clouds = _noise(rng, _FAR_HEIGHT, _FAR_WIDTH)[..., None] * rng.uniform(5, 45)
    picture = np.ascontiguousarray(picture + clouds, np.float32)
    for _ in range(rng.integers(4, 28)):
        x, y = int(rng.uniform(0, _FAR_WIDTH)), int(rng.uniform(0.1, 0.6) * _FAR_HEIGHT)
        w, h = int(rng.uniform(10, 220)), int(rng.uniform(20, 320))
        color = tuple(float(c) for c in _color(rng))
        shape = rng.uniform()
        if shape < 0.6:
            cv2.rectangle(picture, (x, y), (x + w, y + h), color, -1)
        elif shape < 0.85:
            cv2.ellipse(picture, (x, y), (w // 2 + 1, h // 3 + 1), float(rng.uniform(0, 180)), 0, 360, color, -1)
        else:
            cv2.line(picture, (x, y), (x + w, y + h), color, int(rng.integers(2, 12)))
    return np.clip(cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.8, 3))), 0, 255).astype(np.uint8)


def _procedural_ground(rng: np.random.Generator) -> np.ndarray:
    """Tiles, planks, grass or plain floor."""
    size = _GROUND_PX
    base, other = _color(rng), _color(rng)
    y, x = np.mgrid[:size, :size]
    kind = rng.integers(4)
    cells = int(rng.integers(2, 8))
    step = size // cells
    if kind == 0:  # tiles with joints
        pattern = ((x % step < 6) | (y % step < 6)).astype(np.float32)
    elif kind == 1:  # chequered
        pattern = (((x // step) + (y // step)) % 2).astype(np.float32)
    elif kind == 2:  # planks
        pattern = ((x // (size // (2 * cells))) * 0.37 % 1 * 0.6 + (x % (size // (2 * cells)) < 3)).astype(np.float32)
    else:  # plain, or grass by its noise
        pattern = np.zeros((size, size), np.float32)
    picture = base + np.clip(pattern, 0, 1)[..., None] * (other - base) * rng.uniform(0.3, 1)
    picture = picture + _noise(rng, size, size, (4, 16, 64, 256))[..., None] * rng.uniform(3, 30)
    return np.clip(picture, 0, 255).astype(np.uint8)
