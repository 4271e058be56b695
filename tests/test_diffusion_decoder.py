"""The diffusion decoder as a network: one step is minus v, nothing but the denoiser learns, and it can learn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from datamodules.motions import MotionDataModule
from fasthmr.body import encode_pose, load_body
from fasthmr.models.denoiser import DenoiserConfig
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.models.motion_vae import MotionVAEConfig
from fasthmr.models.sampler import DiffusionConfig

PRIOR = MotionVAEConfig(window=12, latents=3, dim=32, depth=3, heads=2, mlp_dim=64, dropout=0.1)
DENOISER = DenoiserConfig(feature_dim=24, window=12, latents=3, dim=32, depth=3, heads=2, mlp_dim=64, dropout=0.1)
CONFIG = DiffusionDecoderConfig(PRIOR, DENOISER)


def make(config: DiffusionDecoderConfig = CONFIG) -> DiffusionDecoder:
    """A decoder with statistics of some windows, in evaluation mode."""
    torch.manual_seed(0)
    decoder = DiffusionDecoder(config)
    features, poses = 3 + 2 * torch.randn(8, 12, 24), torch.randn(8, 12, 133)
    decoder.fit_statistics(features, poses, torch.ones(8, 12, dtype=torch.bool))
    return decoder.eval()


def seen_steps(decoder: DiffusionDecoder) -> list[int]:
    """Fills with the diffusion steps at which the denoiser is asked."""
    steps: list[int] = []
    decoder.denoiser.register_forward_pre_hook(lambda _, arguments: steps.append(int(arguments[1][0])))
    return steps


class TestSampling:
    @torch.no_grad()
    def test_one_step_is_minus_v(self):
        decoder, features = make(), torch.randn(2, 12, 24)
        normalised = (features - decoder.feature_mean) / decoder.feature_deviation
        v = decoder.denoiser(decoder.noise.expand(2, -1, -1), torch.tensor([999, 999]), normalised)
        torch.testing.assert_close(decoder(features), decoder.prior.decode(-v * decoder.latent_scale, 12))

    @pytest.mark.parametrize("steps", [1, 2, 4, 10])
    def test_more_steps(self, steps):
        decoder, features = make(), torch.randn(2, 9, 24)
        seen = seen_steps(decoder)
        poses = decoder(features, steps=steps)
        assert poses.shape == (2, 9, 133) and poses.isfinite().all()
        assert len(seen) == steps and seen[0] == 999 and seen == sorted(seen, reverse=True)

    def test_predicted_noise_means_nothing_at_the_last_step(self):
        decoder = make(dataclasses.replace(CONFIG, diffusion=DiffusionConfig(objective="noise")))
        seen = seen_steps(decoder)
        assert decoder(torch.randn(1, 12, 24)).isfinite().all() and seen == [998]

    def test_a_result_depends_on_nothing_but_the_features(self):
        features = torch.randn(3, 12, 24)
        one, other = make(), make()
        torch.manual_seed(5)
        assert torch.equal(one(features), other(features))
        torch.testing.assert_close(one(features)[2], one(features[2:])[0])
        given = one(features, noise=torch.randn(3, 3, 32))
        assert not torch.allclose(one(features), given)

    def test_padding(self):
        decoder, features = make(), torch.randn(2, 12, 24)
        valid = torch.arange(12).expand(2, 12) < 8
        poses = decoder(features, valid)
        torch.testing.assert_close(poses, decoder(features.masked_fill(~valid[..., None], 9.0), valid))
        torch.testing.assert_close(poses[:, :8], decoder(features[:, :8]), atol=1e-5, rtol=1e-5)
        assert torch.equal(poses[:, 8:], decoder.prior.mean.expand(2, 4, 133))

    def test_no_gradients(self):
        assert not make()(torch.randn(1, 12, 24, requires_grad=True)).requires_grad


class TestLoss:
    def test_a_denoiser_that_knows_v_has_none(self, monkeypatch):
        decoder, poses = make(), torch.randn(4, 12, 133)
        latents = decoder.latents(torch.zeros(4, 12, 24), poses)
        kept = decoder.diffusion.scheduler.alphas_cumprod

        def all_knowing(noisy: torch.Tensor, time: torch.Tensor, *_: object) -> torch.Tensor:
            signal, rest = kept[time].sqrt()[:, None, None], (1 - kept[time]).sqrt()[:, None, None]
            return signal * (noisy - signal * latents) / rest - rest * latents

        monkeypatch.setattr(decoder.denoiser, "forward", all_knowing)
        assert decoder.loss(torch.randn(4, 12, 24), poses) < 1e-6

    def test_random_steps_and_noise_come_from_the_generator(self):
        decoder, features, poses = make(), torch.randn(4, 12, 24), torch.randn(4, 12, 133)
        seen = seen_steps(decoder)
        losses = [decoder.loss(features, poses, None, torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
        assert losses[0] == losses[1] != losses[2]
        assert seen[0] == seen[1] != seen[2]

    def test_half_precision_does_not_reach_what_is_to_be_learnt(self):
        decoder, features, poses = make(), torch.zeros(4, 12, 24), torch.randn(4, 12, 133)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decoder.latents(features, poses), make().latents(features, poses))

    def test_padded_frames_do_not_matter(self):
        decoder, features, poses = make(), torch.randn(2, 12, 24), torch.randn(2, 12, 133)
        valid = torch.arange(12).expand(2, 12) < 8
        masked = (x.masked_fill(~valid[..., None], 3.0) for x in (features, poses))
        losses = [
            decoder.loss(*both, valid, torch.Generator().manual_seed(0)) for both in ((features, poses), tuple(masked))
        ]
        torch.testing.assert_close(*losses)


class TestResidual:
    SIZES = dataclasses.replace(DENOISER, feature_dim=24 + 133)
    CONFIG = DiffusionDecoderConfig(PRIOR, SIZES, DiffusionConfig(residual=True, last_step_share=1.0))

    def conditions(self, decoder: DiffusionDecoder, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder reads of an encoder that sees somebody sit still, and the numbers of that pose."""
        body = load_body("free")
        rotations = torch.eye(3).expand(count, 12, 24, 3, 3)
        betas = torch.zeros(count, 12, 10)
        poses = encode_pose(rotations, betas, body)
        return decoder.conditions(torch.zeros(count, 12, 24), rotations, betas, body), poses

    def test_without_a_correction_the_encoders_poses_go_through_the_prior(self):
        decoder = DiffusionDecoder(self.CONFIG).eval()
        read, poses = self.conditions(decoder)
        assert decoder.encoder_dim == 24 and torch.equal(read[..., 24:], poses)
        torch.nn.init.zeros_(decoder.denoiser.transformer.norm.weight)
        expected = decoder.prior.decode(decoder.prior.encode(poses).mean, 12)
        torch.testing.assert_close(decoder(read), expected)

    def test_what_is_diffused_is_the_correction(self):
        decoder = DiffusionDecoder(self.CONFIG).eval()
        read, poses = self.conditions(decoder)
        assert (decoder.latents(read, poses) == 0).all()
        true = torch.randn(2, 12, 133)
        difference = decoder.prior.encode(true).mean - decoder.prior.encode(poses).mean
        torch.testing.assert_close(decoder.latents(read, true), difference)

    @torch.no_grad()
    def test_what_the_prior_loses_comes_back_without_its_trembling(self, monkeypatch):
        config = dataclasses.replace(self.CONFIG, diffusion=DiffusionConfig(residual=True, detail=2.0))
        decoder, without = DiffusionDecoder(config).eval(), DiffusionDecoder(self.CONFIG).eval()
        without.load_state_dict(decoder.state_dict())
        read, poses = self.conditions(decoder)
        start = decoder.prior.encode(poses).mean
        torch.testing.assert_close(decoder(read), without(read) + decoder.detail(read, start, None))

        # Of a prior that loses everything: what stands still comes back, and of what jumps for a frame a fifth.
        monkeypatch.setattr(decoder.prior, "decode", lambda *_: torch.zeros(2, 12, 133))
        torch.testing.assert_close(decoder.detail(read, start, None), poses)
        read[:, 6] += 1.0
        jump = decoder.detail(read, start, None) - poses
        assert jump[0, :, 0].argmax() == 6 and 0.18 < jump[0, 6, 0] < 0.22 and 0.8 < jump[0, :, 0].sum() < 1.2
        valid = torch.ones(2, 12, dtype=torch.bool)
        valid[:, 6] = False
        missing = decoder.detail(read, start, valid)
        assert (missing[:, 6] == 0).all()
        torch.testing.assert_close(missing[valid], poses[valid])

    def test_detail_is_of_corrections(self):
        with pytest.raises(ValueError, match=r"detail must be 0 or more frames, and 0 without residual, got 3\.0"):
            DiffusionConfig(detail=3.0)

    def test_frames_without_a_person_have_no_rotations(self):
        decoder = DiffusionDecoder(self.CONFIG)
        read = decoder.conditions(torch.zeros(1, 24), torch.zeros(1, 24, 3, 3), torch.zeros(1, 10), load_body("free"))
        assert read.isfinite().all()

    def test_the_last_step_is_where_one_step_sampling_starts(self):
        decoder, (read, poses) = DiffusionDecoder(self.CONFIG), self.conditions(DiffusionDecoder(self.CONFIG))
        seen = seen_steps(decoder)
        decoder.loss(read, poses)
        assert seen == [999]
        with pytest.raises(ValueError, match=r"last_step_share must be in \[0, 1\], got 1.5"):
            DiffusionConfig(last_step_share=1.5)


class TestFrozenPrior:
    def test_it_does_not_move_and_stays_in_evaluation_mode(self):
        decoder = make().train()
        before = {k: v.clone() for k, v in decoder.state_dict().items()}
        assert decoder.training and decoder.denoiser.training
        assert not any(m.training for m in decoder.prior.modules())
        assert not any(p.requires_grad for p in decoder.prior.parameters())
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.1)
        decoder.loss(torch.randn(2, 12, 24), torch.randn(2, 12, 133)).backward()
        optimizer.step()
        moved = {k.split(".")[0] for k, v in decoder.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {"denoiser"}

    def test_targets_are_the_mean_latents_without_dropout(self):
        decoder, poses = make().train(), torch.randn(2, 12, 133)
        features = torch.zeros(2, 12, 24)
        assert torch.equal(decoder.latents(features, poses), decoder.prior.encode(poses).mean / decoder.latent_scale)


class TestStatistics:
    def test_what_is_diffused_has_unit_deviation_and_features_are_normalised(self):
        decoder = make()
        features, poses = torch.randn(6, 12, 24) * 5 + 1, torch.randn(6, 12, 133)
        features[..., 3] = 7.0  # never changes
        valid = torch.arange(12).expand(6, 12) < 10
        features[~valid] = 1e6
        decoder.fit_statistics(features, poses, valid)
        torch.testing.assert_close(decoder.latents(features, poses, valid).std(), torch.tensor(1.0))
        torch.testing.assert_close(decoder.feature_mean, features[valid].mean(0))
        assert decoder.feature_deviation[3] == pytest.approx(1e-3)
        assert (decoder.feature_deviation[:3] - 5).abs().max() < 2

    @pytest.mark.parametrize(
        ("features", "valid", "message"),
        [
            (torch.randn(2, 12, 23), torch.ones(2, 12, dtype=torch.bool), "features must be"),
            (torch.randn(2, 12, 24), torch.zeros(2, 12, dtype=torch.bool), "two valid frames or more, got 0"),
            (torch.full((2, 12, 24), torch.nan), torch.ones(2, 12, dtype=torch.bool), "not finite"),
        ],
    )
    def test_what_cannot_be(self, features, valid, message):
        with pytest.raises(ValueError, match=message):
            make().fit_statistics(features, torch.zeros(2, 12, 133), valid)


class TestConfig:
    def test_plain_data_and_back(self):
        config = dataclasses.replace(CONFIG, diffusion=DiffusionConfig(objective="v"))
        assert DiffusionDecoderConfig.from_dict(config.as_dict()) == config
        assert DiffusionDecoderConfig.from_dict({}) == DiffusionDecoderConfig()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"piror": {}}, "unknown key 'piror' in a decoder's config: did you mean 'prior'"),
            ({"denoiser": {"widow": 3}}, "unknown key 'widow' in denoiser: did you mean 'window'"),
            ({"prior": {"window": 81}}, r"denoiser\.window must be the prior's 81, got 243"),
            ({"diffusion": {"objective": "x0"}}, "objective must be"),
            ({"prior": 3}, "prior must be a mapping"),
        ],
    )
    def test_mistakes_are_named(self, values, message):
        with pytest.raises(ValueError, match=message):
            DiffusionDecoderConfig.from_dict(values)


@pytest.mark.parametrize("shape", [(2, 12, 25), (2, 13, 24), (12, 24), (2, 0, 24)])
def test_features_of_another_encoder_or_window(shape):
    with pytest.raises(ValueError, match=r"features must be \(B, 1 to 12 frames, 24\), got"):
        make()(torch.zeros(shape))


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 3, 32\), got \(2, 4, 32\)"):
        make()(torch.zeros(2, 12, 24), noise=torch.zeros(2, 4, 32))
    with pytest.raises(ValueError, match="1 to 1000 steps, got 0"):
        make()(torch.zeros(2, 12, 24), steps=0)


def test_a_handful_of_windows_can_be_learnt_by_heart(free_body):
    data = MotionDataModule(window=12, windows_per_epoch=8, batch_size=4, workers=0)
    data.setup()
    windows = data.first_windows(6)
    poses = encode_pose(windows.rotations, windows.betas[:, None].expand(-1, 12, -1), free_body)
    torch.manual_seed(0)
    prior = MotionPrior(dataclasses.replace(PRIOR, dropout=0.0))
    prior.fit_statistics(poses.flatten(0, 1))
    minimise(prior, lambda: (prior.vae.decode(prior.encode(poses).mean) - prior.normalise(poses)).square().mean(), 200)
    features = poses @ torch.randn(133, 24)
    decoder = DiffusionDecoder(DiffusionDecoderConfig(prior.config, dataclasses.replace(DENOISER, dropout=0.0)))
    decoder.prior.load_state_dict(prior.state_dict())
    decoder.fit_statistics(features, poses, windows.valid)
    losses = minimise(decoder.denoiser, lambda: decoder.loss(features, poses, windows.valid), 250)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])

    def error_mm(predicted: torch.Tensor) -> float:
        return 1000 * (predicted - poses)[..., :87].unflatten(-1, (29, 3)).norm(dim=-1).mean().item()

    mean_pose = error_mm(prior.mean.expand_as(poses))
    assert error_mm(decoder.eval()(features)) < 0.4 * mean_pose
    assert error_mm(decoder(features.flip(0))) > 0.8 * mean_pose  # it is the features that it reads


def minimise(module: torch.nn.Module, loss, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    return losses
