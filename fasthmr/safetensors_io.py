"""Weights to hand on: a checkpoint's header and tensors as one safetensors file, in bfloat16 if wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fasthmr.files import written_whole

SUFFIX = ".safetensors"
#: the header, as JSON, in the file's metadata; the same name as in a checkpoint
_HEADER_KEY = "fasthmr"


def write_safetensors(
    path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write weights whole or not at all; missing folders are made.

    Args:
        path: file to write.
        header: plain data (`fasthmr.checkpoint` says what it means).
        tensors: by name; floating-point ones are stored in `dtype`, others as they are.
        dtype: torch.float32 or torch.bfloat16, which halves the file and keeps 8 significant bits.

    Raises:
        OSError: it cannot be written; nothing half-written stays.
    """
    path = Path(path)
    stored = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        for name, tensor in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(save(stored, metadata={_HEADER_KEY: json.dumps(header)}))


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """Header and weights as a checkpoint has them: {"fasthmr": header, "state_dict": name -> tensor}.

    Floating-point tensors come back in float32, whatever they are stored in.

    Raises:
        ValueError: the file is damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        header = json.loads(metadata[_HEADER_KEY])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} has no {_HEADER_KEY!r} header in its metadata: it was not written by fasthmr"
        ) from error
    weights = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return {_HEADER_KEY: header, "state_dict": weights}
