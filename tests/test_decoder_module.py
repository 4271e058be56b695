"""DiffusionDecoderModule: resumes bit for bit, changes the denoiser alone, warps time, refuses what does not belong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_decoder import DENOISER, PRIOR, WINDOW, data, fit, make_clips, make_encoder, make_prior, module

from datamodules.features import FeatureBatch
from fasthmr.body import BodyMismatchError, encode_pose
from fasthmr.body.pose import pose_dim
from fasthmr.checkpoint import CheckpointError, EncoderMismatchError, load_decoder, save_decoder
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.lit.decoder import DiffusionDecoderModule
from fasthmr.losses import NonFiniteLossError
from fasthmr.models.sampler import DiffusionConfig


class Watch(L.Callback):
    """Whether the prior was ever seen in training mode; which mode the rest was in."""

    def __init__(self) -> None:
        self.prior, self.denoiser = set(), set()

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.prior |= {m.training for m in pl_module.decoder.prior.modules()}
        self.denoiser |= {m.training for m in pl_module.decoder.denoiser.modules()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    make_clips(folder / "clips")
    make_encoder(folder / "encoder.ckpt")
    make_prior(folder / "prior.ckpt")
    return folder


@pytest.fixture(scope="module")
def paths(folder) -> tuple[str, str]:
    return str(folder / "prior.ckpt"), str(folder / "encoder.ckpt")


def the_data(folder: Path, **settings):
    return data(folder / "clips", str(folder / "encoder.ckpt"), folder / "features", **settings)


@pytest.fixture(scope="module")
def trained(folder, paths):
    model, watch = module(*paths), Watch()
    trainer = fit(model, the_data(folder), folder / "run", callbacks=(watch,))
    return model, {k: float(v) for k, v in trainer.callback_metrics.items()}, watch


def windows(valid: torch.Tensor | None = None, frames: int = WINDOW, **fields) -> FeatureBatch:
    """Three windows of random motion; a frame's first feature is its number."""
    torch.manual_seed(3)
    features = torch.randn(3, frames, 32)
    features[..., 0] = torch.arange(frames)
    rotations = axis_angle_to_matrix(0.3 * torch.randn(3, 1, 24, 3) + 0.02 * torch.randn(3, frames, 24, 3).cumsum(1))
    return FeatureBatch(
        **{
            "keys": ["a", "b", "c"],
            "features": features,
            "rotations": rotations,
            "betas": torch.randn(3, 10),
            "predicted_rotations": rotations.flip(0),
            "predicted_betas": torch.randn(3, frames, 10),
            "camera": torch.zeros(3, frames, 3),
            "valid": torch.ones(3, frames, dtype=torch.bool) if valid is None else valid,
            "fps": torch.full((3,), 30.0),
            **fields,
        }
    )


class TestTraining:
    def test_metrics_of_the_decoder_and_of_the_encoder_alone(self, trained):
        _, metrics, _ = trained
        for name in ("mpjpe_mm", "pa_mpjpe_mm", "pve_mm", "accel_m_s2", "jitter_m_s2"):
            assert metrics[f"val/{name}"] > 0 and metrics[f"val/per_frame_{name}"] > 0, name
        assert metrics["val/mpjpe_mm"] != metrics["val/per_frame_mpjpe_mm"] and metrics["val/jitter_true_m_s2"] > 0

    def test_only_the_denoiser_moves(self, trained, paths):
        model, _, watch = trained
        start = module(*paths).decoder.state_dict()
        moved = {k.split(".")[0] for k, v in model.decoder.state_dict().items() if not torch.equal(v, start[k])}
        assert moved == {"denoiser", "feature_mean", "feature_deviation", "latent_scale"}
        assert watch.prior == {False} and watch.denoiser == {True}

    @pytest.mark.parametrize("step", [2, 3])  # in mid-epoch, and between two
    def test_a_resumed_run_equals_an_uninterrupted_one(self, step, trained, folder, paths):
        model, _, _ = trained
        resumed = module(*paths)
        fit(resumed, the_data(folder), folder / f"resumed{step}", resume=folder / f"run/step{step}.ckpt")
        whole = torch.load(folder / "run/step6.ckpt", weights_only=True)
        other = torch.load(folder / f"resumed{step}/step6.ckpt", weights_only=True)
        assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in model.state_dict().items())
        moments, others = (c["optimizer_states"][0]["state"] for c in (whole, other))
        assert moments.keys() == others.keys()
        assert all(torch.equal(v["exp_avg_sq"], others[k]["exp_avg_sq"]) for k, v in moments.items())

    def test_another_seed_is_another_run(self, trained, folder, paths):
        other = module(*paths, seed=1)
        fit(other, the_data(folder), folder / "other", steps=1)
        first = torch.load(folder / "run/step1.ckpt", weights_only=True)["state_dict"]
        assert not torch.equal(other.decoder.denoiser.time_in.weight, first["decoder.denoiser.time_in.weight"])

    def test_its_checkpoint(self, trained, folder):
        model, _, _ = trained
        decoder, header = load_decoder(folder / "run/step6.ckpt")
        assert header.encoder == model.encoder_id == decoder.encoder and header.body == model.body.id
        average = model.ema.module.state_dict()
        assert all(torch.equal(v, average[k]) for k, v in decoder.state_dict().items())
        assert not torch.equal(average["denoiser.positions"], model.decoder.denoiser.positions)
        assert torch.equal(average["feature_mean"], model.decoder.feature_mean)

    def test_a_window_without_labels_counts_for_nothing(self, paths):
        model = module(*paths)
        model.train()
        valid = torch.ones(3, WINDOW, dtype=torch.bool)
        valid[1] = False
        batch = windows(valid)
        noise = torch.randn(3, WINDOW, 32)
        losses = []
        for extra in (0, 1):
            features = batch.features + extra * noise * (~valid)[..., None]
            torch.manual_seed(0)
            losses.append(model.loss(dataclasses.replace(batch, features=features)))
        assert torch.equal(*losses) and losses[0] > 0

    def test_no_labels_at_all_and_a_loss_that_is_not_finite_name_the_clips(self, paths):
        model = module(*paths)
        model.trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
        with pytest.raises(ValueError, match=r"no clip of a batch has pose labels: .* got a, b, c"):
            model.training_step(windows(torch.zeros(3, WINDOW, dtype=torch.bool)), 0)
        with torch.no_grad():
            model.decoder.denoiser.positions.fill_(torch.inf)
        with pytest.raises(NonFiniteLossError, match="not finite at step 0; clips: a, b, c"):
            model.training_step(windows(), 0)


class TestValidation:
    @pytest.mark.parametrize("representation", ["joints_twists", "rotations_6d"])
    def test_true_poses_have_no_error_and_errors_are_of_the_right_ones(
        self, paths, representation, tmp_path, monkeypatch
    ):
        config = dataclasses.replace(PRIOR, pose_dim=pose_dim(representation), representation=representation)
        model = module(make_prior(tmp_path / "prior.ckpt", config=config), paths[1])
        logged = {}
        monkeypatch.setattr(model, "log_dict", lambda values, **_: logged.update(values))
        valid = torch.arange(WINDOW).expand(3, WINDOW) < 9
        shape = torch.randn(3, 10)
        predicted = torch.full((3, WINDOW, 10), 50.0)  # padding must not enter the mean
        predicted[:, :9] = shape[:, None] + torch.linspace(-1, 1, 9)[:, None]
        batch = windows(valid, betas=shape, predicted_betas=predicted)
        poses = encode_pose(batch.rotations, shape[:, None].expand(-1, WINDOW, -1), model.body, representation)
        assert model.loss(batch).isfinite()
        monkeypatch.setattr(model, "forward", lambda batch: poses)
        output = model.validation_step(batch, 0)
        model.on_validation_epoch_end()
        torch.testing.assert_close(output["betas"], shape[:, None].expand(-1, WINDOW, -1))
        assert logged["val/mpjpe_mm"] < 0.1 and logged["val/pve_mm"] < 0.1 and logged["val/accel_m_s2"] < 0.1
        assert logged["val/per_frame_mpjpe_mm"] > 50
        assert logged["val/jitter_m_s2"] == pytest.approx(float(logged["val/jitter_true_m_s2"]), rel=1e-2)

    def test_how_joints_become_rotations_is_a_setting(self, paths):
        adaptive, naive = (
            module(*paths, adaptive_ik=how).validation_step(windows(), 0)["rotations"] for how in (True, False)
        )
        assert not torch.allclose(adaptive, naive, atol=1e-3)

    def test_it_is_of_the_average(self, paths):
        model, batch = module(*paths).eval(), windows()
        with torch.no_grad():
            model.ema.module.denoiser.positions.add_(1.0)
        assert torch.equal(model(batch), model.ema.module(batch.features, batch.valid))
        assert not torch.allclose(model(batch), model.decoder(batch.features, batch.valid))

    def test_steps_are_those_of_the_setting(self, paths):
        model, seen = module(*paths, steps=4, ema_decay=None), []
        model.decoder.denoiser.register_forward_hook(lambda *_: seen.append(1))
        model.eval()(windows())
        assert len(seen) == 4


class TestAugmentation:
    def model(self, paths, **settings) -> DiffusionDecoderModule:
        return module(*paths, ema_decay=None, **settings)

    def test_off_changes_nothing(self, paths):
        batch = windows()
        features, rotations, valid = self.model(paths, reverse=0.0, warp=0.0)._augmented(batch)
        assert torch.equal(features, batch.features) and torch.equal(valid, batch.valid)
        assert torch.equal(rotations, batch.rotations)

    def test_reversed_windows_keep_their_padding_at_the_end(self, paths):
        batch = windows(torch.arange(WINDOW).expand(3, WINDOW) < 9)
        features, rotations, valid = self.model(paths, reverse=1.0, warp=0.0)._augmented(batch)
        assert features[0, :9, 0].tolist() == list(range(8, -1, -1))
        assert torch.equal(rotations[:, :9], batch.rotations[:, :9].flip(1)) and torch.equal(valid, batch.valid)
        assert torch.equal(features[:, 9:], batch.features[:, 9:])

    def test_warped_time_flows_smoothly_and_stays_inside(self, paths):
        model = self.model(paths, reverse=0.0, warp=1.0, max_speed=2.0)
        batch = windows(torch.arange(81).expand(3, 81) < 60, frames=81)
        position = model._positions(batch.valid)
        step = position[:, :60].diff(dim=1)
        assert (position[:, 0] == 0).all() and (position[:, :60] <= 59).all()
        assert (position[:, 60:] == torch.arange(60, 81)).all()
        # slowed down as a whole if it would run past the end, so the least speed may be below one half
        assert step.min() > 0.2 and step.max() < 2.0 and step.std() > 0.1
        assert step.diff(dim=1).abs().max() < 0.15
        features, rotations, _ = model._augmented(batch)
        assert (features[:, :60, 0].diff(dim=1) > 0).all()
        torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(3, 81, 24))

    def test_features_and_rotations_are_of_the_same_moment(self, paths):
        """A joint that turns evenly is where the frame's number, which is a feature, says."""
        angle = torch.zeros(3, WINDOW, 24, 3)
        angle[..., 2] = 0.1 * torch.arange(WINDOW)[:, None]
        batch = windows(rotations=axis_angle_to_matrix(angle))
        features, rotations, _ = self.model(paths, reverse=0.5, warp=1.0)._augmented(batch)
        assert (features[..., 0] % 1 > 0.01).any()
        turned = torch.atan2(rotations[..., 5, 1, 0], rotations[..., 5, 0, 0])
        torch.testing.assert_close(turned, 0.1 * features[..., 0], atol=1e-5, rtol=0)

    def test_a_missing_frame_spoils_its_neighbours(self, paths):
        valid = torch.ones(3, WINDOW, dtype=torch.bool)
        valid[:, 5] = False
        batch = windows(valid)
        features, _, warped = self.model(paths, reverse=0.0, warp=1.0)._augmented(batch)
        touched = (features[..., 0] > 4) & (features[..., 0] < 6)
        assert touched.any() and torch.equal(warped, ~touched)

    def test_one_frame_and_none(self, paths):
        valid = torch.zeros(3, WINDOW, dtype=torch.bool)
        valid[1, 0] = True
        batch = windows(valid)
        features, rotations, after = self.model(paths, reverse=1.0, warp=1.0)._augmented(batch)
        assert torch.equal(features, batch.features) and torch.equal(after, valid) and rotations.isfinite().all()


class TestWarmStart:
    def test_the_denoiser_of_another_encoders_decoder(self, trained, folder, paths):
        other = make_encoder(folder / "tuned.ckpt", seed=1)
        started = module(paths[0], other, init_from=str(folder / "run/step6.ckpt"))
        average = trained[0].ema.module.denoiser.state_dict()
        assert all(torch.equal(v, average[k]) for k, v in started.decoder.denoiser.state_dict().items())
        assert torch.equal(started.ema.module.denoiser.positions, average["positions"])
        assert started.encoder_id != trained[0].encoder_id
        assert (started.decoder.feature_deviation == 1).all()  # to be taken from the new encoder's features

    def test_what_does_not_fit(self, trained, folder, paths):
        path = str(folder / "run/step6.ckpt")
        with pytest.raises(ValueError, match=r"is another decoder \(denoiser\.depth: 3 -> 5\)"):
            module(*paths, init_from=path, denoiser=dataclasses.replace(DENOISER, depth=5))
        with pytest.raises(ValueError, match=r"diffusion\.objective: both -> noise"):
            module(*paths, init_from=path, diffusion=DiffusionConfig(objective="noise"))
        save_decoder(folder / "other_body.ckpt", trained[0].decoder, "other@0123", trained[0].encoder_id)
        with pytest.raises(BodyMismatchError, match="other@0123"):
            module(*paths, init_from=str(folder / "other_body.ckpt"))
        with pytest.raises(CheckpointError, match="of kind 'encoder', not 'decoder'"):
            module(*paths, init_from=paths[1])

    def test_another_prior_is_said_aloud(self, trained, folder, paths, caplog):
        started = module(
            make_prior(folder / "other_prior.ckpt", seed=1), paths[1], init_from=str(folder / "run/step6.ckpt")
        )
        assert "was trained on another motion prior" in caplog.text
        average = trained[0].ema.module.denoiser.state_dict()
        assert all(torch.equal(v, average[k]) for k, v in started.decoder.denoiser.state_dict().items())


class TestRefused:
    def test_features_of_another_encoder(self, folder, paths):
        other = make_encoder(folder / "another.ckpt", seed=2)
        with pytest.raises(EncoderMismatchError, match=module(*paths).encoder_id):
            fit(module(*paths), data(folder / "clips", other, folder / "features"), folder / "refused")

    def test_another_window(self, folder, paths):
        with pytest.raises(ValueError, match=r"window must be the motion prior's 12 frames, got 10"):
            fit(module(*paths), the_data(folder, window=10), folder / "refused")

    def test_another_body(self, folder, paths):
        with pytest.raises(BodyMismatchError, match="other@01"):
            module(make_prior(folder / "p.ckpt", body="other@01"), paths[1])
        with pytest.raises(BodyMismatchError, match="other@02"):
            module(paths[0], make_encoder(folder / "e.ckpt", body="other@02"))

    def test_checkpoints_of_another_run(self, trained, folder, paths):
        checkpoint = torch.load(folder / "run/step6.ckpt", weights_only=True)
        with pytest.raises(EncoderMismatchError, match="the checkpoint belongs to encoder"):
            module(paths[0], make_encoder(folder / "third.ckpt", seed=3)).on_load_checkpoint(checkpoint)
        with pytest.raises(ValueError, match=r"another decoder \(denoiser\.mlp_dim: 32 -> 64\)"):
            module(*paths, denoiser=dataclasses.replace(DENOISER, mlp_dim=64)).on_load_checkpoint(checkpoint)
        with pytest.raises(ValueError, match="trained on another motion prior"):
            module(make_prior(folder / "p2.ckpt", seed=4), paths[1]).on_load_checkpoint(checkpoint)
        with pytest.raises(ValueError, match="not of a diffusion decoder"):
            module(*paths).on_load_checkpoint({"fasthmr": {"kind": "encoder"}})

    def test_a_checkpoint_from_before_there_were_representations(self, trained, folder, paths):
        checkpoint = torch.load(folder / "run/step6.ckpt", weights_only=True)
        assert checkpoint["fasthmr"]["config"]["prior"].pop("representation") == "joints_twists"
        torch.save(checkpoint, folder / "old.ckpt")
        assert load_decoder(folder / "old.ckpt")[0].representation == "joints_twists"
        module(*paths).on_load_checkpoint(checkpoint)

    def test_a_checkpoint_of_another_kind(self, paths):
        prior, encoder = paths
        with pytest.raises(CheckpointError, match="of kind 'encoder', not 'motion_prior'"):
            module(encoder, encoder)
        with pytest.raises(CheckpointError, match="of kind 'motion_prior', not 'encoder'"):
            module(prior, prior)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.ckpt"):
            module("nowhere.ckpt", encoder)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"reverse": 2.0}, "reverse must be in"),
            ({"warp": -1.0}, "warp must be in"),
            ({"max_speed": 0.5}, "max_speed must be 1 or more"),
            ({"steps": 0}, "steps must be 1 to 1000"),
            ({"ema_decay": 1.0}, "ema_decay must be in"),
            ({"protocol": "best"}, "protocol must be one of"),
            ({"denoiser": dataclasses.replace(DENOISER, depth=4)}, "depth must be odd, got 4"),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message, paths):
        with pytest.raises(ValueError, match=message):
            module(*paths, **settings)


def test_sizes_follow_from_prior_and_encoder(paths):
    config = module(*paths).decoder.config
    assert config.prior == PRIOR and config.denoiser.feature_dim == 32
    assert (config.denoiser.window, config.denoiser.latents, config.denoiser.dim) == (12, 3, 32)
