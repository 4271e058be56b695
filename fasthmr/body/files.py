"""Reads body files in SMPL's format (.npz, and SMPL's own chumpy pickles) without executing anything in them."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from fasthmr.conventions import NUM_BETAS, NUM_JOINTS, PARENTS24

FREE_BODY = Path(__file__).parent / "assets" / "free_body.npz"

#: leaves (head top, middle finger tips, big toes) on SMPL's 6,890 vertices (HybrIK, `SMPL.py`, LEAF_INDICES)
SMPL_LEAF_VERTICES = (411, 2445, 5905, 3216, 6617)
SMPL_NUM_VERTICES = 6890
_POSE_FEATURES = (NUM_JOINTS - 1) * 9


class BodyFileError(ValueError):
    """A file is not a body in SMPL's format, or holds something that may not be loaded."""


@dataclass(frozen=True)
class BodyArrays:
    """A body's numbers: V vertices, F faces, metres; float32 and int64."""

    template: np.ndarray  # (V,3)
    shape_dirs: np.ndarray  # (V,3,10)
    pose_dirs: np.ndarray  # (V,3,207)
    joint_regressor: np.ndarray  # (24,V)
    weights: np.ndarray  # (V,24)
    faces: np.ndarray  # (F,3)
    leaf_vertices: tuple[int, ...]  # 5, in the order of conventions.LEAVES
    mirror_index: np.ndarray | None  # (V,) vertex on the other side


def read_body_file(path: Path) -> BodyArrays:
    """Read and check a body file.

    Raises:
        FileNotFoundError: no such file; says where bodies come from.
        BodyFileError: an unreadable or unsafe file, a missing array, a wrong shape.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no body file {path}. Use `body: free` for the one in this package, or register at "
            "https://smpl.is.tue.mpg.de, download SMPL for Python (version 1.1.0), and give the path of its "
            "SMPL_NEUTRAL.pkl (or _MALE, _FEMALE), for example data/body_models/smpl/SMPL_NEUTRAL.pkl"
        )
    if path.suffix not in (".npz", ".pkl"):
        raise BodyFileError(f"{path}: a body file is an .npz or a .pkl, got {path.suffix!r}")
    try:
        raw = _read_npz(path) if path.suffix == ".npz" else _read_pickle(path.read_bytes())
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, IndexError, AttributeError) as error:
        raise BodyFileError(f"{path}: cannot be read as a body: {error}") from error
    if not isinstance(raw, dict):
        raise BodyFileError(f"{path}: must hold a dictionary of arrays, got {type(raw).__name__}")
    return _checked(raw, path)


# ---- safe reading -----------------------------------------------------------------------------------------------------


class _Chumpy:
    """Stands in for every class of chumpy, which SMPL's pickles need and which no longer installs.

    It keeps the pickled attributes; `value` computes the array that the two kinds of node found in SMPL files stand for.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def value(self) -> np.ndarray:
        state = self.__dict__
        if "idxs" in state and "a" in state:  # chumpy.reordering.Select: some elements of another node
            picked = _array(state["a"]).ravel()[np.asarray(state["idxs"]).ravel()]
            shape = state.get("preferred_shape")
            return picked if shape is None else picked.reshape(shape)
        if "x" in state:  # chumpy.Ch: a plain array
            return _array(state["x"])
        raise BodyFileError(f"a chumpy object with {sorted(state)} cannot be read; only stored arrays and selections can")


_ALLOWED = {
    ("builtins", "object"), ("builtins", "set"), ("builtins", "list"), ("builtins", "dict"), ("__builtin__", "object"),
    ("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("collections", "OrderedDict"), ("_codecs", "encode"),
    ("numpy", "ndarray"), ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
}  # fmt: skip
_SPARSE = {"csc_matrix", "csr_matrix", "coo_matrix"}


class _BodyUnpickler(pickle.Unpickler):
    """Knows arrays, sparse matrices, plain containers and stand-ins for chumpy; everything else is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "chumpy":
            return _Chumpy
        if module.split(".")[:2] == ["scipy", "sparse"] and name in _SPARSE:
            return getattr(scipy.sparse, name)
        if (module, name) in _ALLOWED:
            return super().find_class(module.replace("numpy.core.", "numpy._core."), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no body file needs; it was not loaded")


def _read_pickle(content: bytes) -> Any:
    return _BodyUnpickler(io.BytesIO(content), encoding="latin1").load()


def _read_npz(path: Path) -> dict[str, Any]:
    """Arrays of an .npz; members with Python objects (SMPL's own files have some) go through the safe unpickler."""
    content: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = header(file)
                if dtype.hasobject:
                    content[member.removesuffix(".npy")] = np.asarray(_read_pickle(file.read())).reshape(shape)
        with np.load(path, allow_pickle=False) as arrays:
            content.update({name: arrays[name] for name in arrays.files if name not in content})
    return content


def _array(value: Any) -> np.ndarray:
    """A dense array of whatever a body file stores one as."""
    if isinstance(value, _Chumpy):
        return value.value()
    if scipy.sparse.issparse(value):
        return value.toarray()
    if isinstance(value, np.ndarray) and value.dtype == object and value.shape == ():
        return _array(value.item())
    return np.asarray(value)


# ---- checks -----------------------------------------------------------------------------------------------------------


def _checked(raw: dict[str, Any], path: Path) -> BodyArrays:
    def get(name: str, shape: tuple[int | None, ...], dtype: type = np.float32) -> np.ndarray:
        if name not in raw:
            raise BodyFileError(f"{path}: has no {name!r}; it has {', '.join(sorted(raw))}")
        array = _array(raw[name])
        if array.ndim != len(shape) or any(s is not None and s != a for s, a in zip(shape, array.shape, strict=True)):
            raise BodyFileError(f"{path}: {name} must have shape {shape}, got {array.shape}")
        try:
            return np.ascontiguousarray(array, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise BodyFileError(f"{path}: {name} is no array of numbers: {error}") from error

    template = get("v_template", (None, 3))
    vertices = len(template)
    shape_dirs = get("shapedirs", (vertices, 3, None))[..., :NUM_BETAS]
    if shape_dirs.shape[2] < NUM_BETAS:
        raise BodyFileError(f"{path}: shapedirs must hold {NUM_BETAS} or more shapes, got {shape_dirs.shape[2]}")
    if "posedirs" in raw:
        pose_dirs = get("posedirs", (vertices, 3, _POSE_FEATURES))
    else:  # a body without pose-dependent shape, as the free one
        pose_dirs = np.zeros((vertices, 3, _POSE_FEATURES), np.float32)
    if "J_reg_vals" in raw:  # our own files store the regressor sparsely
        values = get("J_reg_vals", (None,))
        rows, columns = (get(k, values.shape, np.int64) for k in ("J_reg_rows", "J_reg_cols"))
        if len(values) and not (0 <= rows.min() <= rows.max() < NUM_JOINTS and 0 <= columns.min() <= columns.max() < vertices):
            raise BodyFileError(f"{path}: J_reg_rows or J_reg_cols point outside (24, {vertices})")
        regressor = np.zeros((NUM_JOINTS, vertices), np.float32)
        regressor[rows, columns] = values
    else:
        regressor = get("J_regressor", (NUM_JOINTS, vertices))
    faces = get("f", (None, 3), np.int64)
    if faces.min() < 0 or faces.max() >= vertices:
        raise BodyFileError(f"{path}: f points outside the {vertices} vertices")
    parents = get("kintree_table", (2, NUM_JOINTS), np.int64)[0]
    if tuple(int(p) for p in parents[1:]) != PARENTS24[1:]:
        raise BodyFileError(f"{path}: kintree_table is not SMPL's; only bodies with SMPL's 24 joints can be used")

    if "leaf_vertices" in raw:
        leaves = tuple(int(i) for i in get("leaf_vertices", (len(SMPL_LEAF_VERTICES),), np.int64))
        if not all(0 <= i < vertices for i in leaves):
            raise BodyFileError(f"{path}: leaf_vertices must be in [0, {vertices}), got {leaves}")
    elif vertices == SMPL_NUM_VERTICES:
        leaves = SMPL_LEAF_VERTICES
    else:
        raise BodyFileError(
            f"{path}: a body of {vertices} vertices must name its leaf_vertices (head top, left and right middle "
            f"finger tip, left and right big toe); only SMPL's {SMPL_NUM_VERTICES} vertices are known"
        )
    mirror = get("mirror_index", (vertices,), np.int64) if "mirror_index" in raw else None
    return BodyArrays(
        template, np.ascontiguousarray(shape_dirs), pose_dirs, regressor, get("weights", (vertices, NUM_JOINTS)), faces, leaves, mirror
    )
