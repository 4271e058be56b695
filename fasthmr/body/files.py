"""Reads and checks body files in SMPL's format: SMPL_*.pkl, SMPL_*.npz and our own .npz."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasthmr.body.safe_pickle import UnsafePickleError, dense_array, load_pickle
from fasthmr.conventions import LEAVES, NUM_BETAS, NUM_JOINTS, PARENTS24

FREE_BODY = Path(__file__).parent / "assets" / "free_body.npz"

SMPL_NUM_VERTICES = 6890
#: the five leaves on SMPL's vertices, in the order of conventions.LEAVES (HybrIK, `SMPL.py`, LEAF_INDICES)
SMPL_LEAF_VERTICES = (411, 2445, 5905, 3216, 6617)

_POSE_SHAPES = (NUM_JOINTS - 1) * 9
#: the members that are read; SMPL's files hold more, some of it Python objects of no use here
_MEMBERS = (
    "v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f", "kintree_table", "vert_sym_idxs",
    "J_reg_rows", "J_reg_cols", "J_reg_vals", "leaf_vertices", "mirror_index",
)  # fmt: skip
_WHERE_FROM = (
    "Use the name `free` for the body that comes with this package, or register at https://smpl.is.tue.mpg.de, "
    "download SMPL for Python (version 1.1.0), put its neutral model at data/body_models/smpl/SMPL_NEUTRAL.pkl and "
    "give that path"
)


class BodyFileError(ValueError):
    """A file is not a body in SMPL's format, or holds something that may not be loaded."""


@dataclass(frozen=True)
class BodyArrays:
    """A body's numbers, checked: V vertices, F faces; metres; float32 and int64."""

    template: np.ndarray  # (V,3)
    shape_dirs: np.ndarray  # (V,3,10)
    pose_dirs: np.ndarray | None  # (V,3,207); None: no pose-dependent shapes
    joint_regressor: np.ndarray  # (24,V)
    weights: np.ndarray  # (V,24)
    faces: np.ndarray  # (F,3)
    leaf_vertices: np.ndarray  # (5,) in the order of conventions.LEAVES
    mirror_index: np.ndarray | None  # (V,) the vertex on the other side


def read_body_file(path: Path) -> BodyArrays:
    """Read a body file. Nothing in it is executed; of more than 10 shapes the first 10 are taken.

    Raises:
        FileNotFoundError: no such file; says where bodies come from and where to put them.
        BodyFileError: an unreadable or unsafe file, a missing array, a wrong shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no body file {path}. {_WHERE_FROM}")
    if path.suffix not in (".npz", ".pkl"):
        raise BodyFileError(
            f"{path}: a body file is an .npz or a .pkl, got {path.suffix or 'no suffix'!r}. {_WHERE_FROM}"
        )
    try:
        members = _read_npz(path) if path.suffix == ".npz" else _read_pickle(path)
    except UnsafePickleError as error:
        raise BodyFileError(f"{path} was not loaded: {error}. Take body files from their makers only") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise BodyFileError(f"{path} is damaged or no body file ({error}). {_WHERE_FROM}") from error
    return _Checker(members, path).arrays()


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    content = load_pickle(path.read_bytes())
    if not isinstance(content, dict):
        raise UnsafePickleError(f"it holds a {type(content).__name__}, not a dictionary of arrays")
    return {name: dense_array(content[name]) for name in _MEMBERS if name in content}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    members: dict[str, np.ndarray] = {}
    with np.load(path, allow_pickle=False) as archive, zipfile.ZipFile(path) as raw:
        for name in set(_MEMBERS) & set(archive.files):
            objects = _pickled_objects(raw, f"{name}.npy")
            members[name] = archive[name] if objects is None else dense_array(objects)
    return members


def _pickled_objects(archive: zipfile.ZipFile, member: str) -> Any | None:
    """The content of an .npy member that holds Python objects (numpy pickles those), None for one of plain numbers."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _, _, dtype = read_header(file)
        return load_pickle(file.read()) if dtype.hasobject else None


class _Checker:
    """Takes arrays out of a file's members and says what is wrong with them."""

    def __init__(self, members: dict[str, np.ndarray], path: Path) -> None:
        self._members = members
        self._path = path

    def arrays(self) -> BodyArrays:
        template = self._numbers("v_template", (None, 3))
        vertices = len(template)
        shape_dirs = self._numbers("shapedirs", (vertices, 3, None))
        if shape_dirs.shape[2] < NUM_BETAS:
            raise self._error(f"shapedirs must hold at least {NUM_BETAS} shapes, got {shape_dirs.shape[2]}")
        has_poses, has_leaves = ("posedirs" in self._members, "leaf_vertices" in self._members)
        parents = self._indices("kintree_table", (2, NUM_JOINTS), None)[0]
        if tuple(parents[1:].tolist()) != PARENTS24[1:]:  # the root's parent is -1 in some number format
            raise self._error(
                "kintree_table is not SMPL's: only bodies with SMPL's 24 joints can be used (not SMPL-H, -X)"
            )
        if has_leaves:
            leaves = self._indices("leaf_vertices", (len(LEAVES),), vertices)
        elif vertices == SMPL_NUM_VERTICES:
            leaves = np.array(SMPL_LEAF_VERTICES, np.int64)
        else:
            raise self._error(
                f"has {vertices} vertices, not SMPL's {SMPL_NUM_VERTICES}, so it must name in `leaf_vertices` the five "
                f"at {', '.join(LEAVES)}"
            )
        return BodyArrays(
            template=template,
            shape_dirs=np.ascontiguousarray(shape_dirs[..., :NUM_BETAS]),
            pose_dirs=self._numbers("posedirs", (vertices, 3, _POSE_SHAPES)) if has_poses else None,
            joint_regressor=self._regressor(vertices),
            weights=self._numbers("weights", (vertices, NUM_JOINTS)),
            faces=self._indices("f", (None, 3), vertices),
            leaf_vertices=leaves,
            mirror_index=self._mirror_index(vertices),
        )

    def _regressor(self, vertices: int) -> np.ndarray:
        if "J_reg_vals" not in self._members:
            return self._numbers("J_regressor", (NUM_JOINTS, vertices))
        values = self._numbers("J_reg_vals", (None,))  # our own files hold it sparsely
        rows = self._indices("J_reg_rows", values.shape, NUM_JOINTS)
        columns = self._indices("J_reg_cols", values.shape, vertices)
        regressor = np.zeros((NUM_JOINTS, vertices), np.float32)
        regressor[rows, columns] = values
        return regressor

    def _mirror_index(self, vertices: int) -> np.ndarray | None:
        for name in ("mirror_index", "vert_sym_idxs"):  # ours, SMPL's
            if name in self._members:
                return self._indices(name, (vertices,), vertices)
        return None

    def _numbers(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        member = self._member(name, shape)
        if member.dtype.kind not in "fiu":
            raise self._error(f"{name} must hold numbers, got {member.dtype}")
        array = np.ascontiguousarray(member, dtype=np.float32)
        if not np.isfinite(array).all():
            raise self._error(f"{name} holds NaN or infinity")
        return array

    def _indices(self, name: str, shape: tuple[int | None, ...], below: int | None) -> np.ndarray:
        array = self._member(name, shape)
        if not np.issubdtype(array.dtype, np.integer):
            raise self._error(f"{name} must hold integers, got {array.dtype}")
        if below is not None and (array.min() < 0 or array.max() >= below):
            raise self._error(f"{name} must lie in [0, {below}), got [{array.min()}, {array.max()}]")
        return np.ascontiguousarray(array, dtype=np.int64)

    def _member(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        if name not in self._members:
            raise self._error(f"has no {name!r}, only {', '.join(sorted(self._members)) or 'unknown members'}")
        array = self._members[name]
        fits = array.ndim == len(shape) and all(
            want in (None, got) for want, got in zip(shape, array.shape, strict=True)
        )
        if not fits or array.size == 0:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise self._error(f"{name} must have shape ({wanted}), got {array.shape}")
        return array

    def _error(self, problem: str) -> BodyFileError:
        return BodyFileError(f"body file {self._path}: {problem}")
