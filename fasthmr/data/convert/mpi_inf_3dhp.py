"""MPI-INF-3DHP's training set (Mehta et al. 2017), with one of four kinds of labels.

raw, the set's own; joints only:
    S1/Seq1/annot.mat                                 `annot2`, `annot3`: 14 cameras x (N, 28 joints x 2 px | 3 mm)
    S1/Seq1/camera.calibration                        text; `intrinsic` 16 numbers a camera, row by row
    S1/Seq1/imageFrames/video_0/frame_000001.jpg      the films' frames in order, as SPIN's script unpacks them
neural_annot, SMPL fits:
    images/..., annotations/MPI-INF-3DHP_1k.json      COCO's layout; with subject_idx, seq_idx, cam_idx, frame_idx
    annotations/MPI-INF-3DHP_camera_1k.json           subject -> sequence -> camera -> R, t (mm), f, c
    annotations/MPI-INF-3DHP_SMPL_NeuralAnnot.json    subject -> sequence -> frame -> pose, shape, trans
hybrik, joints only:
    images/..., annotations/*3dhp*train*.json         COCO's layout; `bbox`, `keypoints_cam` (28|17,3) mm,
                                                      `cam_param` {intrinsic_param (3,3)}
spin, SMPL fits without a camera:
    images/..., annotations/*.npz                     imgname, center, scale = side / 200, S (N,24,4), pose (N,72),
                                                      shape (N,10), has_smpl (N); `part` (N,24,3) px if there is one

3DHP's joints lie near SMPL's but are not the same: they are pseudo labels. 25 fps.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.io

from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.data.convert.coco import Image, boxes, images_of, runs, sequences
from fasthmr.data.convert.keypoints import FROM_3DHP_28, FROM_24, FROM_H36M_17, joints29
from fasthmr.data.convert.neural_annot import FITS, fitted_track
from fasthmr.data.convert.reading import ConvertError, Picture, inside, numbers, read_json, read_npz, text
from fasthmr.data.convert.source import Need
from fasthmr.data.convert.track import Track, TrackList, Tracks, clean_key
from fasthmr.data.crops import CROP_SCALE

_SITE = "https://vcai.mpi-inf.mpg.de/3dhp-dataset"
_FPS = 25.0
_JOINTS = 28
#: what scipy raises for a .mat file that is damaged
_UNREADABLE = (OSError, ValueError, TypeError, IndexError, NotImplementedError, zlib.error)
#: 3DHP's annot.mat has 100 MB at most
_MAX_MAT_BYTES = 1 << 30
_NEEDS = {
    "raw": (
        Need("S*/Seq*/annot.mat", "labels", _SITE),
        Need("S*/Seq*/camera.calibration", "cameras", _SITE),
        Need("S*/Seq*/imageFrames/video_*/*.jpg", "the films' frames as pictures", _SITE),
    ),
    "neural_annot": (
        Need("annotations/MPI-INF-3DHP_SMPL_NeuralAnnot.json", "fits", "github.com/mks0601/NeuralAnnot_RELEASE"),
        Need("annotations/MPI-INF-3DHP_1k.json", "pictures and boxes", "github.com/mks0601/Hand4Whole_RELEASE"),
        Need("annotations/MPI-INF-3DHP_camera_1k.json", "cameras", "github.com/mks0601/Hand4Whole_RELEASE"),
        Need("images/*", "pictures", _SITE),
    ),
    "hybrik": (
        Need("annotations/*3dhp*train*.json", "labels", "github.com/Jeff-sjtu/HybrIK"),
        Need("images/*", "pictures", _SITE),
    ),
    "spin": (
        Need("annotations/*.npz", "labels", "github.com/nkolot/SPIN (fetch_data.sh)"),
        Need("images/*", "pictures", _SITE),
    ),
}


@dataclass(frozen=True)
class MpiInf3dhp:
    """MPI-INF-3DHP's training set under `root`; `split` is the kind of labels."""

    title: ClassVar[str] = "MPI-INF-3DHP"
    licence: ClassVar[str] = f"MPI-INF-3DHP is for non-commercial research: accept its licence at {_SITE}"
    splits: ClassVar[tuple[str, ...]] = ("neural_annot", "hybrik", "spin", "raw")
    longest: ClassVar[int] = 128

    root: Path
    split: str

    def needs(self) -> Sequence[Need]:
        return _NEEDS[self.split]

    def units(self) -> list[str]:
        found = sorted(self.root.glob(_NEEDS[self.split][0].pattern))
        return [path.relative_to(self.root).as_posix() for path in found]

    def open(self, unit: str) -> Tracks:
        path = inside(self.root, unit)
        readers = {"raw": _raw, "neural_annot": _fitted, "hybrik": _annotated, "spin": _spin}
        without: list[str] = []
        return TrackList(readers[self.split](path, unit, without), without)


# Each gives the tracks of a label file, and adds the names of pictures that have no labels to `unlabelled`.


def _raw(path: Path, unit: str, unlabelled: list[str]) -> Iterator[Track]:
    if path.stat().st_size > _MAX_MAT_BYTES:
        raise ConvertError(f"{path} has {path.stat().st_size} bytes, more than {_MAX_MAT_BYTES}")
    try:
        labels = scipy.io.loadmat(path, variable_names=["annot2", "annot3"])
    except (*_UNREADABLE, scipy.io.matlab.MatReadError) as error:
        raise ConvertError(f"{path} is no whole .mat file ({error}): download it again") from error
    if lacking := [name for name in ("annot2", "annot3") if name not in labels]:
        raise ConvertError(f"{path} has no {' and no '.join(lacking)}")
    folder = Path(unit).parent
    cameras = _calibration(path.with_name("camera.calibration"))
    for number, intrinsics in enumerate(cameras[: len(labels["annot2"])]):
        video = folder / "imageFrames" / f"video_{number}"
        pictures = sorted(path.parent.glob(f"imageFrames/video_{number}/*.jpg"))
        if not pictures:
            continue
        _require_no_gap(pictures)
        where = f"{unit}, camera {number}"
        cells = {name: labels[name][number, 0] for name in ("annot2", "annot3")}
        points = numbers(cells, "annot2", (None, 2 * _JOINTS), where).reshape(-1, _JOINTS, 2)
        places = numbers(cells, "annot3", (len(points), 3 * _JOINTS), where).reshape(-1, _JOINTS, 3) / 1000
        frames = min(len(points), len(pictures))
        unlabelled += [(video / picture.name).as_posix() for picture in pictures[frames:]]
        yield Track(
            key=clean_key(f"3dhp-{folder.parent.name}_{folder.name}_{number}"),
            source=f"3dhp:{video}",
            fps=_FPS,
            pictures=[Picture((video / picture.name).as_posix()) for picture in pictures[:frames]],
            valid=np.ones(frames, bool),
            intrinsics=np.broadcast_to(intrinsics, (frames, 3, 3)),
            joints2d=joints29(_sure(points[:frames]), FROM_3DHP_28),
            joints3d=joints29(_sure(places[:frames]), FROM_3DHP_28),
            status=FITS,
        )


def _require_no_gap(pictures: list[Path]) -> None:
    """Row n of the labels is the n-th frame of the video: one that is missing would shift all that follow."""
    frames = [int(found[0]) if (found := re.findall(r"\d+", picture.stem)[-1:]) else -1 for picture in pictures]
    for before, frame in itertools.pairwise([frames[0] - 1 if frames[0] in (0, 1) else 0, *frames]):
        if frame != before + 1:
            raise ConvertError(f"{pictures[0].parent} has no picture {before + 1}, but {frame}: extract them again")


def _calibration(path: Path) -> list[np.ndarray]:
    """The cameras' (3,3) in a camera.calibration."""
    try:
        lines = path.read_text().splitlines()
        found = [np.array(line.split()[1:17], np.float64) for line in lines if line.strip().startswith("intrinsic")]
        return [numbers.reshape(4, 4)[:3, :3] for numbers in found]
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error


def _fitted(path: Path, unit: str, unlabelled: list[str]) -> Iterator[Track]:
    fits, cameras = read_json(path), read_json(path.with_name("MPI-INF-3DHP_camera_1k.json"))
    data = read_json(path.with_name("MPI-INF-3DHP_1k.json"))

    def find(tree: Any, image: Image, *names: str) -> Any:
        for name in names:
            tree = tree.get(str(image.about.get(name))) if isinstance(tree, dict) else None
        return tree

    for folder, images in sequences(images_of(data, "MPI-INF-3DHP_1k.json", unlabelled)):
        fitted = [bool(find(fits, image, "subject_idx", "seq_idx", "frame_idx")) for image in images]
        unlabelled += [image.name for image, there in zip(images, fitted, strict=True) if not there]
        for run, step in runs(list(itertools.compress(images, fitted))):
            where = f"{unit}: {folder}"
            camera = find(cameras, run[0], "subject_idx", "seq_idx", "cam_idx")
            if not isinstance(camera, dict):
                raise ConvertError(f"MPI-INF-3DHP_camera_1k.json has no camera for {run[0].name}")
            yield fitted_track(
                clean_key(f"3dhp-{folder}_{run[0].number:06d}"),
                f"3dhp:{folder}",
                _FPS / step,
                [Picture(f"images/{image.name}") for image in run],
                [find(fits, image, "subject_idx", "seq_idx", "frame_idx") for image in run],
                camera,
                boxes([image.label for image in run], where),
                where,
            )


def _annotated(path: Path, unit: str, unlabelled: list[str]) -> Iterator[Track]:
    for folder, images in sequences(images_of(read_json(path), unit, unlabelled)):
        for run, step in runs(images):
            where = f"{unit}: {folder}"
            labels: list[Mapping[str, Any]] = [image.label for image in run]
            places = np.stack([numbers(label, "keypoints_cam", (None, 3), where) for label in labels]) / 1000
            tables = {_JOINTS: FROM_3DHP_28, 17: FROM_H36M_17}
            if places.shape[1] not in tables:
                raise ConvertError(f"{where}: keypoints_cam must be of 28 or 17 joints, got {places.shape[1]}")
            center, size = boxes(labels, where)
            yield Track(
                key=clean_key(f"3dhp-{folder}_{run[0].number:06d}"),
                source=f"3dhp:{folder}",
                fps=_FPS / step,
                pictures=[Picture(f"images/{image.name}") for image in run],
                valid=np.ones(len(run), bool),
                intrinsics=np.stack(
                    [numbers(label.get("cam_param") or {}, "intrinsic_param", (3, 3), where) for label in labels]
                ),
                joints3d=joints29(_sure(places), tables[places.shape[1]]),
                center=center,
                size=size,
                status=FITS,
            )


def _spin(path: Path, unit: str, unlabelled: list[str]) -> Iterator[Track]:
    """Every row is a still: SPIN's files hold every tenth or so of the films' pictures, in no order."""
    labels = read_npz(path, ("imgname", "center", "scale"), ("S", "part", "pose", "shape", "has_smpl"))
    if not {"S", "part", "pose"} & labels.keys():
        raise ConvertError(f"{unit} has none of the labels S, part and pose: it is no file of SPIN's")
    count = len(labels["imgname"])
    center = numbers(labels, "center", (count, 2), unit)
    size = 200 * numbers(labels, "scale", (count,), unit) / CROP_SCALE
    fitted = np.asarray(labels.get("has_smpl", np.full(count, "pose" in labels))).astype(bool).reshape(count)
    pose = numbers(labels, "pose", (count, 3 * NUM_JOINTS), unit) if fitted.any() else None
    shape = numbers(labels, "shape", (count, NUM_BETAS), unit) if fitted.any() else None
    places = numbers(labels, "S", (count, 24, 4), unit) if "S" in labels else None
    points = numbers(labels, "part", (count, 24, 3), unit) if "part" in labels else None
    for row, name in enumerate(labels["imgname"].tolist()):
        one = slice(row, row + 1)
        yield Track(
            key=clean_key(f"3dhp-{path.stem}_{row:07d}"),  # of the row: a picture may have several people
            source=f"3dhp:{text(name)}",
            fps=1.0,
            pictures=[Picture(f"images/{text(name)}")],
            valid=np.ones(1, bool),
            pose=pose[one].reshape(1, NUM_JOINTS, 3) if pose is not None and fitted[row] else None,
            betas=shape[one] if shape is not None and fitted[row] else None,
            joints2d=None if points is None else joints29(points[one], FROM_24),
            joints3d=None if places is None else joints29(places[one], FROM_24),
            center=center[one],
            size=size[one],
            status=FITS,
        )


def _sure(points: np.ndarray) -> np.ndarray:
    """Points with confidence 1 as their last number."""
    return np.concatenate([points, np.ones((*points.shape[:2], 1))], -1)
