"""Costs: the paper's table to the digit, and what thop leaves out."""

from dataclasses import replace

import pytest
import torch

from fasthmr.cost import encoder_cost, frames_per_second, interleaved_seconds
from fasthmr.merging import LayerMergePlan, TokenMerging
from fasthmr.merging.similarity import linear_cka
from fasthmr.models.hmr import HMR, HMRConfig

FULL = HMRConfig.hmr2()
MERGED = LayerMergePlan(32).merged(27, 31)


@pytest.mark.parametrize(
    ("config", "plan", "params_m", "macs_g"),
    [
        (FULL, None, 670.21, 122.59),
        (FULL, MERGED, 591.50, 107.48),
        (replace(FULL, token_merging=TokenMerging()), MERGED, 591.50, 52.82),
    ],
    ids=["HMR2.0", "+ ECLM", "+ Mask-ToMe"],
)
def test_rows_of_the_papers_table_12(config, plan, params_m, macs_g):
    cost = encoder_cost(config, plan)
    assert round(cost.params_thop / 1e6, 2) == params_m
    assert round(cost.macs_thop / 1e9, 2) == macs_g


def test_everything_counted():
    cost = encoder_cost(FULL)
    assert (cost.layers, cost.tokens, cost.params) == (32, 192, 670_459_037)
    linear = cost.macs_thop - 4 * (65 * 192 * 1280 + 18 * 1024)  # LayerNorms of backbone and head
    backbone_attention = 32 * 2 * 192 * 192 * 1280
    head_attention = 6 * 2 * 8 * 64 * (192 + 1)
    assert cost.macs_all == linear + backbone_attention + head_attention


def test_merged_tokens_cost_less_in_the_block_that_merges_them():
    few = encoder_cost(replace(FULL, token_merging=TokenMerging(keep_tokens=152)))
    # 40 tokens less in the feed-forward network of the first layer and in all of the 31 others
    mlp, attention, norm = 2 * 4 * 1280**2, 4 * 1280**2, 4 * 1280
    saved = 40 * (32 * mlp + 31 * attention + (31 + 31 + 1 + 1) * norm) + 6 * 2 * 40 * 1280 * 512
    assert encoder_cost(FULL).macs_thop - few.macs_thop == saved


def test_measured_in_turn():
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" * 4 and set(seconds) == {"a", "b"}
    with pytest.raises(ValueError, match="rounds must be 1 or more"):
        interleaved_seconds({}, rounds=0)


def test_frames_per_second():
    small = HMRConfig(vit_dim=32, vit_depth=4, vit_heads=2, head_dim=32, head_depth=1, head_heads=2, head_mlp_dim=32)
    encoders = {"whole": HMR(small).eval(), "few": HMR(replace(small, token_merging=TokenMerging())).eval()}
    assert all(rate > 0 for rate in frames_per_second(encoders, batch=2, rounds=1).values())


class TestSimilarity:
    def test_of_rotated_and_scaled_features_is_1(self):
        features = torch.randn(200, 8)
        turned = 3.0 * features @ torch.linalg.qr(torch.randn(8, 8)).Q + 5.0
        torch.testing.assert_close(linear_cka([features, turned])[0, 1], torch.tensor(1.0, dtype=torch.float64))

    def test_against_the_definition_in_feature_space(self):
        x, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
        xc, yc = x - x.mean(0), y - y.mean(0)
        expected = (yc.T @ xc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
        torch.testing.assert_close(linear_cka([x, y])[0, 1], expected)

    def test_of_constant_features_is_0_and_too_few_samples_are_refused(self):
        assert linear_cka([torch.ones(5, 3), torch.randn(5, 3)])[0, 1] == 0
        with pytest.raises(ValueError, match="two or more samples"):
            linear_cka([torch.ones(1, 3)])
