"""The encoder: equal to HMR2.0 on small random weights, of its full size, and safe to train and compile."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fasthmr.geometry.cameras import crop_camera_translation
from fasthmr.models.adapters import hmr_state_dict
from fasthmr.models.hmr import HMR, HMRConfig, middle_columns
from fasthmr.models.smpl_head import MeanParameters

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = HMRConfig(
    vit_dim=64, vit_depth=4, vit_heads=4, head_dim=128, head_depth=2, head_heads=8, head_dim_head=16, head_mlp_dim=96
)
MICRO = HMRConfig(
    vit_dim=32, vit_depth=3, vit_heads=2, head_dim=24, head_depth=2, head_heads=2, head_dim_head=8, head_mlp_dim=16
)


def foreign_weights() -> dict[str, torch.Tensor]:
    """State dict of HMR2.0's own class at the SMALL size, with random weights; see tests/fixtures/README.md."""
    return torch.load(FIXTURES / "hmr2_small.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def hmr2_small() -> HMR:
    hmr = HMR(SMALL).eval()
    hmr.load_state_dict(hmr_state_dict(foreign_weights()))
    return hmr


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """What HMR2.0's own code computed; `img` holds only the columns that its backbone sees."""
    with np.load(FIXTURES / "hmr2_small_io.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def crops(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 256, 256, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: torch.Tensor, original: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest number."""
    original = original.reshape(ours.shape)
    torch.testing.assert_close(ours, original, rtol=0, atol=1e-5 * original.abs().max().item())


class TestParityWithHMR2:
    @torch.no_grad()
    def test_backbone(self, hmr2_small, original):
        vit = hmr2_small.backbone
        assert_same(vit.patch_embed(original["img"]), original["patch_tokens"])
        tokens = vit.embed(original["img"])
        for i in range(4):
            tokens = vit.blocks[str(i)](tokens)
            if f"block{i}_out" in original:
                assert_same(tokens, original[f"block{i}_out"])
        assert_same(vit.last_norm(tokens), original["features"])
        assert_same(vit(original["img"]).tokens, original["features"])

    @torch.no_grad()
    def test_whole_network(self, hmr2_small, original):
        # Whatever is in the columns that the backbone does not see must not matter.
        image = torch.full((1, 3, 256, 256), 7.0)
        middle_columns(image).copy_(original["img"])
        output = hmr2_small(image)
        assert_same(output.feature, original["decoder_token"])
        assert_same(output.pose6d, original["pose6d"])
        assert_same(output.rotations, torch.cat([original["global_orient"], original["body_pose"]], dim=1))
        assert_same(output.betas, original["betas"])
        assert_same(output.camera, original["pred_cam"])
        assert_same(crop_camera_translation(output.camera), original["pred_cam_t"])

    def test_the_adapter_ignores_by_name_and_hides_nothing_else(self):
        foreign = foreign_weights()
        assert {"initialized", "discriminator.betas_out.bias"} <= foreign.keys()
        ours = hmr_state_dict(foreign | {"smpl.faces_tensor": torch.zeros(1), "smpl_head.extra": torch.zeros(1)})
        assert ours.keys() - {"smpl_head.extra"} == HMR(SMALL).state_dict().keys()
        with pytest.raises(RuntimeError, match=r"smpl_head\.extra"):
            HMR(SMALL).load_state_dict(ours)

    def test_full_size_parameter_counts(self):
        def count(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        with torch.device("meta"):
            hmr = HMR(HMRConfig.hmr2())
        assert count(hmr.backbone.blocks["0"]) == 19_677_440
        assert count(hmr.backbone) == 630_912_000
        assert count(hmr.smpl_head) == 39_547_037
        assert count(hmr) == 670_459_037


class TestOutput:
    @torch.no_grad()
    def test_shapes_and_proper_rotations(self):
        output = HMR(MICRO).eval()(crops())
        shapes = {name: tuple(value.shape) for name, value in output._asdict().items()}
        assert shapes == {
            "feature": (2, 24), "rotations": (2, 24, 3, 3), "betas": (2, 10), "camera": (2, 3), "pose6d": (2, 144),
            "tokens": (2, 192, 32), "slots": (2, 192),
        }  # fmt: skip
        torch.testing.assert_close(torch.linalg.det(output.rotations), torch.ones(2, 24))

    @torch.no_grad()
    def test_an_untrained_network_predicts_an_upright_rest_pose(self):
        output = HMR(MICRO).eval()(crops())
        upright_and_facing = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
        expected = torch.cat([upright_and_facing[None], torch.eye(3).expand(23, 3, 3)]).expand(2, -1, -1, -1)
        torch.testing.assert_close(output.rotations, expected, rtol=0, atol=0.05)
        torch.testing.assert_close(output.camera, torch.tensor([[0.9, 0.0, 0.0]] * 2), rtol=0, atol=0.05)

    @torch.no_grad()
    def test_mean_parameters_are_added_and_saved(self):
        mean = MeanParameters(torch.arange(144.0), torch.arange(10.0), torch.tensor([1.1, 0.2, 0.3]))
        hmr = HMR(MICRO, mean).eval()
        torch.testing.assert_close(hmr(crops()).pose6d, mean.pose6d.expand(2, -1), rtol=0, atol=0.05)
        copy = HMR(MICRO).eval()
        copy.load_state_dict(hmr.state_dict())
        torch.testing.assert_close(copy(crops()).betas, hmr(crops()).betas)

    def test_a_mean_of_the_wrong_length_is_refused(self):
        with pytest.raises(ValueError, match=r"the mean betas must have 10 numbers, got shape \(11,\)"):
            HMR(MICRO, MeanParameters(torch.zeros(144), torch.zeros(11), torch.zeros(3)))

    @torch.no_grad()
    def test_the_head_takes_any_number_of_tokens(self, hmr2_small, original):
        tokens = original["features"]
        assert hmr2_small.smpl_head(tokens[:, :90]).pose6d.shape == (1, 144)
        # Attention does not care about the order of what it looks at.
        shuffled = hmr2_small.smpl_head(tokens.flip(1))
        assert_same(shuffled.pose6d, original["pose6d"])

    @torch.no_grad()
    def test_layers_can_be_deleted(self, hmr2_small, original):
        hmr = HMR(SMALL).eval()
        hmr.load_state_dict(hmr2_small.state_dict())
        del hmr.backbone.blocks["1"]
        assert hmr.backbone(original["img"]).tokens.isfinite().all()
        names = {name.split(".")[2] for name in hmr.state_dict() if name.startswith("backbone.blocks.")}
        assert names == {"0", "2", "3"}

    @torch.no_grad()
    def test_a_person_mask_changes_nothing_without_token_merging(self):
        hmr = HMR(MICRO).eval()
        mask = torch.zeros(2, 256, 256, dtype=torch.bool)
        torch.testing.assert_close(hmr(crops(), person_mask=mask).feature, hmr(crops()).feature, rtol=0, atol=0)


class TestTraining:
    def test_every_weight_but_the_zero_tokens_gets_a_gradient(self):
        hmr = HMR(MICRO).train()
        output = hmr(crops())
        (output.rotations.square().sum() + output.pose6d.sum() + output.betas.sum() + output.camera.sum()).backward()
        without = [name for name, p in hmr.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert without == []
        # HMR2.0's query is a zero through a linear layer: its weight exists, and never moves.
        assert hmr.smpl_head.token_embed.weight.grad.abs().max() == 0

    def test_positions_start_as_sinusoids_of_row_and_column(self):
        positions = HMR(MICRO).backbone.pos_embed[0, 1:].unflatten(0, (16, 12))
        torch.testing.assert_close(positions[3, 0, :16], positions[3, 11, :16])  # the first half tells the row
        torch.testing.assert_close(positions[0, 5, 16:], positions[15, 5, 16:])  # the second half the column
        assert math.isclose(positions[3, 5, 0].item(), math.sin(3), abs_tol=1e-6)
        assert math.isclose(positions[3, 5, 16 + 8].item(), math.cos(5), abs_tol=1e-6)
        assert len(positions.flatten(0, 1).unique(dim=0)) == 192

    def test_bf16_autocast_keeps_pose_and_camera_in_float32(self, hmr2_small, original):
        image = torch.zeros(1, 3, 256, 256)
        middle_columns(image).copy_(original["img"])
        with torch.autocast("cpu", torch.bfloat16):
            output = hmr2_small(image)
        assert {value.dtype for value in output[:-1]} == {torch.float32}
        torch.testing.assert_close(output.rotations @ output.rotations.mT, torch.eye(3).expand(1, 24, 3, 3))
        torch.testing.assert_close(output.pose6d, original["pose6d"], rtol=0, atol=0.02)
        output.rotations.sum().backward()

    def test_drop_path_grows_with_depth_and_acts_in_training_only(self):
        config = HMRConfig.from_dict(MICRO.as_dict() | {"drop_path": 0.5})
        hmr = HMR(config)
        assert [b.drop_path.probability for b in hmr.backbone.blocks.values()] == [0.0, 0.25, 0.5]
        images = crops()
        torch.testing.assert_close(hmr.eval()(images), hmr(images), rtol=0, atol=0)
        hmr.train()
        torch.manual_seed(0)
        first = hmr(images).feature
        torch.manual_seed(0)
        torch.testing.assert_close(hmr(images).feature, first, rtol=0, atol=0)
        assert any(not torch.equal(hmr(images).feature, first) for _ in range(5))

    def test_drop_path_keeps_the_mean(self):
        drop = HMR(HMRConfig.from_dict(MICRO.as_dict() | {"drop_path": 0.5})).backbone.blocks["2"].drop_path
        torch.manual_seed(0)
        kept = drop.train()(torch.ones(4000, 1, 1))
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        assert math.isclose(kept.mean().item(), 1.0, abs_tol=0.08)

    def test_head_dropout_acts_in_training_only(self):
        hmr = HMR(HMRConfig.from_dict(MICRO.as_dict() | {"head_dropout": 0.5})).train()
        images = crops()
        assert not torch.equal(hmr(images).feature, hmr(images).feature)
        hmr.eval()
        torch.testing.assert_close(hmr(images).feature, hmr(images).feature, rtol=0, atol=0)

    @pytest.mark.parametrize("bf16", [False, True])
    def test_compiles_as_one_graph(self, bf16):
        hmr = HMR(MICRO).eval()
        compiled = torch.compile(hmr, fullgraph=True, backend="eager")
        mask = torch.zeros(2, 256, 256, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output, expected = compiled(crops(), person_mask=mask), hmr(crops(), person_mask=mask)
        torch.testing.assert_close(tuple(output), tuple(expected))


class TestBadInput:
    @pytest.mark.parametrize(
        "images",
        [torch.zeros(2, 3, 256, 192), torch.zeros(3, 256, 256), torch.zeros(2, 3, 256, 256, dtype=torch.uint8)],
        ids=["already cut", "no batch", "not normalised"],
    )
    def test_images(self, images):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, 256, 256\) floats, normalised; got"):
            HMR(MICRO)(images)

    @pytest.mark.parametrize(
        "mask",
        [torch.zeros(1, 256, 256, dtype=torch.bool), torch.zeros(2, 256, 256, dtype=torch.uint8)],
        ids=["another batch", "labels"],
    )
    def test_person_mask(self, mask):
        with pytest.raises(ValueError, match=r"person_mask must be \(2, 256, 256\) bool, got"):
            HMR(MICRO)(crops(), person_mask=mask)

    def test_box_info(self):
        with pytest.raises(ValueError, match=r"box_info must be \(2, 3\), got \(2, 4\)"):
            HMR(MICRO)(crops(), box_info=torch.zeros(2, 4))

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"vit_depth": 0}, "vit_depth must be a positive whole number, got 0"),
            ({"head_dim": 2.5}, "head_dim must be a positive whole number, got 2.5"),
            ({"head_depth": True}, "head_depth must be a positive whole number, got True"),
            ({"vit_dim": 34}, "vit_dim must be a multiple of 4, got 34"),
            ({"vit_heads": 5}, r"vit_heads must divide vit_dim \(32\), got 5"),
            ({"drop_path": 1.0}, r"drop_path must be a number in \[0, 1\), got 1.0"),
            ({"head_dropout": -0.1}, r"head_dropout must be a number in \[0, 1\), got -0.1"),
            ({"vit_mlp_ratio": 0}, "vit_mlp_ratio must be a positive number, got 0"),
            ({"vit_mlp_ratio": 1.01}, r"vit_mlp_ratio times vit_dim \(32\) must be whole, got 1.01"),
            ({"vit_dept": 3}, "unknown key 'vit_dept' in an HMR config: did you mean 'vit_depth'"),
        ],
    )
    def test_config(self, change, message):
        with pytest.raises(ValueError, match=message):
            HMRConfig.from_dict(MICRO.as_dict() | change)


def test_config_round_trip_and_presets():
    for config in (HMRConfig.hmr2(), HMRConfig.tiny(), MICRO):
        assert HMRConfig.from_dict(config.as_dict()) == config
    with torch.device("meta"):
        tiny = HMR(HMRConfig.tiny())
    assert sum(p.numel() for p in tiny.parameters()) == 7_834_013
    assert tiny.backbone.num_tokens == 192
