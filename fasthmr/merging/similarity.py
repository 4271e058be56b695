"""How similar the layers of a network are: linear centred kernel alignment (Kornblith et al. 2019; FastHMR, Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka(features: Sequence[Tensor]) -> Tensor:
    """CKA of every pair of layers.

    Args:
        features: of each of L layers, the same n samples: (n, D), D may differ.

    Returns:
        (L, L) float64, symmetric, 1 on the diagonal, unchanged by rotations and scales of a layer's features. A layer
        whose features do not vary has 0 with all others.

    Raises:
        ValueError: fewer than two samples, or different numbers of them.
    """
    counts = {len(layer) for layer in features}
    if len(counts) != 1 or counts.pop() < 2:
        raise ValueError(f"all layers need the same two or more samples, got {[len(layer) for layer in features]}")
    grams = []
    for layer in features:
        centred = layer.double() - layer.double().mean(0)
        gram = centred @ centred.mT
        grams.append((gram / gram.norm().clamp_min(torch.finfo(gram.dtype).tiny)).flatten())
    stacked = torch.stack(grams)
    return stacked @ stacked.mT
