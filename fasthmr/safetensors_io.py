"""Weights to hand on: a checkpoint's header and tensors as one safetensors file, in bfloat16 if wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fasthmr.files import written_whole

SUFFIX = ".safetensors"
#: the header, as JSON, in the file's metadata; the same name as in a checkpoint
_HEADER_KEY = "fasthmr"
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(
    path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write weights whole or not at all, tensor by tensor: memory for one of them is enough. Missing folders are made.

    Args:
        path: file to write.
        header: plain data (`fasthmr.checkpoint` says what it means).
        tensors: by name; floating-point ones are stored in `dtype`, others as they are.
        dtype: torch.float32 or torch.bfloat16, which halves the file and keeps 8 significant bits.

    Raises:
        OSError: it cannot be written; nothing half-written stays.
    """
    path = Path(path)
    layout: dict[str, Any] = {"__metadata__": {_HEADER_KEY: json.dumps(header)}}
    end = 0
    for name, tensor in tensors.items():
        stored = _stored_dtype(tensor, dtype)
        start, end = end, end + tensor.numel() * stored.itemsize
        layout[name] = {"dtype": _DTYPE_NAMES[stored], "shape": list(tensor.shape), "data_offsets": [start, end]}
    described = json.dumps(layout).encode()
    described += b" " * (-len(described) % 8)  # so that the tensors are aligned
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for tensor in tensors.values():
            bare = tensor.detach().cpu().to(_stored_dtype(tensor, dtype)).contiguous().flatten()
            file.write(bare.view(torch.uint8).numpy().data)


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """Header and weights as a checkpoint has them: {"fasthmr": header, "state_dict": name -> tensor}.

    Tensors are mapped, not read, and have the type that they are stored in.

    Raises:
        ValueError: the file is damaged, or not one of ours.
    """
    metadata, tensors = read_tensors(path)
    try:
        header = json.loads(metadata[_HEADER_KEY])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} has no {_HEADER_KEY!r} header in its metadata: it was not written by fasthmr"
        ) from error
    return {_HEADER_KEY: header, "state_dict": tensors}


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of any safetensors file; they are mapped, not read.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _stored_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype
