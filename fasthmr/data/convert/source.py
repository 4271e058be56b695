"""The common loop of all converters: what is there, cut into clips, written as shards, reported."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from tqdm import tqdm

from fasthmr.body import BodyModel
from fasthmr.data.convert.reading import ConvertError, inside
from fasthmr.data.convert.track import BAD_PICTURE, KEPT, OFF, UNUSABLE_FRAME, Crops, Tracks, make_clips
from fasthmr.data.index import Manifest, ShardIndex
from fasthmr.data.schema import Clip, Gender
from fasthmr.data.shards import Dropped, is_complete

#: raised whenever the same download gives other clips than before
_VERSION = 3
#: how many of a kind are named in a report
_NAMED = 5
#: name of the report in a converted set
REPORT = "report.json"
MISSING, UNUSABLE, UNLABELLED = "missing picture", "labels that cannot be used", "picture without labels"


@dataclass(frozen=True)
class Need:
    """A part of a download: where it lies under the root (a pattern of `Path.glob`), what it is, where it is from."""

    pattern: str
    what: str
    source: str


class ForeignSet(Protocol):
    """A data set as its makers distribute it. Frozen dataclasses: hashable, and pickled to worker processes.

    Attributes:
        root: where the user put it.
        split: which part of it.
        title, licence: for people.
        splits: the parts there are; the first is the default.
        longest: frames of the longest clip by default; 0: whole tracks, for sets that are evaluated on.
    """

    title: ClassVar[str]
    licence: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    longest: ClassVar[int]

    def __hash__(self) -> int: ...

    @property
    def root(self) -> Path: ...

    @property
    def split(self) -> str: ...

    def needs(self) -> Sequence[Need]:
        """What must be there."""
        ...

    def units(self) -> list[str]:
        """The label files, relative to the root: what is read at once, and dealt out to the jobs of a cluster."""
        ...

    def open(self, unit: str) -> Tracks:
        """The tracks of a unit, made when asked for; no picture is read.

        Raises:
            ConvertError: the unit is damaged, or not of this format.
        """
        ...


def check(foreign: ForeignSet) -> None:
    """Look for what must be there.

    Raises:
        ConvertError: naming all that is missing, and where it is to be had.
    """
    if foreign.split not in foreign.splits:
        raise ConvertError(f"split must be one of {', '.join(foreign.splits)}, got {foreign.split!r}")
    if not foreign.root.is_dir():
        raise ConvertError(f"there is no folder {foreign.root}: {foreign.title} goes there (docs/convert.md)")
    missing = [n for n in foreign.needs() if next(foreign.root.glob(n.pattern), None) is None]
    if missing:
        told = "; ".join(f"{n.pattern} ({n.what}, from {n.source})" for n in missing)
        raise ConvertError(f"{foreign.root} lacks {told}. {foreign.licence}")


@dataclass
class Report:
    """What became of a download. `dropped`: reason -> how often; `named`: reason -> the first few;
    `frames_without_labels`: reason -> how many frames are kept with `valid` off. Each frame counts once."""

    units: int = 0
    tracks: int = 0
    clips: int = 0
    frames: int = 0
    frames_without_labels: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str, times: int = 1) -> None:
        """Count something that is left out."""
        self.dropped[reason] += times
        named = self.named.setdefault(reason, [])
        if len(named) < _NAMED:
            named.append(name)

    def names(self, reason: str) -> str:
        """The first few that were left out for a reason, and dots if there are more."""
        named = self.named.get(reason, [])
        return "; ".join(named) + ("; ..." if self.dropped[reason] > len(named) else "")

    def add(self, other: Report) -> None:
        """Add what another job counted."""
        for name in ("units", "tracks", "clips", "frames"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.frames_without_labels.update(other.frames_without_labels)
        for reason, times in other.dropped.items():
            self.dropped[reason] += times
            self.named[reason] = (self.named.get(reason, []) + other.named.get(reason, []))[:_NAMED]

    def lines(self) -> Iterator[str]:
        """The report for people."""
        yield f"{self.units} label files, {self.tracks} tracks -> {self.clips} clips, {self.frames} frames"
        for reason, times in sorted(self.frames_without_labels.items()):
            yield f"kept without labels: {times} frames: {reason}"
        for reason, times in sorted(self.dropped.items()):
            yield f"left out: {times} x {reason}: {self.names(reason)}"

    @classmethod
    def read(cls, folder: Path, name: str = REPORT) -> Report:
        content = json.loads((folder / name).read_text())
        return cls(**content | {name: Counter(content[name]) for name in ("dropped", "frames_without_labels")})

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=1)

    def require_usable(self, most: float, pictures: int = 0) -> None:
        """Refuse a download of which more than the share `most` cannot be used: of its tracks, or of its pictures.

        Args:
            most: the share.
            pictures: how many were planned; 0 as long as none was read.

        Raises:
            ConvertError: naming the first few.
        """
        for reason, what, total, again in (
            (UNUSABLE, "tracks have labels that", self.tracks, "again"),
            (BAD_PICTURE, "pictures or masks", pictures, "again, convert anew"),
        ):
            if (times := self.dropped[reason]) > most * total:
                raise ConvertError(
                    f"{times} of {total} {what} cannot be used ({self.names(reason)}): are they of this "
                    f"format? Download them {again}, or leave them out with --max_unusable"
                )


@dataclass(frozen=True)
class _Piece:
    """A clip to be: frames `first` to `last` of track number `track` of a unit."""

    unit: str
    track: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """The clips that a download will make, and what was left out of them so far."""

    pieces: list[_Piece]
    genders: list[Gender]
    report: Report


def plan(foreign: ForeignSet, units: Sequence[str], longest: int, workers: int = 1, progress: bool = False) -> Plan:
    """Read all labels once, look which pictures are there, and cut tracks into clips.

    Raises:
        ConvertError: a label file is damaged, or not of this format; or two tracks have one name.
    """
    pieces: list[_Piece] = []
    genders: set[Gender] = set()
    keys: Counter[str] = Counter()
    report = Report()
    with map_in_processes(min(workers, len(units))) as apply:
        jobs = apply(_plan_unit, [(foreign, unit, longest) for unit in units])
        for part, names in tqdm(jobs, total=len(units), unit="file", desc="reading labels", disable=not progress):
            pieces += part.pieces
            genders |= {*part.genders}
            keys.update(names)
            report.add(part.report)
    if twice := [key for key, times in keys.items() if times > 1]:  # found now, not when all clips are written
        raise ConvertError(f"{len(twice)} names are those of several tracks, such as {twice[0]!r}: rename their files")
    return Plan(pieces, sorted(genders), report)


@contextmanager
def map_in_processes(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map`, in this process or in several; the results come in order."""
    if workers <= 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _plan_unit(job: tuple[ForeignSet, str, int]) -> tuple[Plan, list[str]]:
    """The clips of a unit, and the keys of its tracks."""
    foreign, unit, longest = job
    report, pieces, genders, keys = Report(units=1), [], set(), []
    there, tracks = _Listing(foreign.root), foreign.open(unit)
    report.tracks = len(tracks)
    for number in range(len(tracks)):
        try:
            track = tracks[number]
        except ConvertError as error:
            report.drop(UNUSABLE, str(error))
            continue
        keys.append(track.key)
        usable = np.array([picture.size is not None or there.has(picture.path) for picture in track.pictures])
        if not usable.all():
            name = track.pictures[int(np.argmin(usable))].path
            report.drop(MISSING, name, int((~usable).sum()))
        found = list(track.pieces(longest, usable))
        pieces += [_Piece(unit, number, first, last) for first, last in found]
        report.clips += len(found)
        report.frames += int(usable.sum())
        if without := int((usable & ~track.labelled()).sum()):
            report.frames_without_labels[UNUSABLE_FRAME] += without
        genders.add(track.gender)
    for name in tracks.unlabelled:
        report.drop(UNLABELLED, name)
    return Plan(pieces, sorted(genders), report), keys


class _Listing:
    """Which files there are, one look at each folder: a stat each would be slow on network disks."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[Path, set[str]] = {}

    def has(self, name: str) -> bool:
        path = inside(self._root, name)
        if path.parent not in self._folders:
            try:
                with os.scandir(path.parent) as entries:
                    found = {e.name for e in entries}
            except OSError:
                found = set()
            self._folders[path.parent] = found
        return path.name in self._folders[path.parent]


@lru_cache(maxsize=1)
def _opened(foreign: ForeignSet, unit: str) -> Tracks:
    return foreign.open(unit)


class ConvertedSource:
    """A `ClipSource` of the clips of a foreign set.

    Args:
        foreign: the set.
        clips: from `plan`.
        bodies: by gender; must have all that `clips.genders` lists.
        crops: how crops are stored.
        max_unusable: share of the planned pictures that may turn out unusable, in all processes of this job together;
            other jobs of a cluster count only as far as they were finished when this one began.
        unusable: what did already, from `unusable_pictures`.
    """

    def __init__(
        self,
        foreign: ForeignSet,
        clips: Plan,
        bodies: Mapping[Gender, BodyModel],
        crops: Crops,
        max_unusable: float = 1.0,
        unusable: Sequence[str] = (),
    ) -> None:
        self._foreign, self._plan, self._bodies, self._crops = foreign, clips, dict(bodies), crops
        self._max_unusable, self._unusable = max_unusable, get_context("spawn").Value("q", len(unusable))
        self._named = list(unusable[:_NAMED])  # those that other processes find are only counted

    def __len__(self) -> int:
        return len(self._plan.pieces)

    def make(self, index: int) -> list[Clip | Dropped]:
        """Piece `index`: one clip; more or none if pictures are damaged.

        Raises:
            ConvertError: by now more pictures than `max_unusable` cannot be used.
        """
        made = self._make(index)
        if found := _pictures(one.why for one in made if isinstance(one, Dropped)):
            self._named = (self._named + found)[:_NAMED]
            with self._unusable.get_lock():
                self._unusable.value += len(found)
                times = self._unusable.value
            so_far = Report(dropped=Counter({BAD_PICTURE: times}), named={BAD_PICTURE: self._named})
            so_far.require_usable(self._max_unusable, self._plan.report.frames)
        return made

    def _make(self, index: int, frames: int | None = None) -> list[Clip | Dropped]:
        """Piece `index`, or its first `frames`."""
        piece = self._plan.pieces[index]
        track = _opened(self._foreign, piece.unit)[piece.track]
        last = piece.last if frames is None else min(piece.last, piece.first + frames)
        return make_clips(track, piece.first, last, self._foreign.root, self._bodies, self._crops)

    def describe(self) -> dict[str, Any]:
        """What the clips depend on: the label files by size, not by path."""
        units = dict.fromkeys(piece.unit for piece in self._plan.pieces)
        return {
            "kind": type(self._foreign).__name__,
            "version": _VERSION,
            "split": self._foreign.split,
            "body": self._bodies["neutral"].id,
            "bodies": {g: b.id for g, b in self._bodies.items() if g != "neutral"},
            "labels": [f"{unit}:{inside(self._foreign.root, unit).stat().st_size}" for unit in units],
            "clips": len(self),
            "frames": self._plan.report.frames,
            **asdict(self._crops),
        }

    def seconds(self, clips: int = 3, frames: int = 60) -> tuple[float, list[Clip | Dropped]]:
        """Seconds that converting all will take on one core, from trying a few clips, and what became of them."""
        made: list[Clip | Dropped] = []
        took, done = 0.0, 0
        chosen = np.unique(np.linspace(0, len(self) - 1, clips).astype(int)).tolist()
        for warm, index in enumerate([chosen[0], *chosen]):  # the first one is not timed: pictures come from the disk
            piece = self._plan.pieces[index]
            start = time.perf_counter()
            tried = self._make(index, frames)
            if warm:
                took += time.perf_counter() - start
                done += min(frames, piece.last - piece.first)
                made += tried
        return took / done * self._plan.report.frames, made


def unusable_pictures(folder: Path) -> list[str]:
    """The pictures or masks that could not be used for the shards that are finished.

    Raises:
        ShardError: the index of a shard is damaged.
    """
    finished = (ShardIndex.read(tar) for tar in sorted(folder.glob("shard-*.tar")) if is_complete(tar))
    return [name for shard in finished for name in _pictures(shard.dropped)]


def _pictures(dropped: Iterable[str]) -> list[str]:
    """Those that are pictures or masks, without the reason."""
    return [why.removeprefix(f"{BAD_PICTURE}: ") for why in dropped if why.startswith(BAD_PICTURE)]


def written_report(planned: Report, folder: Path, manifest: Manifest) -> Report:
    """The plan's report, with what writing the shards left out or switched off, and what they hold."""
    total = Report()
    total.add(planned)
    total.clips, total.frames = manifest.clips, manifest.frames
    total.frames_without_labels.clear()  # the plan knew fewer reasons, and counted clips that were left out
    for name in sorted(manifest.shards):
        for why in ShardIndex.read(folder / name).dropped:
            if not (off := OFF.match(why)):
                reason, _, what = why.partition(": ")
                total.drop(reason, what)
            elif off["fate"] == KEPT:
                total.frames_without_labels[off["reason"]] += int(off["times"])
            else:
                total.drop(f"frame of a clip without any labels ({off['reason']})", off["key"], int(off["times"]))
    return total
