"""Checkpoint files as such: written whole or not at all, read without executing anything, with their checksums.

What is in them is the business of `fasthmr.checkpoint`.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasthmr.files import written_whole
from fasthmr.safetensors_io import SUFFIX as SAFETENSORS
from fasthmr.safetensors_io import read_safetensors

FORMAT_VERSION = 1
HEADER_KEY = "fasthmr"
#: `shipped:NAME` stands for the weights of that name in this package
SHIPPED = "shipped:"
_WEIGHTS = Path(__file__).parent / "weights"
_MAX_NAMES = 6
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Top-level dict of a file, without executing anything in it; its tensors are mapped, not read.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds something other than tensors and plain data.
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
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds objects other than tensors and plain data: {error}") from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a fasthmr checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


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
        raise CheckpointError(f"{path} is not a fasthmr checkpoint: it has no {HEADER_KEY!r} header")
    version = raw["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this version of fasthmr reads {FORMAT_VERSION}: "
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
    state_dict = content.get("state_dict")
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path} has no 'state_dict'")
    weights = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if not weights:
        raise CheckpointError(f"{path} has no weights whose names start with {prefix!r}, which its header asks for")
    return weights


def filled(path: Path, build: Callable[[], _Network], weights: Mapping[str, Tensor]) -> _Network:
    """A network with the weights of a file, on the CPU and in evaluation mode. Draws no random numbers.

    Raises:
        CheckpointError: the weights are not exactly the network's; names them.
    """
    # Built without memory and filled after: random initial weights would cost time and move the global generator.
    with torch.device("meta"):
        network = build()
    _require_same_tensors(path, expected=network.state_dict(), got=weights)
    network.to_empty(device="cpu")
    network.load_state_dict(weights)
    return network.eval()


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
