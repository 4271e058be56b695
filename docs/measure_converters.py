"""How fast `python -m fasthmr.shard convert` is on one core, for every format it reads: the table of docs/convert.md.

    python docs/measure_converters.py OUT [--frames 40] [SET ...]

Miniature sets are written under OUT, by the tests' writers, measured and removed. Their pictures have the size and kind
of the real ones' and are as hard to decode as photographs. Each set is written twice, with FEW frames and with
`--frames` more: what the second takes longer is what frames cost, and the rest is start-up. CPU time, one worker, one
thread, files from the page cache; the median of several pairs of runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch

from fasthmr.body import load_body
from fasthmr.data.convert import masks, track
from fasthmr.data.convert.reading import read_picture
from fasthmr.data.convert.source import REPORT
from fasthmr.data.synth.backgrounds import random_background
from fasthmr.shard import main as shard

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import foreign_sets as foreign

#: frames of the smaller set; as stills they fill a contact sheet, as more would
FEW = 8
#: pictures that are drawn; a longer take shows them over and over
_DISTINCT = 8
#: AMASS's rows for one frame elsewhere: motion is so much faster to convert
_ROWS_PER_FRAME = 400
#: a motion of AMASS: 10 s at 120 fps
_ROWS_OF_MOTION = 1200


@dataclass(frozen=True)
class Format:
    """A set as the command reads it.

    `labels` says which of a set's formats, `write` makes a root with so many frames.
    """

    name: str
    labels: str
    split: str | None
    pictures: str
    write: Callable[[Path, int], object]


# ---- pictures ------------------------------------------------------------------------------------------------------


def photograph(width: int, height: int) -> np.ndarray:
    """(H,W,3) uint8 RGB: a synthetic background, enlarged, with detail whose amplitude falls as 1/frequency, as that of
    photographs does, and a sensor's noise. As JPEG about 0.5 bytes a pixel, which is what COCO's photographs take."""
    rng = np.random.default_rng(0)
    far = random_background(rng, ()).far
    scale = max(width / far.shape[1], height / far.shape[0])
    picture = cv2.resize(far, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)[:height, :width]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    detail = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width))
    noise = 14 * (detail / detail.std())[..., None] + 1.5 * rng.standard_normal((height, width, 3))
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Film(foreign.Take):
    """A short take, over and over: a person who wears one part of a photograph before another."""

    once: foreign.Take

    @cached_property
    def masks(self) -> list[np.ndarray]:
        return [self.once.masks[i % _DISTINCT] for i in range(len(self))]

    @cached_property
    def images(self) -> list[np.ndarray]:
        photo = photograph(*self.size)
        wide = self.size[0]
        shown = [
            np.where(mask[..., None], np.roll(photo, wide // 2 + i, 1), np.roll(photo, i * wide // _DISTINCT, 1))
            for i, mask in enumerate(self.once.masks)
        ]
        return [shown[i % _DISTINCT] for i in range(len(self))]


@lru_cache(maxsize=1)
def take_once(size: tuple[int, int]) -> foreign.Take:
    return foreign.take(load_body("free"), _DISTINCT, size=size, still=True)


def film(frames: int, size: tuple[int, int]) -> Film:
    once, again = take_once(size), np.arange(frames) % _DISTINCT
    return Film(
        once.body, once.pose[again], once.trans[again], once.betas, once.camera[again], once.intrinsics, size, once
    )


# ---- sets ----------------------------------------------------------------------------------------------------------


def of_pictures(
    name: str, labels: str, split: str | None, size: tuple[int, int], kind: str, write: Callable[[Path, Film], object]
) -> Format:
    pictures = f"{size[0]}x{size[1]} {kind}"
    return Format(name, labels, split, pictures, lambda root, frames: write(root, film(frames, size)))


def write_threedpw(root: Path, made: Film) -> None:
    foreign.write_threedpw(root, [made], ["m"], np.ones((1, len(made))))


def write_bedlam(root: Path, made: Film, with_masks: bool) -> None:
    foreign.write_bedlam(root, "scene", made, with_masks=with_masks)


def write_bedlam2(root: Path, made: Film) -> None:
    foreign.write_bedlam(root, "scene", made, step=1, shape=np.tile(np.append(made.betas, np.ones(6)), (len(made), 1)))


def write_4dhumans(root: Path, made: Film, with_masks: bool) -> None:
    members: dict[str, bytes] = {}
    for i in range(len(made)):
        people = [foreign.hmr2_person(made, i)]
        members |= foreign.hmr2_members(f"{i:06d}", made, i, people, with_masks)
    foreign.write_tar(root / "coco-train/000000.tar", members)


def write_amass(root: Path, frames: int) -> None:
    rows = frames * _ROWS_PER_FRAME
    for number, first in enumerate(range(0, rows, _ROWS_OF_MOTION)):
        made = foreign.take(load_body("free"), min(_ROWS_OF_MOTION, rows - first), seed=number, up="z")
        foreign.write_amass(root / f"CMU/01/01_{number:03d}_poses.npz", made)


FORMATS = (
    of_pictures("threedpw", "", "test", (1920, 1080), "JPEG", write_threedpw),
    of_pictures("emdb", "", "emdb1", (1440, 1920), "JPEG", foreign.write_emdb),
    of_pictures("bedlam", "BEDLAM", None, (1280, 720), "PNG", partial(write_bedlam, with_masks=False)),
    of_pictures("bedlam", "BEDLAM, with masks", None, (1280, 720), "PNG", partial(write_bedlam, with_masks=True)),
    of_pictures("bedlam", "BEDLAM2", None, (1280, 720), "PNG", write_bedlam2),
    of_pictures("4dhumans", "", None, (640, 480), "JPEG", partial(write_4dhumans, with_masks=False)),
    of_pictures("4dhumans", "with masks", None, (640, 480), "JPEG", partial(write_4dhumans, with_masks=True)),
    of_pictures("camerahmr", "", None, (640, 480), "JPEG", foreign.write_camerahmr),
    of_pictures("h36m", "HybrIK's", "train", (1000, 1000), "JPEG", foreign.write_h36m_hybrik),
    of_pictures("h36m", "NeuralAnnot's", "train", (1000, 1000), "JPEG", foreign.write_h36m_neural_annot),
    of_pictures("mpi_inf_3dhp", "NeuralAnnot's", "neural_annot", (2048, 2048), "JPEG", foreign.write_3dhp_neural_annot),
    of_pictures("mpi_inf_3dhp", "HybrIK's", "hybrik", (2048, 2048), "JPEG", foreign.write_3dhp_hybrik),
    of_pictures("mpi_inf_3dhp", "SPIN's", "spin", (2048, 2048), "JPEG", foreign.write_3dhp_spin),
    of_pictures("mpi_inf_3dhp", "its own", "raw", (2048, 2048), "JPEG", foreign.write_3dhp_raw),
    Format("amass", "SMPL-H, 120 fps", None, "none", write_amass),
)


# ---- measuring -----------------------------------------------------------------------------------------------------


def convert(format: Format, root: Path, out: Path) -> None:
    """Run the command.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    arguments = ["convert", format.name, "--root", str(root), "--out", str(out), "--workers", "1"]
    arguments += ["--body_male", "free", "--body_female", "free", *(["--split", format.split] if format.split else [])]
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        code = shard(arguments)
    if code:
        raise RuntimeError(f"convert {format.name} failed: {said.getvalue()}")


@contextmanager
def clock(*modules: Any) -> Iterator[list[float]]:
    """CPU seconds of each call of `read_picture` in these modules."""
    took: list[float] = []

    def timed(*arguments: Any) -> np.ndarray:
        start = time.process_time()
        picture = read_picture(*arguments)
        took.append(time.process_time() - start)
        return picture

    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(patch.object(module, "read_picture", timed))
        yield took


def spent(format: Format, root: Path, out: Path) -> tuple[float, float]:
    """CPU seconds of a conversion, and of decoding in it."""
    start = time.process_time()
    with clock(track, masks) as decoding:
        convert(format, root, out)
    return time.process_time() - start, sum(decoding)


def kilobytes(folder: Path, pattern: str) -> float:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file()) / 1000


def frames_in(out: Path) -> int:
    frames: int = json.loads((out / REPORT).read_text())["frames"]
    return frames


def rounded(number: float) -> str:
    """Three digits that count."""
    return f"{float(f'{number:.3g}'):g}"


def measure(format: Format, folder: Path, frames: int, runs: int) -> str:
    """One row of the table."""
    few, more = folder / "few", folder / "more"
    format.write(few, FEW)
    format.write(more, FEW + frames)
    convert(format, few, folder / "warm")  # what is loaded once is not counted
    took = np.array(
        [[spent(format, root, folder / f"{root.name}{run}") for root in (few, more)] for run in range(runs)]
    )
    small, large = frames_in(folder / "few0"), frames_in(folder / "more0")
    total_s, decoding_s = np.median(took[:, 1] - took[:, 0], 0) / (large - small)
    start_up_s = np.median(took[:, 0, 0]) - small * total_s
    written = kilobytes(folder / "more0", "*.npz" if format.name == "amass" else "*.tar") / large
    return (
        f"| {format.name} | {format.labels or '-'} | {format.pictures} | {rounded(kilobytes(more, '*') / large)} "
        f"| {large - small} | {rounded(1 / total_s)} | {100 * decoding_s / total_s:.0f} % | {rounded(written)} "
        f"| {start_up_s:.1f} |"
    )


def machine() -> str:
    """The processor, and the versions of what converts."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ("torch", "numpy", "opencv-python-headless")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{cpu}, one core; Python {platform.python_version()}, {versions}"


def main(arguments: list[str] | None = None) -> None:
    names = list(dict.fromkeys(format.name for format in FORMATS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the miniature sets: up to 0.2 GB at a time")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--frames", type=int, default=40, help="that are measured, of each set")
    parser.add_argument("--runs", type=int, default=3, help="of each set")
    options = parser.parse_intermixed_args(arguments)
    if unknown := set(options.sets) - set(names):
        parser.error(f"SET must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    print()
    print(
        "| set | labels | pictures | read, kB a frame | frames | frames/s | decoding | written, kB a frame | once, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for format in FORMATS:
        if not options.sets or format.name in options.sets:
            with tempfile.TemporaryDirectory(dir=options.out) as folder:
                print(measure(format, Path(folder), options.frames, options.runs), flush=True)


if __name__ == "__main__":
    main()
