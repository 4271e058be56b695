"""How similar the layers of a network are: linear centred kernel alignment (Kornblith et al. 2019; FastHMR, Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: the unbiased estimator divides by n - 3
_LEAST_SAMPLES = 4


def linear_cka(features: Sequence[Tensor]) -> Tensor:
    """CKA of every pair of layers, from the unbiased estimator of HSIC (Song et al. 2012, "Feature selection via
    dependence maximization", Eq. 5).

    The usual estimator is biased upwards where features are wider than there are samples: independent ones of width
    1280 score 0.56 on 1024 samples. This one scores them 0 but for chance, so it may be slightly negative.

    Args:
        features: of each of L layers, the same n samples: (n, D), D may differ.

    Returns:
        (L, L) float64, symmetric, 1 on the diagonal, unchanged by rotations, shifts and scales of a layer's features. A
        layer whose features do not vary has 0 with all.

    Raises:
        ValueError: fewer than four samples, or different numbers of them.
    """
    counts = {len(layer) for layer in features}
    if len(counts) != 1 or counts.pop() < _LEAST_SAMPLES:
        raise ValueError(
            f"all layers need the same {_LEAST_SAMPLES} or more samples, got {[len(layer) for layer in features]}"
        )
    grams = []
    for layer in features:
        gram = _centred_gram(layer.double())
        grams.append((gram / gram.norm().clamp_min(torch.finfo(gram.dtype).tiny)).flatten())
    stacked = torch.stack(grams)
    return stacked @ stacked.mT


def _centred_gram(features: Tensor) -> Tensor:
    """(n, D) -> (n, n) products of samples, such that the mean product of two of these is the unbiased HSIC: no sample
    meets itself, and rows and columns sum to 0 (Szekely and Rizzo 2014 call it U-centred)."""
    count = len(features)
    centred = features - features.mean(0)  # changes nothing but the rounding
    gram = (centred @ centred.mT).fill_diagonal_(0)
    rows = gram.sum(1) / (count - 2)
    return (gram - rows[:, None] - rows + gram.sum() / ((count - 1) * (count - 2))).fill_diagonal_(0)
