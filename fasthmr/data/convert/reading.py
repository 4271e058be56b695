"""Reads label files that others made: nothing in them is run, sizes are limited, and paths stay under the root."""

from __future__ import annotations

import io
import json
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from fasthmr.body.safe_pickle import UnsafePickleError, load_pickle
from fasthmr.data.headers import image_shape
from fasthmr.data.schema import MAX_IMAGE_PX

#: the largest label file read whole (H36M's json has 1 GB), the largest array, and the largest member of a tar, bytes
MAX_FILE_BYTES = 4 << 30
MAX_ARRAY_BYTES = 2 << 30
MAX_MEMBER_BYTES = 64 << 20


class ConvertError(ValueError):
    """A download is incomplete, damaged, hostile or of another format; the message names the file and what to do."""


@dataclass(frozen=True)
class Picture:
    """Where a picture lies: a file under the root, or `size` bytes at `offset` of it (a member of a tar)."""

    path: str
    offset: int = 0
    size: int | None = None


def inside(root: Path, name: str) -> Path:
    """`root / name`, refusing names that lead out of the root.

    Raises:
        ConvertError: an absolute name, or one with `..` in it.
    """
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name or "\\" in name:
        raise ConvertError(f"{name!r} is no name of a file under {root}: the labels that name it were not read")
    return root / pure


def read_picture(root: Path, picture: Picture) -> np.ndarray:
    """(H,W,3) uint8 RGB.

    Raises:
        ConvertError: it is missing, no JPEG or PNG, larger than 8192 px, or damaged.
    """
    path = inside(root, picture.path)
    try:
        size = path.stat().st_size if picture.size is None else picture.size
        if size > MAX_MEMBER_BYTES:
            raise ConvertError(f"{path} has {size} bytes, more than any picture should")
        with path.open("rb") as file:
            file.seek(picture.offset)
            encoded = file.read(size)
        shape = image_shape(encoded)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise error if isinstance(error, ConvertError) else ConvertError(f"{path} {error}") from error
    if max(shape) > MAX_IMAGE_PX or min(shape) < 1:
        raise ConvertError(f"{path} says that it is {shape[1]}x{shape[0]} px; at most {MAX_IMAGE_PX} are read")
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise ConvertError(f"{path} cannot be decoded: it is damaged")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_pickle(path: Path) -> Mapping[str, Any]:
    """A dictionary from a pickle, of arrays and plain containers.

    Raises:
        ConvertError: it cannot be read, holds something that is not on the allow-list, or no dictionary.
    """
    return _dictionary(_unpickled(_read(path), str(path)), str(path))


def _unpickled(content: bytes, what: str) -> Any:
    try:
        return load_pickle(content)
    except UnsafePickleError as error:
        raise ConvertError(f"{what} was not loaded: {error}. Download it again from its makers") from error


def read_json(path: Path) -> Mapping[str, Any]:
    """A dictionary from JSON.

    Raises:
        ConvertError: it cannot be read, is no JSON, or no dictionary.
    """
    try:
        return _dictionary(json.loads(_read(path)), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConvertError(f"{path} is no whole JSON file ({error}): download it again") from error


def read_npz(path: Path | io.BytesIO, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The named arrays of an npz; the others are not unpacked. Arrays of Python objects go through the allow-list.

    Raises:
        ConvertError: it cannot be read, lacks a name, or an array is not what it says of itself.
    """
    what = str(path) if isinstance(path, Path) else "an npz in a tar"
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if lacking := [name for name in names if name not in members]:
                raise ConvertError(
                    f"{what} has no {' and no '.join(lacking)}; it has {', '.join(sorted(members)) or 'nothing'}"
                )
            return {name: _member(archive, members[name], what) for name in (*names, *optional) if name in members}
    except OSError as error:
        raise ConvertError(f"{what} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ConvertError(f"{what} is no whole npz ({error}): download it again") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, what: str) -> np.ndarray:
    named = f"{info.filename} in {what}"
    if info.file_size > MAX_ARRAY_BYTES:
        raise ConvertError(f"{named} would unpack to {info.file_size} bytes, more than {MAX_ARRAY_BYTES}")
    with archive.open(info) as file:
        content = io.BytesIO(file.read(info.file_size))
    try:
        version = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(content)
        rest = len(content.getbuffer()) - content.tell()
        if dtype.hasobject:
            return np.asarray(_unpickled(content.read(), named))
        if math.prod(shape) * dtype.itemsize != rest:
            raise ConvertError(f"{named} says {dtype} {shape}, which are not its {rest} bytes")
        content.seek(0)
        return np.asarray(np.load(content, allow_pickle=False))
    except ValueError as error:
        raise error if isinstance(error, ConvertError) else ConvertError(f"{named}: {error}") from error


def tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the plain files in an uncompressed tar; nothing is unpacked.

    Raises:
        ConvertError: no such tar, one cut short, or members that lead elsewhere: links, devices, `..`, absolute names.
    """
    try:
        whole = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                inside(path.parent, member.name)
                if not member.isreg():
                    raise ConvertError(f"{path}: {member.name!r} is no plain file")
                if member.size > MAX_MEMBER_BYTES or member.offset_data + member.size > whole:
                    raise ConvertError(f"{path}: {member.name!r} cannot have {member.size} bytes: it is cut or damaged")
                yield member.name, member.offset_data, member.size
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise ConvertError(f"{path} is no uncompressed tar ({error}): unpack it, or download it again") from error


def read_part(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def pickled_list(content: bytes, what: str) -> Sequence[Mapping[str, Any]]:
    """A list of dictionaries from a pickle.

    Raises:
        ConvertError: it holds anything else.
    """
    value = _unpickled(content, what)
    if not isinstance(value, list | tuple) or not all(isinstance(v, dict) for v in value):
        raise ConvertError(f"{what} must hold a list of dictionaries, got {type(value).__name__}")
    return value


def text(value: Any) -> str:
    """A name, which NumPy may have written as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def numbers(labels: Mapping[str, Any], name: str, shape: tuple[int | None, ...] | None, where: str) -> np.ndarray:
    """`labels[name]` as float64 of that shape; None fits any length, or any shape. NaN is let through: it marks frames.

    Raises:
        ConvertError: it is missing, holds no numbers, or has another shape.
    """
    if name not in labels:
        raise ConvertError(f"{where} has no {name!r}; it has {', '.join(sorted(map(str, labels)))}")
    try:
        array = np.asarray(labels[name], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{where}: {name} must hold numbers: {error}") from error
    if shape is not None and not (
        array.ndim == len(shape) and all(w in (None, g) for w, g in zip(shape, array.shape, strict=True))
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ConvertError(f"{where}: {name} must have shape ({wanted}), got {array.shape}")
    return array


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConvertError(f"{path} has {path.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from error


def _dictionary(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConvertError(f"{what} must hold a dictionary, got {type(value).__name__}")
    return value
