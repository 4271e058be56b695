"""Finds and reads the matrix that a protocol's joints are regressed with, among the user's own files."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fasthmr.body.safe_pickle import UnsafePickleError, dense_array, load_pickle
from fasthmr.metrics.protocols import JointRegressor

#: as SPIN and WHAM keep their matrices, and as HMR2.0 does
_SUFFIXES = (".npy", ".pkl")


def find_regressor(wanted: JointRegressor, body: str) -> Path | None:
    """The file of a matrix beside a body file, or one folder above it, where SPIN's, HMR2.0's and WHAM's downloads have
    it (`body_models/smpl/SMPL_NEUTRAL.pkl`, `body_models/J_regressor_h36m.npy`); None if there is none.

    Args:
        wanted: which matrix.
        body: the body file; beside the body of this package (`free`) there is none.
    """
    if body == "free":
        return None
    folder = Path(body).absolute().parent
    candidates = (place / f"{wanted.name}{suffix}" for place in (folder, folder.parent) for suffix in _SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def read_regressor(path: str | Path) -> Tensor:
    """A matrix (J, V) float32 from a .npy file, or from a .pkl file of an array; nothing in it is executed.

    Raises:
        ValueError: it is neither, or holds numbers that are not finite.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".pkl":
            array = dense_array(load_pickle(path.read_bytes()))
        else:
            # Mapped, so that a header cannot ask for memory that the file does not fill; and an archive is refused.
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        matrix = torch.from_numpy(array.astype(np.float32))
    except (ValueError, TypeError, AttributeError, EOFError, BadZipFile, OverflowError, UnsafePickleError) as error:
        raise ValueError(f"regressor {path} is no .npy or .pkl file of a matrix: {error}") from error
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"regressor {path} holds NaN or infinity")
    return matrix
