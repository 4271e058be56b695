"""MergedEncoderModule: it learns a batch, keeps its average, and its checkpoints say what they are."""

from __future__ import annotations

import dataclasses
import math

import lightning as L
import numpy as np
import pytest
import torch

from callbacks.pictures import draw_strip
from datamodules.clips import ClipDataModule
from fasthmr.body import BodyMismatchError, load_body
from fasthmr.checkpoint import encoder_header, load_encoder, save_encoder
from fasthmr.data.batch import ClipBatch
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.lit.optim import OptimizerConfig, build_optimizer, decay_groups, warmup_cosine
from fasthmr.losses import LossWeights, NonFiniteLossError, token_joint_loss
from fasthmr.merging import LayerMergePlan, TokenMerging
from fasthmr.models.hmr import HMR, TOKEN_GRID, HMRConfig, HMROutput

TINY = HMRConfig(
    vit_dim=32, vit_depth=2, vit_heads=2, head_dim=32, head_depth=1, head_heads=2, head_dim_head=16, head_mlp_dim=32
)


@pytest.fixture(scope="module")
def batch(tiny_shards) -> ClipBatch:
    data = ClipDataModule(train=tiny_shards, val=tiny_shards, batch_size=2, frames_per_clip=3, val_frames=8, workers=0)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_a_batch_can_be_learnt_by_heart(batch):
    torch.manual_seed(0)
    module = MergedEncoderModule(TINY, loss=LossWeights(token_joints=0.5), ema_decay=None)
    trained = torch.nn.ModuleList([module.net, module.token_joints])
    optimizer, scheduler = build_optimizer(trained, OptimizerConfig(lr=2e-3, warmup_steps=5), total_steps=60)
    losses = []
    for _ in range(60):
        parts = module.loss(batch)
        parts["total"].backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append({k: v.item() for k, v in parts.items()})
    for part in ("total", "joints3d", "joints2d", "token_joints"):
        assert losses[-1][part] < 0.7 * losses[0][part], part


def test_token_joint_loss_knows_which_token_holds_a_joint():
    pixel = torch.tensor([128.0, 40.0])  # column (128 - 30) / 16 = 6, row (40 + 2) / 16 = 2
    joints = torch.zeros(1, 29, 3)
    joints[0, 5] = torch.tensor([*(pixel / 256 - 0.5), 1.0])
    right = torch.zeros(1, 192, 29)
    right[0, 2 * 12 + 6, 5] = 20.0
    wrong = torch.zeros(1, 192, 29)
    wrong[0, 2 * 12 + 7, 5] = 20.0
    valid = torch.tensor([True])
    assert token_joint_loss(right, joints, valid, TOKEN_GRID) < 1e-5
    assert token_joint_loss(wrong, joints, valid, TOKEN_GRID) > 19
    assert token_joint_loss(torch.zeros(1, 192, 29), joints, valid, TOKEN_GRID) == pytest.approx(math.log(192))
    joints[0, 5, 0] = -0.49  # left of the columns that the network sees
    assert token_joint_loss(wrong, joints, valid, TOKEN_GRID) == 0
    assert token_joint_loss(wrong, torch.full((1, 29, 3), torch.nan), valid, TOKEN_GRID) == 0


def test_a_loss_that_is_not_finite_names_the_clips(batch):
    module = MergedEncoderModule(TINY, loss=LossWeights(root=math.inf), ema_decay=None)
    module.trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(NonFiniteLossError, match=batch.keys[0]):
        module.training_step(batch, 0)


@pytest.mark.parametrize("mask", ["given", "none"])
def test_clips_without_masks_are_refused_where_tokens_are_merged_by_mask(batch, mask):
    merging = TokenMerging(keep_tokens=150, per_layer=42, mask=mask)
    module = MergedEncoderModule(dataclasses.replace(TINY, token_merging=merging), ema_decay=None)
    bare = dataclasses.replace(batch, has_masks=[True, False])
    for step in (module.loss, lambda clips: module.eval().validation_step(clips, 0)):
        step(batch)
        if mask == "none":
            step(bare)
        else:
            with pytest.raises(ValueError, match=f"these clips have no masks: {batch.keys[1]}"):
                step(bare)


def test_schedule_warms_up_then_falls_to_its_end():
    factor = warmup_cosine(OptimizerConfig(warmup_steps=10, final_lr_fraction=0.1), total_steps=110)
    assert [factor(0), factor(9), factor(10), factor(60)] == pytest.approx([1 / 11, 10 / 11, 1.0, 0.55])
    assert factor(110) == factor(500) == pytest.approx(0.1)


@pytest.mark.parametrize("depth", [1, 3])
def test_two_decay_groups_whatever_the_depth(depth):
    module = MergedEncoderModule(HMRConfig(**{**TINY.as_dict(), "vit_depth": depth}))
    matrices, vectors = decay_groups(module.net, 0.05)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim <= 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.net.parameters()))


def test_the_average_follows_and_is_what_validation_uses(batch):
    module = MergedEncoderModule(TINY, ema_decay=0.9)
    assert module.best_net is module.ema.module
    first = module.ema.module.smpl_head.decpose.bias.clone()
    module.ema.update_parameters(module.net)  # the first update takes the weights over
    with torch.no_grad():
        module.net.smpl_head.decpose.bias.add_(1.0)
    module.ema.update_parameters(module.net)
    # after one update the average's decay is (1 + 1) / (10 + 1): a short memory at the start
    assert torch.allclose(module.ema.module.smpl_head.decpose.bias - first, torch.full_like(first, 9 / 11))
    assert not any(p.requires_grad for p in module.ema.parameters())


def test_checkpoint_holds_the_average_the_header_and_no_body(tmp_path):
    module = MergedEncoderModule(TINY, loss=LossWeights(token_joints=0.5))
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert not [k for k in checkpoint["state_dict"] if k.startswith("body")]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    image = torch.randn(1, 3, 256, 256)
    expected = module.best_net.eval()(image).rotations
    assert torch.equal(load_encoder(tmp_path / "x.ckpt")(image).rotations, expected)


def test_a_checkpoint_of_another_body_or_size_is_refused():
    module = MergedEncoderModule(TINY)
    with pytest.raises(BodyMismatchError, match="other@0123"):
        module.on_load_checkpoint(
            {"fasthmr": encoder_header(TINY, "other@0123", LayerMergePlan(TINY.vit_depth), "net.")}
        )
    deeper = HMRConfig(**{**TINY.as_dict(), "vit_depth": 3})
    with pytest.raises(ValueError, match="vit_depth: 3 -> 2"):
        module.on_load_checkpoint(
            {"fasthmr": encoder_header(deeper, module.body.id, LayerMergePlan(deeper.vit_depth), "net.")}
        )
    with pytest.raises(ValueError, match="not written by fasthmr"):
        module.on_load_checkpoint({})


def test_pictures_show_input_meshes_and_sides(batch, free_body):
    module = MergedEncoderModule(TINY, ema_decay=None)
    with torch.no_grad():
        output: HMROutput = module(batch)
    strip = draw_strip(free_body, batch, output, clip=1)
    assert strip.shape == (256, 5 * 256, 3) and strip.dtype == np.uint8
    panels = np.split(strip, 5, axis=1)
    frame = batch.images[1, 1].permute(1, 2, 0).numpy()
    assert np.array_equal(panels[0], frame)
    # The true mesh covers the person's mask: that is how one sees that labels, camera and crop belong together.
    drawn = (panels[2] != frame).any(-1)
    mask = (batch.masks[1, 1] == 1).numpy()
    assert mask.any() and (drawn & mask).sum() > 0.9 * mask.sum()
    assert (panels[3] == 255).all(-1).mean() > 0.3  # white around the side view


def test_a_prediction_that_counts_on_the_images_lens_is_drawn_by_it(batch, free_body):
    """One who says the truth, as CameraHMR says it, is drawn where the truth is."""
    clip, frame = 1, 1
    row = clip * batch.valid.shape[1] + frame
    center, size, intrinsics = batch.box_center[clip, frame], batch.box_size[clip, frame], batch.intrinsics[clip]
    x, y, z = batch.translation[clip, frame]
    focal, half = intrinsics[0, 0], size / 2
    aside = z * (center - intrinsics[:2, 2]) / focal  # the middle of the crop, at that depth
    camera = torch.stack((focal / (half * z), x - aside[0], y - aside[1]))
    with torch.no_grad():
        output: HMROutput = MergedEncoderModule(TINY, ema_decay=None)(batch)
    for field, value in (("rotations", batch.rotations[clip, frame]), ("betas", batch.betas[clip]), ("camera", camera)):
        getattr(output, field)[row] = value
    _, predicted, true, *_ = np.split(draw_strip(free_body, batch, output, clip, full_image=True), 5, axis=1)
    image = batch.images[clip, frame].permute(1, 2, 0).numpy()
    drawn, there = ((panel != image).any(-1) for panel in (predicted, true))
    assert there.sum() > 1000 and (drawn != there).sum() < 0.01 * there.sum()
    _, by_the_crops_own, *_ = np.split(draw_strip(free_body, batch, output, clip), 5, axis=1)
    assert ((by_the_crops_own != image).any(-1) != there).sum() > 0.03 * there.sum()


class TestStartAndTeacher:
    @pytest.fixture
    def saved(self, tmp_path):
        torch.manual_seed(1)
        hmr = HMR(TINY)
        hmr.merge_layers(LayerMergePlan(2).merged(0, 1))
        save_encoder(tmp_path / "start.ckpt", hmr, load_body().id)
        return str(tmp_path / "start.ckpt"), hmr

    def test_weights_and_merged_layers_are_taken_over(self, saved):
        path, hmr = saved
        module = MergedEncoderModule(TINY, init_from=path)
        assert module.net.merge_plan == hmr.merge_plan == module.nets[1].merge_plan
        assert all(torch.equal(v, module.net.state_dict()[k]) for k, v in hmr.state_dict().items())

    def test_other_sizes_and_another_body(self, saved, tmp_path):
        path, hmr = saved
        with pytest.raises(ValueError, match="vit_depth: 2 -> 3"):
            MergedEncoderModule(dataclasses.replace(TINY, vit_depth=3), init_from=path)
        save_encoder(tmp_path / "other.ckpt", hmr, "other@0123")
        with pytest.raises(BodyMismatchError, match="other@0123"):
            MergedEncoderModule(TINY, init_from=str(tmp_path / "other.ckpt"))

    def test_the_feature_of_a_teacher(self, saved, batch):
        path, _ = saved
        weights = LossWeights(feature=2.0)
        itself = MergedEncoderModule(TINY, init_from=path, teacher=path, loss=weights)
        assert itself.loss(batch)["feature"] == 0
        other = MergedEncoderModule(TINY, teacher=path, loss=weights)
        parts = other.loss(batch)
        without = MergedEncoderModule(TINY, loss=LossWeights())
        without.net.load_state_dict(other.net.state_dict())
        expected = without.loss(batch)["total"] + 2.0 * parts["feature"]
        torch.testing.assert_close(parts["total"], expected)
        assert 0 < parts["feature"] < 4
        assert not any("teacher" in name for name in other.state_dict())
        over = MergedEncoderModule(TINY, teacher=path, loss=weights, teacher_steps=0)
        assert "feature" not in over.loss(batch)

    def test_a_teacher_needs_a_weight(self):
        with pytest.raises(ValueError, match=r"teacher and loss\.feature belong together"):
            MergedEncoderModule(TINY, loss=LossWeights(feature=1.0))
