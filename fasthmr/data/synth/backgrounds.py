"""What synthetic people stand in front of: a far picture and a patterned ground, procedural or from photographs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

_FAR_WIDTH, _FAR_HEIGHT, _GROUND_PX = 1024, 512, 512
_PHOTO_WIDTH, _PHOTO_HEIGHT = 1600, 800
#: kinds of ground
_TILES, _CHEQUERED, _PLANKS, _PLAIN = range(4)
_PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

#: display RGB in [0,1] of what rooms are painted and furnished with, and of what one walks on
_PAINT = (
    (0.90, 0.89, 0.85), (0.80, 0.79, 0.76), (0.86, 0.80, 0.68), (0.70, 0.75, 0.72), (0.66, 0.72, 0.79),
    (0.78, 0.66, 0.56), (0.55, 0.56, 0.57), (0.60, 0.36, 0.28), (0.36, 0.42, 0.48), (0.45, 0.50, 0.40),
)  # fmt: skip
_FURNITURE = (
    (0.42, 0.28, 0.17), (0.62, 0.45, 0.29), (0.25, 0.18, 0.14), (0.88, 0.87, 0.84), (0.20, 0.21, 0.23),
    (0.36, 0.41, 0.46), (0.50, 0.20, 0.18), (0.24, 0.36, 0.30), (0.72, 0.60, 0.36),
)  # fmt: skip
_FLOOR = (
    (0.60, 0.45, 0.30), (0.42, 0.29, 0.19), (0.74, 0.62, 0.46), (0.68, 0.66, 0.63), (0.45, 0.45, 0.46),
    (0.83, 0.80, 0.75), (0.50, 0.34, 0.28), (0.33, 0.37, 0.44), (0.47, 0.22, 0.20),
)  # fmt: skip
_STREET = ((0.40, 0.40, 0.41), (0.55, 0.54, 0.51), (0.66, 0.62, 0.55), (0.52, 0.45, 0.38), (0.60, 0.42, 0.35))
_MEADOW = ((0.30, 0.42, 0.18), (0.40, 0.47, 0.24), (0.55, 0.53, 0.32), (0.76, 0.69, 0.53), (0.90, 0.91, 0.93))
_SKY = (
    ((0.33, 0.53, 0.82), (0.78, 0.86, 0.93)), ((0.52, 0.67, 0.86), (0.86, 0.89, 0.91)),
    ((0.66, 0.69, 0.73), (0.82, 0.83, 0.84)), ((0.45, 0.47, 0.52), (0.68, 0.68, 0.68)),
    ((0.40, 0.46, 0.66), (0.95, 0.75, 0.57)),
)  # fmt: skip


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
    if not photos:
        return _street(rng) if rng.uniform() < 0.45 else _room(rng)
    wall_m = float(rng.uniform(0.5, 6.0)) if rng.uniform() < 0.6 else np.inf
    far = _photo_piece(rng, photos, _PHOTO_WIDTH, _PHOTO_HEIGHT)
    kind = rng.uniform()
    if kind < 0.45:
        return Background(far, None, 1.0, np.inf)
    if kind < 0.8:
        colors = _FLOOR + _STREET + _MEADOW
        return Background(far, _pattern(rng, colors, int(rng.integers(4))), float(rng.uniform(0.8, 3.0)), wall_m)
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


def _street(rng: np.random.Generator) -> Background:
    """Outdoors: a sky over hills, trees or houses, and stones, asphalt or a meadow that reach the horizon."""
    far = _sky(rng)
    for _ in range(rng.integers(1, 4)):
        (_add_hills, _add_trees, _add_houses)[rng.integers(3)](rng, far)
    if rng.uniform() < 0.5:
        ground = _pattern(rng, _STREET, int(rng.choice([_TILES, _PLAIN])))
    else:
        ground = _pattern(rng, _MEADOW, _PLAIN, roughness=float(rng.uniform(10, 28)))
    return Background(_finished(rng, far), ground, float(rng.uniform(0.8, 3.0)), np.inf)


def _room(rng: np.random.Generator) -> Background:
    """Indoors: a papered, panelled or brick wall with furniture, and a floor that mostly ends at it."""
    far = _wall(rng)
    for _ in range(rng.integers(1, 9)):
        (_add_picture, _add_window, _add_cupboard, _add_lamp)[rng.integers(4)](rng, far)
    # Light falls off from a lamp or a window on one side.
    x, y = np.meshgrid(np.linspace(-1, 1, _FAR_WIDTH), np.linspace(-1, 1, _FAR_HEIGHT))
    far *= np.float32(1) + (rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.1) * y).astype(np.float32)[..., None]
    floor = _pattern(rng, _FLOOR, int(rng.integers(4)))
    wall_m = float(rng.uniform(0.5, 6.0)) if rng.uniform() < 0.85 else np.inf
    return Background(_finished(rng, far), floor, float(rng.uniform(0.8, 3.0)), wall_m)


def _finished(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Out of focus, as what is far away, and stored."""
    return np.clip(cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.6, 3))), 0, 255).astype(np.uint8)


def _color(rng: np.random.Generator, colors: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    """One of some display colours, varied, as stored (0 to 255); now and then, anything."""
    if rng.uniform() < 0.1:
        red, green, blue = rng.uniform(30, 240, 3)
    else:
        chosen = np.array(colors[rng.integers(len(colors))])
        red, green, blue = np.clip(255 * chosen * rng.uniform(0.75, 1.12) * (1 + rng.normal(0, 0.04, 3)), 5, 255)
    return float(red), float(green), float(blue)


def _noise(rng: np.random.Generator, height: int, width: int, octaves: tuple[int, ...] = (8, 32, 128)) -> np.ndarray:
    """Smooth noise (H,W) with mean 0 and about unit range that repeats nowhere in the picture."""
    out = np.zeros((height, width), np.float32)
    for cells in octaves:
        coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        out += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / np.float32(cells) ** 0.35
    return out


def _sky(rng: np.random.Generator) -> np.ndarray:
    """(H,W,3) float32: a gradient, and clouds that get thinner towards the horizon."""
    top, bottom = (255 * np.array(c) * rng.uniform(0.85, 1.1) for c in _SKY[rng.integers(len(_SKY))])
    ramp = np.linspace(0, 1, _FAR_HEIGHT, dtype=np.float32)[:, None, None]
    sky = np.broadcast_to(((1 - ramp) * top + ramp * bottom), (_FAR_HEIGHT, _FAR_WIDTH, 3)).astype(np.float32)
    cover = np.clip(_noise(rng, _FAR_HEIGHT, _FAR_WIDTH) * 1.2 + np.float32(rng.uniform(-1.0, 0.5)), 0, 1)[..., None]
    cover *= (1 - 0.6 * ramp).astype(np.float32)
    sky = sky + np.float32(rng.uniform(0.3, 0.9)) * cover * (np.float32(rng.uniform(200, 255)) - sky)
    return np.ascontiguousarray(sky)  # OpenCV draws into nothing else


def _skyline(rng: np.random.Generator, cells: tuple[int, ...], height: float) -> np.ndarray:
    """(W,) int64 rows at which something ends against the sky; from there it reaches down to the picture's edge."""
    wave = sum(np.interp(np.linspace(0, n - 1, _FAR_WIDTH), range(n), rng.normal(0, 1 / n**0.5, n)) for n in cells)
    return np.clip(_FAR_HEIGHT * (rng.uniform(0.25, 0.45) - height * wave), 0, _FAR_HEIGHT).astype(np.int64)


def _add_below(
    rng: np.random.Generator, picture: np.ndarray, line: np.ndarray, color: np.ndarray, rough: float
) -> None:
    """Fill a picture below a line with a mottled colour."""
    first = int(line.min())
    noise = _noise(rng, _FAR_HEIGHT, _FAR_WIDTH, (16, 64, 200))[first:, :, None]
    mottled = color.astype(np.float32) * (1 + np.float32(rough) * noise)
    below = np.arange(first, _FAR_HEIGHT)[:, None] >= line
    np.copyto(picture[first:], mottled, where=below[..., None])


def _add_hills(rng: np.random.Generator, picture: np.ndarray) -> None:
    haze = rng.uniform(0, 0.6)
    color = (1 - haze) * np.array(_color(rng, _MEADOW[:3])) + haze * picture[_FAR_HEIGHT // 2].mean(0)
    _add_below(rng, picture, _skyline(rng, (5, 11, 40), rng.uniform(0.03, 0.12)), color, rng.uniform(0.03, 0.12))


def _add_trees(rng: np.random.Generator, picture: np.ndarray) -> None:
    color = np.array(_color(rng, _MEADOW[:2])) * rng.uniform(0.5, 0.95)
    _add_below(rng, picture, _skyline(rng, (9, 35, 150, 400), rng.uniform(0.08, 0.16)), color, rng.uniform(0.2, 0.45))


def _add_houses(rng: np.random.Generator, picture: np.ndarray) -> None:
    x = -int(rng.integers(0, 100))
    while x < _FAR_WIDTH:
        width, top = int(rng.integers(60, 260)), int(rng.uniform(0.02, 0.42) * _FAR_HEIGHT)
        if rng.uniform() < 0.85:
            cv2.rectangle(picture, (x, top), (x + width, _FAR_HEIGHT), _color(rng, _PAINT), -1)
            glass = tuple(rng.uniform(40, 190) * np.array([0.9, 1.0, 1.05]))
            step_x, step_y = int(rng.integers(18, 48)), int(rng.integers(24, 56))
            share = rng.uniform(0.35, 0.65)
            for row in range(top + step_y // 3, _FAR_HEIGHT, step_y):
                for column in range(x + step_x // 3, x + width - step_x // 2, step_x):
                    corner = (column + int(share * step_x), row + int(share * step_y))
                    cv2.rectangle(picture, (column, row), corner, glass, -1)
        x += width + int(rng.integers(0, 60))


def _wall(rng: np.random.Generator) -> np.ndarray:
    """(H,W,3) float32: plain, striped paper, panels or bricks."""
    color = np.array(_color(rng, _PAINT), np.float32)
    y, x = np.mgrid[:_FAR_HEIGHT, :_FAR_WIDTH]
    kind, step = rng.uniform(), int(rng.integers(14, 70))
    if kind < 0.45:
        pattern = np.zeros((_FAR_HEIGHT, _FAR_WIDTH))
    elif kind < 0.6:  # paper
        pattern = 0.08 * ((x // step) % 2)
    elif kind < 0.8:  # panels
        pattern = 0.3 * (x % (3 * step) < 3)
    else:  # bricks
        row = y // (step // 2)
        along = x + (row % 2) * (step // 2)
        joint = (y % (step // 2) < 2) | (along % step < 2)
        pattern = 0.06 * np.sin(row * 7.3 + (along // step) * 12.9) - 0.25 * joint
    mottled = 1 - pattern + rng.uniform(0.01, 0.07) * _noise(rng, _FAR_HEIGHT, _FAR_WIDTH)
    return color * mottled.astype(np.float32)[..., None]


def _spot(rng: np.random.Generator, width: tuple[int, int], height: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of something on the wall."""
    x, y = int(rng.integers(-40, _FAR_WIDTH)), int(rng.uniform(0.05, 0.6) * _FAR_HEIGHT)
    return x, y, x + int(rng.integers(*width)), y + int(rng.integers(*height))


def _add_picture(rng: np.random.Generator, picture: np.ndarray) -> None:
    x0, y0, x1, y1 = _spot(rng, (40, 200), (40, 180))
    cv2.rectangle(picture, (x0, y0), (x1, y1), _color(rng, _FURNITURE), -1)
    edge = int(rng.integers(4, 12))
    for _ in range(4):  # whatever it shows
        u, v = sorted(rng.integers(x0 + edge, x1 - edge, 2)), sorted(rng.integers(y0 + edge, y1 - edge, 2))
        cv2.rectangle(picture, (int(u[0]), int(v[0])), (int(u[1]), int(v[1])), _color(rng, _PAINT + _MEADOW), -1)


def _add_window(rng: np.random.Generator, picture: np.ndarray) -> None:
    x0, y0, x1, y1 = _spot(rng, (80, 260), (100, 260))
    frame = _color(rng, _PAINT[:3] + _FURNITURE[:3])
    top, bottom = (tuple(255 * np.array(c)) for c in _SKY[rng.integers(len(_SKY))])
    middle = int(rng.uniform(y0, y1))
    cv2.rectangle(picture, (x0, y0), (x1, middle), top, -1)
    cv2.rectangle(picture, (x0, middle), (x1, y1), bottom, -1)
    thick = int(rng.integers(3, 10))
    cv2.rectangle(picture, (x0, y0), (x1, y1), frame, thick)
    for k in range(1, int(rng.integers(1, 4))):
        column = x0 + k * (x1 - x0) // 3
        cv2.line(picture, (column, y0), (column, y1), frame, thick)


def _add_cupboard(rng: np.random.Generator, picture: np.ndarray) -> None:
    """A cupboard, a shelf or a door: it reaches to the floor, wherever that is."""
    x0, y0, x1, _ = _spot(rng, (60, 320), (1, 2))
    color = np.array(_color(rng, _FURNITURE))
    cv2.rectangle(picture, (x0, y0), (x1, _FAR_HEIGHT), tuple(color), -1)
    for row in range(y0, _FAR_HEIGHT, int(rng.integers(30, 140))):
        cv2.line(picture, (x0, row), (x1, row), tuple(0.6 * color), 3)
    for column in range(x0, x1 + 1, max(10, (x1 - x0) // int(rng.integers(1, 4)))):
        cv2.line(picture, (column, y0), (column, _FAR_HEIGHT), tuple(0.65 * color), 3)


def _add_lamp(rng: np.random.Generator, picture: np.ndarray) -> None:
    x0, y0, x1, y1 = _spot(rng, (20, 90), (20, 90))
    cv2.line(picture, ((x0 + x1) // 2, y1), ((x0 + x1) // 2, _FAR_HEIGHT), _color(rng, _FURNITURE), 5)
    cv2.ellipse(picture, ((x0 + x1) // 2, (y0 + y1) // 2), (x1 - x0, y1 - y0), 0, 180, 360, _color(rng, _PAINT[:3]), -1)


def _pattern(
    rng: np.random.Generator, colors: tuple[tuple[float, ...], ...], kind: int, roughness: float | None = None
) -> np.ndarray:
    """(512,512,3) uint8 to walk on.

    Args:
        colors: to choose from.
        kind: _TILES, _CHEQUERED, _PLANKS or _PLAIN.
        roughness: of the colour, in grey values; drawn if not given.
    """
    size = _GROUND_PX
    base, other = np.array(_color(rng, colors)), np.array(_color(rng, colors))
    y, x = np.mgrid[:size, :size]
    step = size // int(2 ** rng.integers(1, 4))  # divides the size: it is repeated
    if kind == _TILES:
        joint = ((x % step < 6) | (y % step < 6)).astype(np.float32)
        picture = base * (1 - rng.uniform(0.15, 0.5) * joint[..., None])
    elif kind == _CHEQUERED:
        picture = base + (((x // step) + (y // step)) % 2)[..., None] * (other - base) * rng.uniform(0.4, 1)
    elif kind == _PLANKS:
        plank, along = x // (step // 2), rng.normal(0, 1, (1 + 2 * size // step, 1)).astype(np.float32)
        grain = cv2.resize(rng.normal(0, 1, (8, size)).astype(np.float32), (size, size))
        tone = 1 + 0.08 * along[plank, 0] + 0.03 * grain - 0.35 * (x % (step // 2) < 3)
        picture = base * tone[..., None]
    else:
        picture = np.broadcast_to(base, (size, size, 3))
    if roughness is None:
        roughness = float(rng.uniform(1, 14))
    return np.clip(picture + roughness * _noise(rng, size, size, (16, 64, 256))[..., None], 0, 255).astype(np.uint8)
