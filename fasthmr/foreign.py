"""Foreign checkpoints: HMR2.0, CameraHMR, its HumanFoV, and anything with such a backbone, read without running them.

Their files are Lightning checkpoints, old ones with the training's whole configuration pickled beside the weights.
Objects of the packages in `STAND_INS` are replaced by empty dicts; any other name stops the reading.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from fasthmr.checkpoint_files import (
    HEADER_KEY,
    CheckpointError,
    filled_from,
    read_checkpoint,
    tensors_of,
    verify_checksums,
)
from fasthmr.models.adapters import (
    Foreign,
    backbone_sizes,
    backbone_state_dict,
    hmr_config,
    hmr_state_dict,
    human_fov_state_dict,
    recognised,
)
from fasthmr.models.hmr import HMR, Architecture, HMRConfig
from fasthmr.models.human_fov import HumanFoV
from fasthmr.safetensors_io import SUFFIX, read_tensors

#: packages whose objects lie in such checkpoints, beside the weights: configurations, paths, states of callbacks
STAND_INS = frozenset({
    "yacs", "omegaconf", "easydict", "lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning",
    "torchmetrics", "argparse", "pathlib", "collections", "enum", "typing", "numpy", "hmr2", "tokenhmr", "hamer",
    "core",
})  # fmt: skip
#: keys under which files keep their state dict; without any, the file is one
_STATE_DICT_KEYS = ("state_dict", "model")
#: ending of a message about a network that is another one
_ELSE = "if it is another network with HMR2.0's backbone, take that alone: --from backbone"

_log = logging.getLogger("foreign")


def read_foreign(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a foreign file (torch.save's zip or safetensors), its tensors mapped.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, asks for names that are not on the list, or holds no state dict.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[bool, dict[str, Tensor]]:
    """Whether a file has our header, and its state dict; errors as of `read_foreign`."""
    if path.suffix == SUFFIX and path.is_file():
        try:
            metadata, tensors = read_tensors(path)
            return HEADER_KEY in metadata, tensors_of(path, tensors)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    content = read_checkpoint(path, STAND_INS)
    weights = next((content[key] for key in _STATE_DICT_KEYS if key in content), content)
    return HEADER_KEY in content, tensors_of(path, weights)


def what_is(path: str | Path, kind: Foreign | None = None) -> Foreign:
    """What a foreign file holds: `kind` where it is given, else by the names in it.

    Raises:
        CheckpointError: nothing that is known; a file of ours; or as `read_foreign`.
    """
    if kind is None:
        ours, weights = _read(Path(path))
        if ours:
            raise CheckpointError(f"{path} is ours already: leave --from away")
        if any(name.startswith("hmr.smpl_head.") for name in weights):
            raise CheckpointError(
                f"{path} is of a folder that --hub wrote: load that with fasthmr.hub.HubModel.from_pretrained"
            )
        kind = recognised(weights)
    if kind is None:
        raise CheckpointError(f"{path} holds none of {', '.join(get_args(Foreign))}: no names of theirs are in it")
    return kind


def load_hmr(path: str | Path, architecture: Architecture, vit_heads: int | None = None) -> HMR:
    """An HMR2.0 or CameraHMR checkpoint as our network, on the CPU and in evaluation mode. Its body is SMPL's.

    Args:
        path: of the file.
        architecture: whose it is.
        vit_heads: attention heads of the backbone; None: as ViTPose has them for its width (16 for ViT-H).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, asks for names that are not on the list, or is another network; names the
            weights that do not fit.
    """
    path = Path(path)
    verify(path)

    def mapped() -> dict[str, Tensor]:
        return hmr_state_dict(read_foreign(path), architecture)

    try:
        config = hmr_config(mapped(), architecture, vit_heads)
        return filled_from(path, lambda: HMR(config), mapped)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_ELSE}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not {architecture}'s: {error}; {_ELSE}") from error


def load_backbone(
    path: str | Path, config: HMRConfig | None = None, vit_heads: int | None = None, seed: int = 0
) -> HMR:
    """An encoder to train further: the backbone of a file, and a head with random weights.

    Args:
        path: of any checkpoint with a ViT as HMR2.0 has it, such as HMR2.0, HaMeR, TokenHMR or ViTPose. Whatever else
            is in it is left out, and listed in the log: heads of other networks are not supported.
        config: sizes of the head; those of the backbone are the file's. None: HMR2.0's.
        vit_heads: as for `load_hmr`.
        seed: of the head's weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: as `load_hmr`.
    """
    path = Path(path)
    verify(path)
    try:
        weights, others = backbone_state_dict(read_foreign(path))
        head = config if config is not None else HMRConfig()
        full = HMRConfig.from_dict({**head.as_dict(), **backbone_sizes(weights, vit_heads)})
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if others:
        parts = Counter(name.partition(".")[0] for name in others)
        _log.info("left out of %s: %s", path, ", ".join(f"{part} ({count} tensors)" for part, count in parts.items()))
    # The head alone is drawn; a backbone of this depth would be drawn to be overwritten.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = HMR(HMRConfig.from_dict({**full.as_dict(), "vit_depth": 1, "token_merging": None})).smpl_head
    head_weights = {f"smpl_head.{name}": tensor for name, tensor in drawn.state_dict().items()}
    return filled_from(path, lambda: HMR(full), lambda: {**backbone_state_dict(read_foreign(path))[0], **head_weights})


def load_foreign_human_fov(path: str | Path) -> HumanFoV:
    """CameraHMR's FLNet as our `HumanFoV`, from its own file or from a training checkpoint; errors as of `load_hmr`."""
    path = Path(path)
    verify(path)

    def mapped() -> Mapping[str, Tensor]:
        return human_fov_state_dict(read_foreign(path))

    first = mapped().get("backbone.transition1.0.0.weight")
    width = 1 if first is None or first.ndim == 0 else first.shape[0]
    return filled_from(path, lambda: HumanFoV(width), mapped)


def verify(path: Path) -> None:
    """Compare a file with its checksums; raises as `read_foreign`."""
    read_foreign(path)
    verify_checksums(path, weights=True)
