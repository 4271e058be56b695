"""Reads pickles of arrays without running anything in them: an allow-list instead of imports, stand-ins for chumpy.

A pickle is a program. This reader knows numpy arrays, three kinds of scipy sparse matrix, plain containers and the
chumpy objects in SMPL's files; any other name in a pickle stops the reading before a thing is imported or called. What
it calls takes no more memory than the pickle has bytes (sparse matrices excepted): arrays are made empty and then
filled with the pickle's own bytes, and strings are encoded in one way only.
"""

from __future__ import annotations

import codecs
import collections
import copyreg
import io
import pickle
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse


class UnsafePickleError(ValueError):
    """A pickle asks for something that is not on the allow-list, or is damaged."""


class ChumpyNode:
    """Stands in for every class of chumpy, the library SMPL's pickles were written with, which no longer installs."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)

    def value(self) -> np.ndarray:
        """The array that the node stands for.

        Raises:
            UnsafePickleError: neither a stored array nor a selection from one, the two kinds found in SMPL's files.
        """
        state = vars(self)
        if "a" in state and "idxs" in state:  # chumpy.reordering.Select: some elements of another node
            picked = dense_array(state["a"]).ravel()[np.asarray(state["idxs"]).ravel()]
            shape = state.get("preferred_shape")
            return picked if shape is None else picked.reshape(shape)
        if "x" in state:  # chumpy.ch.Ch: an array
            return dense_array(state["x"])
        raise UnsafePickleError(f"a chumpy object with {sorted(state)} is neither a stored array nor a selection")


class _ArrayType:
    """Stands in for `numpy.ndarray`, which a pickle could call with any size."""


def _empty_array(*_: object) -> np.ndarray:
    """An array that the pickle's next operation fills; the shape given here is of no use to honest pickles."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _array_from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 2's bytes are written. Other encodings could double a string, again and again."""
    if encoding != "latin1":
        raise UnsafePickleError(f"it encodes a string as {encoding!r}, which no data set does; nothing was run")
    return codecs.encode(text, "latin1")


# numpy rebuilds arrays and scalars with three functions; where they live has changed between versions
_NUMPY_FUNCTIONS: dict[str, dict[str, Any]] = {
    "multiarray": {"_reconstruct": _empty_array, "scalar": np.float64(0).__reduce__()[0]},
    "numeric": {"_frombuffer": _array_from_buffer},  # protocol 5
}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, functions in _NUMPY_FUNCTIONS.items()
        for name, function in functions.items()
    },
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{(module, "_reconstructor"): copyreg._reconstructor for module in ("copyreg", "copy_reg")},  # type: ignore[attr-defined]
    **{(module, t.__name__): t for module in ("builtins", "__builtin__") for t in (object, set, list, dict)},
}
_SPARSE_MATRICES = ("csc_matrix", "csr_matrix", "coo_matrix")


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.split(".")[0] == "chumpy":
            return ChumpyNode
        if module.startswith("scipy.sparse") and name in _SPARSE_MATRICES:
            return getattr(scipy.sparse, name)
        raise UnsafePickleError(
            f"it asks for {module}.{name}, which is not on the list of harmless names; nothing was run"
        )


def load_pickle(content: bytes) -> Any:
    """Unpickle arrays and containers; Python 2's strings are read as latin1.

    Raises:
        UnsafePickleError: the pickle names anything else, or is damaged.
    """
    try:
        return _AllowListUnpickler(io.BytesIO(content), encoding="latin1").load()
    except UnsafePickleError:
        raise
    # what pickle's documentation names, and what its operations raise on damaged input
    except (
        pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
        OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise UnsafePickleError(f"it is not a whole pickle: {type(error).__name__}: {error}") from error


def dense_array(value: Any) -> np.ndarray:
    """The dense array behind whatever a pickle stores one as: chumpy node, sparse matrix, array around one of these."""
    if isinstance(value, ChumpyNode):
        return value.value()
    if scipy.sparse.issparse(value):
        return value.toarray()
    array = np.asarray(value)
    if array.dtype == object and array.shape == () and array.item() is not value:
        return dense_array(array.item())
    return array
