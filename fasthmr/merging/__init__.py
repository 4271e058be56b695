"""Merging: layers that become one (ECLM) and tokens that become one (Mask-ToMe), independent of any network."""

from fasthmr.merging.eclm import SearchStep, search_layer_merges
from fasthmr.merging.layers import collapse, merge_blocks
from fasthmr.merging.plan import LayerMergePlan, MergeEvent
from fasthmr.merging.tokens import MergedTokens, TokenMerging, merge_tokens

__all__ = [
    "LayerMergePlan",
    "MergeEvent",
    "MergedTokens",
    "SearchStep",
    "TokenMerging",
    "collapse",
    "merge_blocks",
    "merge_tokens",
    "search_layer_merges",
]
