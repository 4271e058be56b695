"""Which precision networks compute in: bfloat16 on devices that have instructions for it, float32 on others.

A CPU without them (one with AVX2 alone, say) can do bfloat16 only by conversions, several times slower than float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

#: what is computed in: bfloat16 by autocast, or float32
Precision = Literal["bf16", "32"]
#: what can be asked for: one of them, or `auto`, bfloat16 where the device has instructions for it
PrecisionChoice = Literal["auto", "bf16", "32"]
#: how tables name them
IN_WORDS: Mapping[Precision, str] = {"bf16": "bf16", "32": "float32"}

#: of `torch.cpu.get_capabilities`: x86, x86 with matrix tiles, ARM
_CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def has_bf16(device: torch.device | str) -> bool:
    """Whether a device has instructions for bfloat16."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch knows what oneDNN says, which counts some conversions
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _CPU_INSTRUCTIONS)


def require_precision(choice: str) -> None:
    """Refuse what is no `PrecisionChoice`.

    Raises:
        ValueError: naming the choices.
    """
    if choice not in get_args(PrecisionChoice):
        raise ValueError(f"precision must be one of {', '.join(get_args(PrecisionChoice))}, got {choice!r}")


def chosen_precision(choice: PrecisionChoice, device: torch.device | str) -> Precision:
    """What is computed in on a device.

    Raises:
        ValueError: as `require_precision`.
    """
    require_precision(choice)
    if choice == "auto":
        return "bf16" if has_bf16(device) else "32"
    return choice


def autocast(choice: PrecisionChoice, device: torch.device | str) -> torch.autocast:
    """A context in which networks on a device compute in the chosen precision.

    Raises:
        ValueError: as `require_precision`.
    """
    precision = chosen_precision(choice, device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
