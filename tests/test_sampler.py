"""Diffusion of latents: the schedule, one-step sampling, and the loss, as the originals have them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fasthmr.models.sampler import DiffusionConfig, LatentDiffusion


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parent / "fixtures" / "scheduler.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_schedule_with_zero_terminal_signal(numbers):
    kept = LatentDiffusion().scheduler.alphas_cumprod
    torch.testing.assert_close(kept, numbers["alphas_cumprod_ddim"])
    assert kept[-1] == 0


def test_forward_process(numbers):
    diffusion = LatentDiffusion()
    z0, noise, time = numbers["z0"], numbers["eps"], numbers["t"]
    torch.testing.assert_close(diffusion.noisy(z0, noise, time), numbers["z_t"])
    torch.testing.assert_close(diffusion.velocity(z0, noise, time), numbers["v"])


def test_one_step_from_pure_noise_is_minus_v(numbers):
    sample = LatentDiffusion().sample(lambda z, t: numbers["vhat"], numbers["zT"])
    torch.testing.assert_close(sample, -numbers["vhat"])
    torch.testing.assert_close(sample, numbers["ddim1_prev"])


@pytest.mark.parametrize("count", [2, 4, 10])
def test_several_steps(numbers, count):
    start = numbers["zT"]

    def predict(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return 0.1 * latents * time[:, None, None] / 1000 - 0.5 * start

    diffusion = LatentDiffusion()
    assert diffusion.timesteps(count) == numbers[f"ddim{count}_timesteps"].tolist()
    torch.testing.assert_close(diffusion.sample(predict, start, count), numbers[f"ddim{count}_traj"][-1])


def test_noise_is_asked_for_where_a_trace_of_the_signal_is_left():
    diffusion = LatentDiffusion(DiffusionConfig(objective="noise"))
    assert diffusion.timesteps(1) == [998] and diffusion.timesteps(2) == [998, 499]
    assert 0 < diffusion.scheduler.alphas_cumprod[998].sqrt() < 0.01
    asked = []
    diffusion.sample(lambda latents, time: asked.append(int(time[0])) or latents, torch.randn(1, 2, 3), 2)
    assert asked == [998, 499]


def test_loss_parts(numbers):
    prediction, z0, noise, time = numbers["loss_vhat"], numbers["z0"], numbers["eps"], numbers["t"]
    v = LatentDiffusion(DiffusionConfig(objective="v")).loss(prediction, z0, noise, time)
    both = LatentDiffusion().loss(prediction, z0, noise, time)
    torch.testing.assert_close(v, numbers["loss_v"].mean())
    torch.testing.assert_close(both - v, numbers["loss_eps"].mean())
    torch.testing.assert_close(both, numbers["loss_hybrid_mean"])
    assert LatentDiffusion(DiffusionConfig(objective="noise")).loss(noise, z0, noise, time) == 0


@pytest.mark.parametrize("objective", ["both", "v", "noise"])
def test_a_perfect_predictor_gives_the_latents_back(objective):
    diffusion = LatentDiffusion(DiffusionConfig(objective=objective))
    kept = diffusion.scheduler.alphas_cumprod
    z0 = torch.randn(2, 3, 4)

    def predict(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        signal, rest = kept[time[0]].sqrt(), (1 - kept[time[0]]).sqrt()
        noise = (latents - signal * z0) / rest
        return noise if objective == "noise" else signal * noise - rest * z0

    torch.testing.assert_close(diffusion.sample(predict, torch.randn(2, 3, 4), 10), z0, atol=5e-3, rtol=0)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="objective must be"):
        DiffusionConfig(objective="x0")
    with pytest.raises(ValueError, match="beta_start < beta_end"):
        DiffusionConfig(beta_start=0.1)
    with pytest.raises(ValueError, match="1 to 1000 steps, got 0"):
        LatentDiffusion().timesteps(0)
