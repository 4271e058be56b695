"""The motion prior: windows of motion in, reconstructed motion out, with its statistics saved beside it."""

from __future__ import annotations

import dataclasses

import lightning as L
import numpy as np
import pytest
import torch

from datamodules.motions import MotionBatch, MotionDataModule, MotionWindows, seen_by_camera
from datamodules.order import SampleId
from fasthmr.body import BodyMismatchError, encode_pose
from fasthmr.checkpoint import CheckpointError, load_encoder, load_prior, save_decoder, save_prior
from fasthmr.data.synth.motion import Motion, load_motion_source
from fasthmr.lit.optim import OptimizerConfig
from fasthmr.lit.prior import MotionPriorModule
from fasthmr.losses import NonFiniteLossError
from fasthmr.models.denoiser import DenoiserConfig
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.models.motion_vae import LatentMotion, MotionVAEConfig
from fasthmr.models.sampler import DiffusionConfig

SMALL = MotionVAEConfig(window=20, latents=3, dim=32, depth=3, heads=2, mlp_dim=32, dropout=0.0)


def data(**settings) -> MotionDataModule:
    return MotionDataModule(
        **{"window": 20, "windows_per_epoch": 8, "val_windows": 3, "batch_size": 4, "workers": 0, **settings}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[MotionPriorModule, str]:
    out = tmp_path_factory.mktemp("prior")
    module = MotionPriorModule(SMALL, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2))
    trainer = L.Trainer(
        default_root_dir=out, max_epochs=30, logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=30, enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint(out / "prior.ckpt")
    module.metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return module, str(out / "prior.ckpt")


class TestWindows:
    def test_a_function_of_seed_epoch_and_number(self):
        one, two = data(), data()
        for module in (one, two):
            module.setup()
        a, b = one._train[SampleId(1, 2)], two._train[SampleId(1, 2)]
        assert all(np.array_equal(a[k], b[k]) for k in a)
        assert not np.array_equal(a["rotations"], one._train[SampleId(2, 2)]["rotations"])

    def test_people_stand_upright_in_the_camera_frame(self, free_body):
        batch = data()
        batch.setup()
        windows = batch.first_windows(12)
        joints = encode_pose(windows.rotations, torch.zeros(12, 20, 10), free_body)[..., :87].unflatten(-1, (29, 3))
        # y points down in the camera frame: the head has the smaller one, on average
        assert (joints[..., 15, 1] < joints[..., 7, 1]).float().mean() > 0.9

    def test_rotations_are_rotations(self):
        motion = load_motion_source("procedural").sample(np.random.default_rng(0), 10, 30.0)
        rotations = torch.from_numpy(seen_by_camera(motion, np.random.default_rng(1)))
        torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(10, 24))

    def test_shorter_windows_are_padded(self):
        module = data(shortest=5)
        module.setup()
        lengths = {int(module._train[SampleId(0, i)]["valid"].sum()) for i in range(20)}
        assert min(lengths) >= 5 and max(lengths) <= 20 and len(lengths) > 4

    def test_a_window_says_what_is_seen_and_how_to_draw_it_again(self):
        module = data()
        module.setup()
        key = module._train[SampleId(3, 2)]["keys"]
        assert key.endswith(" (3, 2)") and key[0].isalpha()

    def test_a_share_moves_procedurally_all_the_same(self):
        class Still:
            def sample(self, rng: np.random.Generator, frames: int, fps: float) -> Motion:
                return Motion(np.zeros((frames, 24, 3), np.float32), np.zeros((frames, 3), np.float32), fps, "still")

        def moving(share: float) -> float:
            windows = MotionWindows(Still(), 20, 30.0, seed=0, procedural_share=share)
            hands = [windows[i]["rotations"][:, 18] for i in range(20)]  # an elbow
            return float(np.mean([not np.allclose(r, np.eye(3)) for r in hands]))

        assert moving(0.0) == 0 and 0.2 < moving(0.5) < 0.8 and moving(1.0) == 1
        with pytest.raises(ValueError, match=r"procedural_share must be in \[0, 1\], got 2"):
            data(procedural_share=2)

    def test_validation_windows_stay_the_same(self):
        module = data()
        module.setup()
        first, again = (next(iter(module.val_dataloader())) for _ in range(2))
        assert torch.equal(first.rotations, again.rotations) and len(first.rotations) == 3

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"window": 2}, "window must be at least 3"),
            ({"shortest": 30}, "shortest must be at most the window"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message):
        with pytest.raises(ValueError, match=message):
            data(**settings)

    def test_motion_that_is_not_finite(self):
        rotations = torch.eye(3).expand(1, 4, 24, 3, 3).clone()
        rotations[0, 1, 5] = torch.nan
        with pytest.raises(ValueError, match="rotations holds numbers that are not finite"):
            MotionBatch(rotations, torch.zeros(1, 10), torch.ones(1, 4, dtype=torch.bool), torch.ones(1), ["walk"])


class TestTraining:
    def test_windows_can_be_learnt_by_heart(self):
        torch.manual_seed(0)
        module, windows = MotionPriorModule(SMALL, kl_weight=0.0, mirror=0.0, reverse=0.0), data()
        windows.setup()
        batch = windows.first_windows(4)
        poses = encode_pose(batch.rotations, batch.betas[:, None].expand(-1, 20, -1), module.body)
        module.prior.fit_statistics(poses.flatten(0, 1))
        optimizer = torch.optim.AdamW(module.prior.parameters(), lr=2e-3)
        losses = []
        for _ in range(150):
            decoded = module.prior.vae.decode(module.prior.encode(poses, batch.valid).mean, 20)
            losses.append((decoded - module.prior.normalise(poses)).square().mean())
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.35 * losses[0]

    def test_validation_errors_and_jitter(self, trained):
        module, _ = trained
        assert 0 < module.metrics["val/mpjpe_mm"] < 400
        assert module.metrics["val/jitter_m_s2"] > 0 and module.metrics["val/jitter_true_m_s2"] > 0

    def test_statistics_are_of_the_training_windows_and_have_a_floor(self, trained):
        module, _ = trained
        prior = module.prior
        assert (prior.mean[:3] == 0).all() and (prior.deviation[:3] == 0.01).all()  # the pelvis is always zero
        assert (prior.deviation >= 0.01).all() and (prior.deviation[3:87] < 1).all()

    def test_its_checkpoint(self, trained, tmp_path):
        module, path = trained
        prior, body = load_prior(path)
        assert body == module.body.id and prior.config == SMALL
        for name, value in module.prior.state_dict().items():
            assert torch.equal(value, prior.state_dict()[name]), name
        with pytest.raises(CheckpointError, match="is a checkpoint of kind 'motion_prior', not 'encoder'"):
            load_encoder(path)

    def test_normalised_numbers_and_back(self, trained):
        prior = trained[0].prior
        poses = torch.randn(2, 20, 133)
        torch.testing.assert_close(prior.normalise(poses) * prior.deviation + prior.mean, poses, atol=1e-4, rtol=0)

    def test_a_checkpoint_from_before_there_were_representations(self, trained, tmp_path):
        content = torch.load(trained[1], weights_only=True)
        assert content["fasthmr"]["config"].pop("representation") == "joints_twists"
        torch.save(content, tmp_path / "old.ckpt")
        assert load_prior(tmp_path / "old.ckpt")[0].config == SMALL
        MotionPriorModule(SMALL).on_load_checkpoint(content)
        other = MotionPriorModule(dataclasses.replace(SMALL, pose_dim=144, representation="rotations_6d"))
        with pytest.raises(ValueError, match="of another motion prior"):
            other.on_load_checkpoint(content)

    def test_another_size_is_not_resumed(self, trained):
        other = MotionPriorModule(MotionVAEConfig(window=20, latents=3, dim=64, depth=3, heads=2, mlp_dim=32))
        with pytest.raises(ValueError, match="of another motion prior"):
            other.on_load_checkpoint(torch.load(trained[1], weights_only=True))


class TestWarmStart:
    def test_weights_and_statistics_of_a_prior(self, trained):
        started = MotionPriorModule(SMALL, init_from=str(trained[1])).prior.state_dict()
        assert all(torch.equal(value, started[name]) for name, value in trained[0].prior.state_dict().items())

    def test_of_the_prior_in_a_decoder(self, trained, tmp_path):
        prior = trained[0].prior
        sizes = DenoiserConfig(
            feature_dim=8, window=SMALL.window, latents=SMALL.latents, dim=SMALL.dim, depth=1, heads=2, mlp_dim=16
        )
        decoder = DiffusionDecoder(DiffusionDecoderConfig(SMALL, sizes, DiffusionConfig()), "0" * 16)
        decoder.prior.load_state_dict(prior.state_dict())
        save_decoder(tmp_path / "decoder.ckpt", decoder, trained[0].body.id, "0" * 16)
        started = MotionPriorModule(SMALL, init_from=str(tmp_path / "decoder.ckpt")).prior.state_dict()
        assert all(torch.equal(value, started[name]) for name, value in prior.state_dict().items())

    def test_what_does_not_fit(self, trained, tmp_path):
        with pytest.raises(ValueError, match=r"is another motion prior \(mlp_dim: \d+ -> 96\)"):
            MotionPriorModule(dataclasses.replace(SMALL, mlp_dim=96), init_from=str(trained[1]))
        save_prior(tmp_path / "other.ckpt", trained[0].prior, "other@0123")
        with pytest.raises(BodyMismatchError, match="other@0123"):
            MotionPriorModule(SMALL, init_from=str(tmp_path / "other.ckpt"))


class TestAugmentation:
    def test_reversed_windows_keep_their_padding_at_the_end(self):
        module = MotionPriorModule(SMALL, mirror=0.0, reverse=1.0)
        poses = torch.arange(20.0)[None, :, None].expand(1, 20, 133)
        valid = (torch.arange(20) < 15)[None]
        turned, _ = module._augmented(poses, valid)
        assert turned[0, :15, 0].tolist() == list(range(14, -1, -1))
        assert turned[0, 15:, 0].tolist() == list(range(15, 20))

    def test_mirrored_twice_is_as_it_was(self):
        module = MotionPriorModule(SMALL, mirror=1.0, reverse=0.0)
        poses, valid = torch.randn(2, 20, 133), torch.ones(2, 20, dtype=torch.bool)
        once, _ = module._augmented(poses, valid)
        torch.testing.assert_close(module._augmented(once, valid)[0], poses)
        assert not torch.allclose(once, poses)


def test_windows_as_6d_rotations(tmp_path):
    config = dataclasses.replace(SMALL, pose_dim=144, representation="rotations_6d")
    module, windows = MotionPriorModule(config, mirror=1.0, reverse=0.0), data()
    windows.setup()
    batch = windows.first_windows(4)
    numbers = module._encoded(batch)
    assert numbers.shape == (4, 20, 144)
    # A perfect VAE: what comes out is what went in.
    module.prior.encode = lambda poses, valid: LatentMotion(poses, poses)
    module.prior.decode = lambda latents, frames, valid: latents
    module.validation_step(batch, 0)
    assert module.errors.compute()["mpjpe_mm"] < 0.1
    mirrored, _ = module._augmented(numbers, batch.valid)
    assert not torch.allclose(mirrored, numbers) and torch.allclose(
        module._augmented(mirrored, batch.valid)[0], numbers
    )
    save_prior(tmp_path / "prior.ckpt", MotionPrior(config), module.body.id)
    assert load_prior(tmp_path / "prior.ckpt")[0].config == config


def test_a_loss_that_is_not_finite_names_step_and_windows():
    source = data()
    source.setup()
    module, batch = MotionPriorModule(SMALL, kl_weight=float("inf")), source.first_windows(2)
    with pytest.raises(NonFiniteLossError) as raised:
        module.training_step(batch, 0)
    for named in ("step 0: ", "kl=", *batch.keys, "(0, 1)"):
        assert named in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MotionPrior(dataclasses.replace(SMALL, representation="rotations_6d")),
            "pose_dim must be 144 for rot",
        ),
        (lambda: dataclasses.replace(SMALL, representation="euler"), "representation must be joints_twists or"),
        (lambda: MotionPriorModule(SMALL, mirror=2.0), "mirror must be in"),
        (lambda: MotionPriorModule(SMALL, kl_weight=-1.0), "kl_weight must be 0 or more"),
        (lambda: MotionPrior(SMALL).fit_statistics(torch.zeros(1, 133)), "poses must be"),
        (lambda: MotionPrior(SMALL).fit_statistics(torch.full((4, 133), torch.nan)), "not finite"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
