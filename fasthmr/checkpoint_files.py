"""Checkpoint files as such: written whole or not at all, read without executing anything, with their checksums.

What is in them is the business of `fasthmr.checkpoint`.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasthmr.files import written_whole
from fasthmr.safetensors_io import SUFFIX as SAFETENSORS
from fasthmr.safetensors_io import read_safetensors

#: what is written, and the oldest that is read; `fasthmr.checkpoint` says what each added
FORMAT_VERSION = 2
OLDEST_VERSION = 1
HEADER_KEY = "fasthmr"
#: `shipped:NAME` stands for the weights of that name in this package
SHIPPED = "shipped:"
_WEIGHTS = Path(__file__).parent / "weights"
_MAX_NAMES = 6
#: a network is filled so many bytes at a time: what was mapped for them is given back before the next
_PORTION_BYTES = 2**28
_READ_BYTES = 2**22

_Network = TypeVar("_Network", bound=nn.Module)


class CheckpointError(ValueError):
    """A file is not a checkpoint that this version can load; the message names the file and what is wrong."""


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain data, atomically: `path` holds the old file or the whole new one, whatever happens.

    Missing folders are made.

    Raises:
        OSError: the file cannot be written, e.g. no permission or a full disk. Nothing half-written stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        torch.save(dict(content), file)


def located(path: str | Path) -> Path:
    """The file that a checkpoint's path means: itself, or for `shipped:NAME` the weights of that name in this package.

    Raises:
        FileNotFoundError: no weights of that name are shipped; names those that are.
    """
    if not str(path).startswith(SHIPPED):
        return Path(path)
    name = str(path).removeprefix(SHIPPED)
    shipped = {file.stem: file for file in sorted(_WEIGHTS.glob(f"*{SAFETENSORS}"))}
    if name not in shipped:
        raise FileNotFoundError(f"no weights {name!r} are shipped; there are: {', '.join(shipped) or 'none'}")
    return shipped[name]


class StandIn:
    """Stands in for a class whose objects are of no interest, such as a config's; they become empty dicts.

    A dict is all that torch's own reader fills, so "making" a stand-in gives one; nothing of the real class is needed.
    """

    def __new__(cls, *arguments: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_checkpoint(path: Path, stand_ins: Collection[str] = ()) -> dict[str, Any]:
    """Top-level dict of a file, without executing anything in it; its tensors are mapped, not read.

    Args:
        path: of the file.
        stand_ins: packages whose classes are replaced by `StandIn`, and not imported. Names from elsewhere stop the
            reading before a thing is made.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds something other than tensors, plain data and objects of `stand_ins`.
    """
    path = located(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give the checkpoint itself")
    if path.suffix == SAFETENSORS:
        try:
            return read_safetensors(path)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is damaged, incomplete, or no checkpoint: it is not a whole zip file")
    verify_checksums(path, weights=False)
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in _replaceable(path, stand_ins)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds objects other than tensors and plain data: {error}") from error
    # what torch's reader raises on pickles that no torch.save has written
    except (
        RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError, AssertionError,
        struct.error, MemoryError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path} is damaged or no checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a fasthmr checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def _replaceable(path: Path, stand_ins: Collection[str]) -> list[str]:
    """The names in a file that torch does not read, all of these packages.

    Raises:
        CheckpointError: one is of another package.
    """
    if not stand_ins:
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if others := sorted(name for name in names if name.partition(".")[0] not in stand_ins):
        raise CheckpointError(
            f"{path} asks for {', '.join(others[:_MAX_NAMES])}, which is not on the list of harmless names; nothing "
            "was run"
        )
    return names


def verify_checksums(path: Path, weights: bool) -> None:
    """Compare a file with the checksums inside it: torch maps the weights without looking at them.

    Reads the whole file, or without `weights` only what is not a tensor (torch names tensors `<any>/data/<number>`).
    A safetensors file has no checksums; its layout was compared with its size when it was read.

    Raises:
        CheckpointError: it is damaged.
    """
    path = located(path)
    if path.suffix == SAFETENSORS:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # a small file could unpack to any size
                    raise CheckpointError(f"{path} is no checkpoint: {member.filename} in it is compressed")
                if weights or Path(member.filename).parent.name != "data":
                    with archive.open(member) as stream:
                        while stream.read(_READ_BYTES):
                            pass  # reading to the end compares the checksum
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error


def raw_header(path: Path, content: Mapping[str, Any], *kinds: str) -> dict[str, Any]:
    """The header of a file's content, which must be of our format version and of one of these kinds (of none: any).

    Raises:
        CheckpointError: it is not; says what it is.
    """
    raw = content.get(HEADER_KEY)
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise CheckpointError(
            f"{path} is not a fasthmr checkpoint: it has no {HEADER_KEY!r} header. If it is HMR2.0's or CameraHMR's, "
            "or has such a backbone, convert it: python -m fasthmr.export --help"
        )
    version = raw["format_version"]
    if not isinstance(version, int) or not OLDEST_VERSION <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this version of fasthmr reads {OLDEST_VERSION} to "
            f"{FORMAT_VERSION}: "
            f"use {'a newer' if isinstance(version, int) and version > FORMAT_VERSION else 'the'} fasthmr that wrote it"
        )
    if kinds and raw.get("kind") not in kinds:
        wanted = " or ".join(map(repr, kinds))
        raise CheckpointError(f"{path} is a checkpoint of kind {raw.get('kind')!r}, not {wanted}")
    return raw


def require_fields(path: Path, raw: Mapping[str, Any], **fields: type) -> None:
    """Refuse a header, or a part of one, without these fields of these types.

    Raises:
        CheckpointError: names the field and what it holds.
    """
    for key, wanted in fields.items():
        if not isinstance(raw.get(key), wanted):
            raise CheckpointError(f"{path}: header field {key!r} must be a {wanted.__name__}, got {raw.get(key)!r}")


def weights_of(path: Path, content: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The weights of a file's content whose names start with `prefix`, without it; the file is compared with its
    checksums.

    Raises:
        CheckpointError: it is damaged, or there are none.
    """
    verify_checksums(path, weights=True)
    weights = _with_prefix(tensors_of(path, content.get("state_dict")), prefix)
    if not weights:
        raise CheckpointError(f"{path} has no weights whose names start with {prefix!r}, which its header asks for")
    return weights


def tensors_of(path: Path, state_dict: object) -> dict[str, Tensor]:
    """A state dict as a file has it, checked to be one, of tensors that are as large in the file as they say.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path} has no 'state_dict'")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r} in its 'state_dict' is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} {tuple(value.shape)} is larger than what is stored of it")
    return state_dict


def _with_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def filled(path: Path, build: Callable[[], _Network], prefix: str) -> _Network:
    """A network with the weights of a checkpoint, on the CPU and in evaluation mode. Draws no random numbers.

    Args:
        path: of the checkpoint, which is compared with its checksums.
        build: makes the network.
        prefix: of the weights' names.

    Raises:
        CheckpointError: it is damaged, or the weights are not exactly the network's; names them.
    """
    weights_of(path, read_checkpoint(path), prefix)  # refuses what is damaged
    return filled_from(path, build, lambda: _with_prefix(read_checkpoint(path)["state_dict"], prefix))


def filled_from(path: Path, build: Callable[[], _Network], mapped: Callable[[], Mapping[str, Tensor]]) -> _Network:
    """A network with the weights that `mapped` finds in a file; errors as of `filled`.

    The file is mapped anew for every portion, and so let go of: mapped at once, all of it would stay in memory beside
    the network, which is twice the memory.
    """
    # Built without memory and filled after: random initial weights would cost time and move the global generator.
    with torch.device("meta"):
        network = build()
    before = _identity(path)
    _require_same_tensors(path, expected=network.state_dict(), got=mapped())
    network.to_empty(device="cpu")
    ours = network.state_dict()
    for names in _portions(ours):
        theirs = mapped()
        for name in names:
            ours[name].copy_(theirs[name])
    if _identity(path) != before:
        raise CheckpointError(f"{path} was replaced while it was read: load it again")
    return network.eval()


def _portions(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names, size = list[str](), 0
    for name, tensor in tensors.items():
        names.append(name)
        size += tensor.nbytes
        if size > _PORTION_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced."""
    status = located(path).stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _require_same_tensors(path: Path, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := [name for name in expected if name not in got]:
        problems.append(f"missing {_names(missing)}")
    if unexpected := [name for name in got if name not in expected]:
        problems.append(f"unexpected {_names(unexpected)}")
    if misshapen := [
        f"{name} {tuple(got[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in got and got[name].shape != tensor.shape
    ]:
        problems.append(f"wrong shape {_names(misshapen)}")
    if problems:
        raise CheckpointError(f"the weights of {path} do not fit its config: {'; '.join(problems)}")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
