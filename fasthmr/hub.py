"""A folder as huggingface_hub's `PyTorchModelHubMixin` writes and reads it: weights, config.json and a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from fasthmr.checkpoint import encoder_id, networks_of_header
from fasthmr.models.diffusion_decoder import DiffusionDecoder
from fasthmr.models.hmr import HMR, HMROutput

_CARD = """---
{{ card_data }}
---

Person crops in, SMPL pose, shape and camera out: an encoder of [FastHMR](https://arxiv.org/abs/2510.10868)'s kind, and
its diffusion decoder if there is one. Written by `python -m fasthmr.export`.

```python
from fasthmr.body import load_body
from fasthmr.hub import HubModel
from fasthmr.pipeline import Pipeline

hmr, decoder, body_id = HubModel.from_pretrained("THIS FOLDER OR REPOSITORY").parts()
pipeline = Pipeline(hmr, decoder, load_body("THE BODY WITH THAT ID"))
```

The weights are under the terms of whoever trained them, and of the data and the body that they did it with.
"""


class HubModel(
    nn.Module, PyTorchModelHubMixin, library_name="fasthmr", tags=["human-mesh-recovery"], model_card_template=_CARD
):
    """An encoder, with or without its decoder, that `huggingface_hub` saves, uploads and loads.

    Args:
        header: of a checkpoint of kind "encoder" or "pipeline" (`fasthmr.checkpoint`); this is what config.json holds.

    Raises:
        CheckpointError: it is of another kind or version, or damaged.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        super().__init__()
        self.header = header
        hmr, self.decoder = networks_of_header(header, where="config.json")
        self.hmr: HMR = hmr

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **more: Any) -> HubModel:
        # The mixin's own default drops weights that do not fit, in silence.
        return super()._from_pretrained(strict=strict, **more)

    def forward(self, images: Tensor, person_mask: Tensor | None = None, box_info: Tensor | None = None) -> HMROutput:
        """The encoder's answer, as `HMR.forward`."""
        return self.hmr(images, person_mask, box_info)

    def parts(self) -> tuple[HMR, DiffusionDecoder | None, str]:
        """Encoder, decoder and the id of their body, as `fasthmr.checkpoint.load_pipeline_parts` returns them."""
        if self.decoder is not None:
            self.decoder.encoder = encoder_id(self.hmr)
        return self.hmr, self.decoder, self.header["body"]


def write_hub_folder(
    folder: str | Path, header: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write the folder of an encoder or a pipeline; `HubModel.from_pretrained(folder)` reads it.

    Args:
        folder: made if missing; a model in it is overwritten.
        header, weights: as `fasthmr.checkpoint.network_of` returns them.
        dtype: of the floating-point weights.

    Raises:
        CheckpointError: it is neither an encoder nor a pipeline.
        OSError: it cannot be written.
    """
    with torch.device("meta"):
        model = HubModel(header=dict(header))
    prefix = "hmr." if header["kind"] == "encoder" else ""
    stored = {f"{prefix}{name}": t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
    model.load_state_dict(stored, assign=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        model.save_pretrained(unfinished)
        for file in Path(unfinished).iterdir():
            file.replace(folder / file.name)
