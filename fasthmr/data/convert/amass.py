"""AMASS (Mahmood et al. 2019): motion without pictures, packed into files that `--motion` reads.

    SUBSET/SUBJECT/NAME_poses.npz | NAME_stageii.npz     SMPL-H, SMPL-X or SMPL, z up, any rate

`--motion` reads AMASS's own folders as well. A pack is for training at scale: one file a subset instead of thousands,
at 30 fps instead of up to 250, SMPL's 24 joints instead of hands and faces, y up, on the floor. What a file must hold,
and what is skipped, is said in `fasthmr.data.synth.amass`, which does the reading. Headings are arbitrary, as AMASS's.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fasthmr.data.convert.reading import ConvertError
from fasthmr.data.convert.source import UNUSABLE, Report, map_in_processes
from fasthmr.data.synth.amass import MotionFolder
from fasthmr.data.synth.motion import Motion, MotionError
from fasthmr.files import write_text, written_whole

LICENCE = "AMASS is for non-commercial research: register at https://amass.is.tue.mpg.de"
#: of packs
FPS = 30.0
_NO_MOTION = ("shape", "_stagei")


@dataclass(frozen=True)
class Subset:
    """A folder of AMASS and its files, in order."""

    name: str
    files: tuple[Path, ...]


def find_subsets(root: Path) -> list[Subset]:
    """The folders directly under `root`, with the npz files in each.

    Raises:
        ConvertError: there are none.
    """
    if not root.is_dir():
        raise ConvertError(f"there is no folder {root}: AMASS goes there, a folder a subset. {LICENCE}")
    found = [Subset(f.name, tuple(sorted(f.rglob("*.npz")))) for f in sorted(root.iterdir()) if f.is_dir()]
    found = [subset for subset in found if subset.files]
    if not found:
        raise ConvertError(f"{root} lacks SUBSET/SUBJECT/*_poses.npz or *_stageii.npz (motions). {LICENCE}")
    return found


def seconds(subsets: Sequence[Subset]) -> float:
    """Seconds that packing will take on one core, from trying the middle file of a few subsets."""
    tried = subsets[:: max(1, len(subsets) // 3)]
    _motion(tried[0].files[0])  # what is done once is not counted
    start = time.perf_counter()
    done = sum(path.stat().st_size for path in (s.files[len(s.files) // 2] for s in tried) if _motion(path))
    rate = done / (time.perf_counter() - start)
    return sum(path.stat().st_size for subset in subsets for path in subset.files) / rate


def pack(root: Path, subset: Subset, target: Path, workers: int, max_unusable: float, progress: bool = True) -> Report:
    """Write a subset as one pack, with its report beside it; if both are there already, only read the report.

    Returns:
        The report; a file that cannot be read is named in it.

    Raises:
        ConvertError: more than the share `max_unusable` of the files cannot be read; nothing is written.
    """
    told = target.with_suffix(".report.json")
    if target.exists() and told.exists():
        report = Report.read(told.parent, told.name)
        report.require_usable(max_unusable)
        return report
    report = Report(units=1, tracks=len(subset.files))
    motions: list[Motion] = []
    with map_in_processes(min(workers, len(subset.files))) as apply:
        results = apply(_motion, subset.files)
        for path, result in zip(
            subset.files, tqdm(results, total=len(subset.files), desc=subset.name, disable=not progress), strict=True
        ):
            if isinstance(result, Motion):
                motions.append(result)
                report.clips, report.frames = report.clips + 1, report.frames + len(result)
            else:
                reason, what = result
                report.drop(reason, what or path.relative_to(root).as_posix())
    report.require_usable(max_unusable)
    if motions:
        write_pack(target, [m.name for m in motions], motions)
    write_text(told, report.to_json())
    return report


def _motion(path: Path) -> Motion | tuple[str, str]:
    """The whole motion of a file; or why there is none, and what is wrong with the file if anything is."""
    if path.stem == _NO_MOTION[0] or path.stem.endswith(_NO_MOTION[1]):
        return "a body's shape, no motion", ""
    try:
        folder = MotionFolder(path)
        frames = folder.num_windows(1, FPS)
        motion = folder.window(0, frames, FPS, np.random.default_rng(0))
    except MotionError as error:
        return ("shorter than 25 frames", "") if "shorter than 25 frames" in str(error) else (UNUSABLE, str(error))
    except zlib.error as error:
        return UNUSABLE, f"{path} cannot be unpacked: {error}"
    return Motion(motion.pose, motion.translation, motion.fps, path.stem)


def write_pack(target: Path, names: Sequence[str], motions: Sequence[Motion]) -> None:
    """Write motions of one rate as a pack, whole or not at all."""
    with written_whole(target) as file:
        np.savez_compressed(
            file,
            clip=np.array(names),
            start=np.cumsum([0, *map(len, motions)]),
            poses=np.concatenate([m.pose.reshape(len(m), -1) for m in motions]),
            trans=np.concatenate([m.translation for m in motions]),
            mocap_framerate=np.array(FPS),
            up_axis=np.array("y"),
            licence=np.array(LICENCE),
        )
