"""Costs: the paper's table to the digit, and what thop leaves out."""

import itertools
from dataclasses import replace

import pytest
import torch

from fasthmr import benchmark, cost, speed
from fasthmr.body import load_body
from fasthmr.checkpoint import save_encoder
from fasthmr.cost import decoder_cost, encoder_cost, fov_cost, frames_per_second, interleaved_seconds, merging_share
from fasthmr.merging import LayerMergePlan, TokenMerging
from fasthmr.merging.similarity import linear_cka
from fasthmr.models.denoiser import DenoiserConfig
from fasthmr.models.diffusion_decoder import DiffusionDecoderConfig
from fasthmr.models.hmr import HMR, HMRConfig
from fasthmr.models.motion_vae import MotionVAEConfig
from fasthmr.report import short_names

FULL = HMRConfig.hmr2()
CAMERAHMR = HMRConfig.camerahmr()
SMALL = HMRConfig(vit_dim=32, vit_depth=4, vit_heads=2, head_dim=32, head_depth=1, head_heads=2, head_mlp_dim=32)
MERGED = LayerMergePlan(32).merged(27, 31)
MERGED_MORE = LayerMergePlan(32).merged(25, 31)


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


@pytest.mark.parametrize(
    ("config", "plan", "params_m", "macs_g"),
    [
        (CAMERAHMR, None, 737.09, 143.99),
        (CAMERAHMR, MERGED_MORE, 619.03, 121.33),
        (replace(CAMERAHMR, token_merging=TokenMerging()), MERGED_MORE, 619.03, 70.68),
    ],
    ids=["CameraHMR", "+ ECLM", "+ Mask-ToMe"],
)
def test_rows_of_camerahmr_with_its_network_for_the_intrinsics(config, plan, params_m, macs_g):
    cost, fov = encoder_cost(config, plan), fov_cost()
    assert round((cost.params_thop + fov["params_thop"]) / 1e6, 2) == params_m
    assert round((cost.macs_thop + fov["macs_thop"]) / 1e9, 2) == macs_g


def test_the_decoder_of_the_papers_table_12():
    config = DiffusionDecoderConfig(MotionVAEConfig(depth=5), DenoiserConfig(depth=5))
    once, twice = (decoder_cost(config, steps) for steps in (1, 2))
    assert once["macs_thop"] / 1e9 == pytest.approx(6.79, abs=0.01)
    # five layers of 271 tokens, of 4 + 2 x 2 products of width 512, and what leads into and out of them
    denoising = twice["macs_thop"] - once["macs_thop"]
    assert denoising / (5 * 271 * 8 * 512**2) == pytest.approx(1.15, abs=0.01)
    attention = 2 * 271 * 271 * 512 * 5
    assert twice["macs_all"] - once["macs_all"] - denoising == pytest.approx(attention, rel=0.05)
    assert twice["params_thop"] == once["params_thop"] <= once["params"]  # however often a layer is called


def test_camerahmrs_head_costs_its_token_and_its_keypoints_more():
    more = (160 - 1) * 1024 + 88 * (1024 + 1)
    assert encoder_cost(CAMERAHMR).params - encoder_cost(FULL).params == more


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
    encoders = {"whole": HMR(SMALL).eval(), "few": HMR(replace(SMALL, token_merging=TokenMerging())).eval()}
    assert all(rate > 0 for rate in frames_per_second(encoders, batch=2, rounds=1).values())
    with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
        frames_per_second(encoders, batch=0)


def test_compiled_means_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(cost.torch, "compile", lambda function, **_: compiled.append(function) or function)
    hmr = HMR(replace(SMALL, token_merging=TokenMerging())).eval()
    frames_per_second({"few": hmr}, batch=1, rounds=1, compiled=True)
    merging_share(hmr, batch=1, rounds=1, compiled=True)
    assert len(compiled) == 3
    frames_per_second({"few": hmr}, batch=1, rounds=1)
    assert len(compiled) == 3


class TestBenchmarkOfEncoders:
    def test_two_checkpoints_of_one_name_are_two_rows_with_what_they_reach(self, tmp_path, capsys, monkeypatch):
        torch.manual_seed(0)
        for folder, tokens in (("a", None), ("b", TokenMerging(keep_tokens=150))):
            (tmp_path / folder).mkdir()
            hmr = HMR(replace(SMALL, token_merging=tokens)).eval()
            save_encoder(tmp_path / folder / "best.ckpt", hmr, load_body().id)
        shared = {"a/best": 1000.0, "b/best": 2000.0}
        monkeypatch.setattr(speed.encoders, "frames_per_second", lambda named, *_, **__: {n: shared[n] for n in named})
        paths = [str(tmp_path / folder / "best.ckpt") for folder in "ab"]
        assert benchmark.main(["encoder", *paths, "--batch", "1", "4", "--rounds", "1"]) == 0
        printed = capsys.readouterr().out
        rows = {
            line.split("│")[1].strip(): line.split("│")[2:-1] for line in printed.splitlines() if line.startswith("│")
        }
        assert list(rows) == ["a/best", "b/best"]
        reached = 2 * encoder_cost(SMALL).macs_all * 1000.0 / 1e12
        assert float(rows["a/best"][-1]) == pytest.approx(reached, rel=0.01)
        assert "% at batch 1, " in printed and "% at batch 4" in printed

    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (["x/a.ckpt", "y/b.ckpt"], ["a", "b"]),
            (["r/x/best.ckpt", "r/y/best.ckpt"], ["x/best", "y/best"]),
            (["x/best.ckpt", "best.ckpt"], ["x/best", "best"]),
            (["a.ckpt", "a.ckpt"], ["a.ckpt (1)", "a.ckpt (2)"]),
        ],
    )
    def test_short_names(self, paths, names):
        assert short_names(paths) == names

    @pytest.mark.parametrize("flag", ["--batch", "--rounds"])
    def test_mistakes_end_in_one_line(self, capsys, flag):
        assert benchmark.main(["encoder", "--size", "tiny", flag, "0"]) == 2
        assert capsys.readouterr().err == f"error: {flag} must be 1 or more, got 0\n"

    def test_the_help_names_the_memory_that_was_measured(self):
        assert "needs 14 GB of memory" in benchmark.__doc__


class TestSimilarity:
    def test_of_rotated_and_scaled_features_is_1(self):
        features = torch.randn(200, 8)
        turned = 3.0 * features @ torch.linalg.qr(torch.randn(8, 8)).Q + 5.0
        torch.testing.assert_close(linear_cka([features, turned])[0, 1], torch.tensor(1.0, dtype=torch.float64))

    def test_the_products_are_the_unbiased_estimator(self):
        """Averages over all pairs, triples and quadruples of different samples (Song et al. 2012, Eq. 4)."""
        x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)

        def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
            k, g = (a @ a.T).tolist(), (b @ b.T).tolist()
            pairs = [k[i][j] * g[i][j] for i, j in itertools.permutations(range(6), 2)]
            triples = [k[i][j] * g[i][q] for i, j, q in itertools.permutations(range(6), 3)]
            quadruples = [k[i][j] * g[q][r] for i, j, q, r in itertools.permutations(range(6), 4)]
            mean = [sum(values) / len(values) for values in (pairs, triples, quadruples)]
            return mean[0] - 2 * mean[1] + mean[2]

        expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
        assert float(linear_cka([x, y])[0, 1]) == pytest.approx(expected, abs=1e-12)

    def test_independent_features_score_0_also_where_they_are_wide(self):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, 512, 1280, generator=generator)
        assert abs(float(linear_cka([x, y])[0, 1])) < 0.01

    def test_of_constant_features_is_0_and_too_few_samples_are_refused(self):
        assert linear_cka([torch.ones(5, 3), torch.randn(5, 3)])[0, 1] == 0
        with pytest.raises(ValueError, match="4 or more samples"):
            linear_cka([torch.ones(3, 3)])
