"""HMR2.0's losses: right values, missing labels weigh nothing, and no NaN of a missing label leaks anywhere."""

from dataclasses import replace

import pytest
import torch

from fasthmr.conventions import PELVIS
from fasthmr.losses import HMRTarget, LossWeights, hmr_losses

FRAMES = 4
PARTS = ("root", "rotations", "betas", "joints3d", "joints2d")


@pytest.fixture
def prediction() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"rotations": (24, 3, 3), "betas": (10,), "joints3d": (29, 3), "joints2d": (29, 2)}
    return {k: torch.randn(FRAMES, *s, generator=generator).requires_grad_() for k, s in shapes.items()}


@pytest.fixture
def target() -> HMRTarget:
    generator = torch.Generator().manual_seed(1)
    joints3d = torch.cat([torch.randn(FRAMES, 29, 3, generator=generator), torch.ones(FRAMES, 29, 1)], -1)
    joints2d = torch.cat([torch.randn(FRAMES, 29, 2, generator=generator), torch.ones(FRAMES, 29, 1)], -1)
    everything = torch.ones(FRAMES, dtype=torch.bool)
    return HMRTarget(
        rotations=torch.randn(FRAMES, 24, 3, 3, generator=generator),
        betas=torch.randn(FRAMES, 10, generator=generator),
        joints3d=joints3d,
        joints2d=joints2d,
        has_pose=everything,
        has_betas=everything,
        valid=everything,
    )


def _gradients(prediction: dict[str, torch.Tensor], loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(prediction, torch.autograd.grad(loss, list(prediction.values())), strict=True))


def test_values_where_everything_is_labelled(prediction, target):
    weights = LossWeights(rotations=2, root=3, betas=5, joints3d=7, joints2d=11)
    parts = hmr_losses(**prediction, target=target, weights=weights)

    mse, l1 = torch.nn.functional.mse_loss, torch.nn.functional.l1_loss
    own = prediction["joints3d"] - prediction["joints3d"][:, PELVIS, None]
    true = target.joints3d[..., :3] - target.joints3d[:, PELVIS, None, :3]
    torch.testing.assert_close(parts["root"], mse(prediction["rotations"][:, 0], target.rotations[:, 0]))
    torch.testing.assert_close(parts["rotations"], mse(prediction["rotations"][:, 1:], target.rotations[:, 1:]))
    torch.testing.assert_close(parts["betas"], mse(prediction["betas"], target.betas))
    torch.testing.assert_close(parts["joints3d"], l1(own, true))
    torch.testing.assert_close(parts["joints2d"], l1(prediction["joints2d"], target.joints2d[..., :2]))
    torch.testing.assert_close(parts["total"], sum(getattr(weights, name) * parts[name] for name in PARTS))


def test_the_truth_costs_nothing(target):
    parts = hmr_losses(
        target.rotations,
        target.betas,
        target.joints3d[..., :3] + torch.tensor([0.5, -1.0, 20.0]),  # 3D joints are relative to the pelvis
        target.joints2d[..., :2],
        target=target,
        weights=LossWeights(),
    )

    assert parts["total"] < 1e-5


@pytest.mark.parametrize("content", [0.0, 1e6, torch.nan, torch.inf])
def test_without_any_label_loss_and_gradient_are_exactly_zero(prediction, content):
    nothing = torch.zeros(FRAMES, dtype=torch.bool)
    joints3d, joints2d = torch.full((FRAMES, 29, 4), content), torch.full((FRAMES, 29, 3), content)
    joints3d[..., 3] = joints2d[..., 2] = 0
    missing = HMRTarget(
        rotations=torch.full((FRAMES, 24, 3, 3), content),
        betas=torch.full((FRAMES, 10), content),
        joints3d=joints3d,
        joints2d=joints2d,
        has_pose=nothing,
        has_betas=nothing,
        valid=~nothing,
    )
    parts = hmr_losses(**prediction, target=missing, weights=LossWeights())

    assert all(value == 0 for value in parts.values())
    assert all((gradient == 0).all() for gradient in _gradients(prediction, parts["total"]).values())


def test_missing_frames_change_nothing_for_the_others(prediction, target):
    """Two labelled frames beside two without labels, full of NaN, cost what the two alone cost."""
    labelled = torch.tensor([True, False, True, False])
    broken = {
        name: getattr(target, name).masked_fill(
            ~labelled.reshape(-1, *[1] * (getattr(target, name).ndim - 1)), torch.nan
        )
        for name in ("rotations", "betas", "joints3d", "joints2d")
    }
    mixed = replace(target, valid=labelled, **broken)
    alone = HMRTarget(**{name: value[labelled] for name, value in vars(target).items()})

    parts = hmr_losses(**prediction, target=mixed, weights=LossWeights())
    expected = hmr_losses(**{k: v[labelled] for k, v in prediction.items()}, target=alone, weights=LossWeights())

    for name in (*PARTS, "total"):
        torch.testing.assert_close(parts[name], expected[name])
    got, wanted = _gradients(prediction, parts["total"]), _gradients(prediction, expected["total"])
    for name in prediction:
        torch.testing.assert_close(got[name], wanted[name])


@pytest.mark.parametrize(
    ("mask", "silent"), [("has_pose", {"root", "rotations"}), ("has_betas", {"betas"}), ("valid", set(PARTS))]
)
def test_each_mask_silences_its_parts(prediction, target, mask, silent):
    parts = hmr_losses(
        **prediction,
        target=replace(target, **{mask: torch.zeros(FRAMES, dtype=torch.bool)}),
        weights=LossWeights(),
    )

    assert {name for name in PARTS if parts[name] == 0} == silent


def test_confidence_weighs_joints(prediction, target):
    joints2d = target.joints2d.clone()
    joints2d[..., 2] = 0
    joints2d[1, 5, 2], joints2d[2, 6, 2] = 0.75, 0.25
    parts = hmr_losses(**prediction, target=replace(target, joints2d=joints2d), weights=LossWeights())

    error = (prediction["joints2d"] - joints2d[..., :2]).abs().mean(-1)
    torch.testing.assert_close(parts["joints2d"], 0.75 * error[1, 5] + 0.25 * error[2, 6])


def test_a_frame_without_pelvis_has_no_relative_joints(prediction, target):
    joints3d = target.joints3d.clone()
    joints3d[0, PELVIS] = torch.tensor([torch.nan, torch.nan, torch.nan, 0.0])
    parts = hmr_losses(**prediction, target=replace(target, joints3d=joints3d), weights=LossWeights())
    gradient = _gradients(prediction, parts["joints3d"] + 0 * parts["total"])["joints3d"]

    assert parts["joints3d"] > 0
    assert (gradient[0] == 0).all() and (gradient[1:].abs().sum((1, 2)) > 0).all()


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match=r"loss.betas must be 0 or more, got -1"):
        LossWeights(betas=-1)


def test_labels_of_another_shape_are_refused(target):
    with pytest.raises(ValueError, match=r"HMRTarget.joints3d must be \(4, 29, 4\), got \(4, 24, 4\)"):
        replace(target, joints3d=target.joints3d[:, :24])
