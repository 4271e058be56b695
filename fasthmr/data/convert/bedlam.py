"""BEDLAM and BEDLAM2 (Black et al. 2023; Tesch et al. 2025): rendered people; and CameraHMR's labels in BEDLAM's keys.

    labels/SCENE.npz                                    the "processed" labels, a file a scene
    images/SCENE/png/seq_000000/seq_000000_0000.png     or without png/, as `imgname` says
    masks/SCENE/seq_000000/seq_000000_0000_00_body.png  optional; _clothing, _hair likewise, 00 counts the people

Of an npz are read, a row for a person in a picture: `imgname`, `center` (N,2), `scale` (N,) = side / 200, `pose_cam`
(N,72) of SMPL or (N,165) of SMPL-X, `shape` (N,10), (N,11) for neutral bodies or (N,16), `trans_cam` (N,3), `cam_int`
(N,3,3), `cam_ext` (N,4,4), `gtkps` (N,J,2 or 3), `gender`, `sub`. In the camera frame the body stands at `trans_cam` +
`cam_ext[:3,3]`; `pose_cam` is in the camera frame already. Scenes with `closeup` (BEDLAM) or `portrait` (BEDLAM2) in
their name are stored lying on their side: the pictures are turned by 90 degrees clockwise, the labels are upright.

Picture numbers count at 30 fps; BEDLAM's labels have every fifth. Rows of one `sub` in one folder are a track; it is
cut where a picture number is left out, and where the camera zooms.

SMPL-X labels are of no SMPL body: of them the rotations of the 21 body joints are kept, as pseudo labels, and the
keypoints. Labels of 16 shapes are cut to 10, and are then pseudo labels. A file without `sub` or `cam_ext` is of single
pictures, as CameraHMR's are: it makes no tracks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from fasthmr.conventions import JOINTS29, NUM_BETAS, NUM_JOINTS
from fasthmr.data.convert.masks import Layers
from fasthmr.data.convert.reading import ConvertError, Picture, inside, numbers, read_npz, text
from fasthmr.data.convert.source import Need
from fasthmr.data.convert.track import GENDERS, Track, Tracks, clean_key, gender_of
from fasthmr.data.crops import CROP_SCALE
from fasthmr.data.schema import Gender, Status

_SITE = "https://bedlam.is.tue.mpg.de (BEDLAM2: https://bedlam2.is.tue.mpg.de)"
_RENDERED_FPS = 30.0
#: names of scenes whose pictures lie on their side
_LYING = ("closeup", "portrait")
_SMPLX_BODY_JOINTS = 22
#: what rows of films have beside those of single pictures
_OF_FILMS = ("cam_ext", "sub")
_FROM_SMPL = ("joints2d", "joints3d", "pose", "betas", "translation")


@dataclass(frozen=True)
class Bedlam:
    """BEDLAM or BEDLAM2 under `root`."""

    title: ClassVar[str] = "BEDLAM"
    licence: ClassVar[str] = f"BEDLAM is for non-commercial research: register at {_SITE}"
    splits: ClassVar[tuple[str, ...]] = ("all",)
    longest: ClassVar[int] = 128
    stills: ClassVar[bool] = False
    status: ClassVar[Status] = "ground_truth"

    root: Path
    split: str

    def needs(self) -> Sequence[Need]:
        return (
            Need("labels/*.npz", "labels in SMPL parameters", _SITE),
            Need("images/*", "pictures", _SITE),
        )

    def units(self) -> list[str]:
        return [p.relative_to(self.root).as_posix() for p in sorted((self.root / "labels").glob("*.npz"))]

    def open(self, unit: str) -> Tracks:
        return _Scene(self, unit)


@dataclass(frozen=True)
class CameraHmr(Bedlam):
    """CameraHMR's training labels of single pictures (`*-release.npz`: AI Challenger, COCO, MPII, Instagram)."""

    title: ClassVar[str] = "CameraHMR's labels"
    licence: ClassVar[str] = "CameraHMR's labels are for non-commercial research; the pictures have their own licences"
    longest: ClassVar[int] = 1
    stills: ClassVar[bool] = True
    status: ClassVar[Status] = "pseudo"

    def needs(self) -> Sequence[Need]:
        site = "https://camerahmr.is.tue.mpg.de"
        return (
            Need("labels/*.npz", "labels", site),
            Need("images/*", "the data sets' own pictures, a folder a label file", site),
        )


class _Scene:
    """The tracks of an npz; a track is made when it is asked for, because a file may have a million rows."""

    unlabelled = ()  # what is no row is not known

    def __init__(self, foreign: Bedlam, unit: str) -> None:
        self._foreign, self._unit = foreign, unit
        self.name = PurePosixPath(unit).stem.removesuffix("-release")
        self._labels = read_npz(
            inside(foreign.root, unit),
            ("imgname", "center", "scale", "pose_cam", "shape", "trans_cam", "cam_int"),
            (*_OF_FILMS, "gtkps", "gender"),
        )
        if not foreign.stills and (lacking := [name for name in _OF_FILMS if name not in self._labels]):
            raise ConvertError(
                f"{unit} has no {' and no '.join(lacking)}, which {foreign.title}'s labels have. If it is CameraHMR's, "
                "of single pictures, use `convert camerahmr`"
            )
        names = self._labels["imgname"]
        self._names = list(map(text, names.tolist()))
        rows = len(names)
        for key, array in self._labels.items():
            if len(array) != rows:
                raise ConvertError(f"{unit}: {key} has {len(array)} rows, imgname has {rows}")

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> Track:
        return self._track(*self._groups[number])

    @cached_property
    def _groups(self) -> list[tuple[str, np.ndarray, float]]:
        """(key, rows in order, fps) of each track."""
        if self._foreign.stills:
            return [(f"{self.name}_{i:07d}", np.array([i]), 1.0) for i in range(len(self._names))]
        people: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for row, (name, sub) in enumerate(zip(self._names, self._labels["sub"].tolist(), strict=True)):
            folder, number = _folder_and_number(name, self._unit)
            people.setdefault((folder, str(sub)), []).append((number, row))
        groups: list[tuple[str, np.ndarray, float]] = []
        times: Counter[str] = Counter()
        for (folder, sub), found in people.items():
            found.sort()
            for run in _runs(found):
                pictures, rows = np.array(run).T
                step = int(pictures[1] - pictures[0]) if len(run) > 1 else 1
                key = f"{self.name}_{folder.replace('/', '_')}_{sub}_{pictures[0]:05d}"
                times[key] += 1  # two of one `sub` in a picture make two tracks of one name
                groups.append((f"{key}_{times[key]}" if times[key] > 1 else key, rows, _RENDERED_FPS / step))
        return groups

    def _track(self, key: str, rows: np.ndarray, fps: float) -> Track:
        labels = {name: array[rows] for name, array in self._labels.items() if name not in ("imgname", "gender", "sub")}
        count, where = len(rows), self._unit
        # the originals feed `center`, `scale` to the network as they are: ours crops at CROP_SCALE times the box
        size = 200 * numbers(labels, "scale", (count,), where) / CROP_SCALE
        status: dict[str, Status] = dict.fromkeys(_FROM_SMPL, self._foreign.status)
        shape = numbers(labels, "shape", (count, None), where)
        given: dict[str, np.ndarray | None] = {}
        if labels["pose_cam"].shape[1:] == (3 * NUM_JOINTS,):
            given["pose"] = numbers(labels, "pose_cam", (count, 3 * NUM_JOINTS), where).reshape(count, NUM_JOINTS, 3)
            given["betas"] = shape[:, :NUM_BETAS]
            given["translation"] = numbers(labels, "trans_cam", (count, 3), where)
            if "cam_ext" in labels:
                given["translation"] = given["translation"] + numbers(labels, "cam_ext", (count, 4, 4), where)[:, :3, 3]
            if np.nan_to_num(shape[:, NUM_BETAS + (shape.shape[1] == 11) :]).any():
                status |= dict.fromkeys(set(_FROM_SMPL) - {"pose"}, "pseudo")
        else:
            smplx = numbers(labels, "pose_cam", (count, 165), where).reshape(count, 55, 3)
            pose = np.zeros((count, NUM_JOINTS, 3))
            pose[:, :_SMPLX_BODY_JOINTS] = smplx[:, :_SMPLX_BODY_JOINTS]
            given["pose"], status["pose"] = pose, "pseudo"
            given["joints2d"] = self._keypoints(labels, count)
        return Track(
            key=clean_key(key),
            source=f"{self._foreign.title}:{self.name}/{self._names[rows[0]]}",
            fps=fps,
            pictures=[Picture(f"{self._images}/{self._names[row]}") for row in rows],
            valid=np.ones(count, bool),
            gender=self._gender(int(rows[0]), shape.shape[1]),
            quarter_turns=int(any(word in self.name for word in _LYING)),
            intrinsics=numbers(labels, "cam_int", (count, 3, 3), where),
            center=numbers(labels, "center", (count, 2), where),
            size=size,
            mask=self._masks(rows, labels),
            status=status,
            **given,
        )

    @cached_property
    def _images(self) -> str:
        """The folder that `imgname` counts from."""
        for folder in (f"images/{self.name}/png", f"images/{self.name}", "images"):
            if (self._foreign.root / folder).is_dir():
                return folder
        raise ConvertError(f"{self._foreign.root} has no images/{self.name} for the labels {self._unit}")

    def _keypoints(self, labels: dict[str, np.ndarray], count: int) -> np.ndarray | None:
        """SMPL-X's first 22 joints are SMPL's."""
        if "gtkps" not in labels:
            return None
        known = np.asarray(labels["gtkps"], np.float64)
        joints = np.zeros((count, len(JOINTS29), 3))
        joints[:, :_SMPLX_BODY_JOINTS, :2] = known[:, :_SMPLX_BODY_JOINTS, :2]
        joints[:, :_SMPLX_BODY_JOINTS, 2] = 1
        return joints

    def _gender(self, row: int, shapes: int) -> Gender:
        if shapes == 11 or "gender" not in self._labels:
            return "neutral"
        return gender_of(self._labels["gender"][row], GENDERS, self._unit)

    def _masks(self, rows: np.ndarray, labels: dict[str, np.ndarray]) -> Layers | None:
        folder = self._foreign.root / "masks" / self.name
        if not folder.is_dir() or "gtkps" not in labels:
            return None
        return Layers(
            folder=folder,
            stems=[str(PurePosixPath(self._names[row]).with_suffix("")) for row in rows],
            points=np.asarray(labels["gtkps"], np.float64)[:, :_SMPLX_BODY_JOINTS, :2],
            quarter_turns=int(any(word in self.name for word in _LYING)),
        )


def _folder_and_number(name: str, unit: str) -> tuple[str, int]:
    path = PurePosixPath(name)
    digits = path.stem.rpartition("_")[2]
    if not digits.isdigit():
        raise ConvertError(f"{unit}: imgname must end in a picture's number like seq_000000_0005.png, got {name!r}")
    return str(path.parent), int(digits)


def _runs(found: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """(number, row) in order -> runs of equal steps; a second row of one number begins a run of its own."""
    runs: list[list[tuple[int, int]]] = []
    steps = [b - a for (a, _), (b, _) in pairwise(found) if b > a]
    step = min(steps, default=1)
    for number, row in found:
        open_run = next((run for run in runs if run[-1][0] == number - step), None)
        if open_run is None:
            runs.append([(number, row)])
        else:
            open_run.append((number, row))
    return runs
