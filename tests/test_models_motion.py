"""Motion VAE and denoiser: equal to MLD's at small sizes, indifferent to padding, and of the paper's size."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fasthmr.models.denoiser import DenoiserConfig, LatentDenoiser, time_embedding
from fasthmr.models.motion_vae import MotionVAE, MotionVAEConfig
from fasthmr.models.skip_transformer import SkipTransformer

VAE = "vae_encoder_decoder_mlpdist0"
RENAMED = {
    "skel_embedding.": "embed.",
    "final_layer.": "readout.",
    "global_motion_token": "distribution_tokens",
    "emb_proj.1.": "condition.",
    "time_embedding.linear_1.": "time_in.",
    "time_embedding.linear_2.": "time_out.",
}


@pytest.fixture(scope="module")
def mld() -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parent / "fixtures" / "mld_small.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def weights(mld: dict[str, torch.Tensor], part: str, positions: dict[str, tuple[str, int]], inside: str) -> dict:
    """State dict of a part in our names; `positions`: original name -> (ours, rows); `inside`: where encoder.* goes."""
    ours = {}
    for name, value in mld.items():
        if not name.startswith(f"weights/{part}/"):
            continue
        name = name.removeprefix(f"weights/{part}/")
        if name in positions:
            name, rows = positions[name]
            value = value[:rows, 0]
        for theirs, our in {**RENAMED, "encoder.": inside}.items():
            if name.startswith(theirs):
                name = our + name.removeprefix(theirs)
                break
        ours[name] = value
    return ours


@pytest.fixture(scope="module")
def vae(mld) -> MotionVAE:
    vae = MotionVAE(MotionVAEConfig(13, 12, 3, 32, 5, 4, 48, 0.0)).eval()
    positions = {"query_pos_encoder.pe": ("encoder_positions", 18), "query_pos_decoder.pe": ("decoder_positions", 12)}
    vae.load_state_dict(weights(mld, VAE, positions, "encoder."))
    return vae


@pytest.fixture(scope="module")
def denoiser(mld) -> LatentDenoiser:
    denoiser = LatentDenoiser(DenoiserConfig(24, 12, 3, 32, 5, 4, 48, 0.0)).eval()
    denoiser.load_state_dict(weights(mld, "den", {"query_pos.pe": ("positions", 16)}, "transformer."))
    return denoiser


class TestParityWithMLD:
    @torch.no_grad()
    def test_encoder(self, vae, mld):
        latent = vae.encode(mld["x"])
        torch.testing.assert_close(latent.mean.transpose(0, 1), mld[f"{VAE}/mu_full"], atol=1e-5, rtol=0)
        torch.testing.assert_close(latent.kl(), mld[f"{VAE}/kl_mean_full"])
        valid = torch.arange(12) < mld["lengths"][:, None]
        latent = vae.encode(mld["x"], valid)
        torch.testing.assert_close(latent.mean.transpose(0, 1), mld[f"{VAE}/mu"], atol=1e-5, rtol=0)
        std = (0.5 * latent.log_variance).exp().transpose(0, 1)
        torch.testing.assert_close(std, mld[f"{VAE}/std"], atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_decoder(self, vae, mld):
        latents = mld["z"].transpose(0, 1)
        torch.testing.assert_close(vae.decode(latents), mld[f"{VAE}/dec_full"], atol=1e-5, rtol=0)
        valid = torch.arange(12) < mld["lengths"][:, None]
        torch.testing.assert_close(vae.decode(latents, valid=valid), mld[f"{VAE}/dec_masked"], atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_denoiser(self, denoiser, mld):
        out = denoiser(mld["den/zt"], mld["den/t"], mld["den/h"])
        torch.testing.assert_close(out, mld["den/out"], atol=1e-5, rtol=0)

    def test_time(self, mld):
        torch.testing.assert_close(time_embedding(torch.tensor([0, 1, 10, 500, 999]), 24), mld["tsin_24"])


class TestPadding:
    @torch.no_grad()
    def test_what_padding_holds_does_not_matter(self, vae, denoiser):
        motion, valid = torch.randn(2, 12, 13), torch.arange(12).expand(2, 12) < 9
        other = motion.masked_fill(~valid[..., None], 77.0)
        torch.testing.assert_close(vae.encode(motion, valid).mean, vae.encode(other, valid).mean)
        features, latents, time = torch.randn(2, 12, 24), torch.randn(2, 3, 32), torch.tensor([5, 900])
        other = features.masked_fill(~valid[..., None], 77.0)
        torch.testing.assert_close(denoiser(latents, time, features, valid), denoiser(latents, time, other, valid))

    @torch.no_grad()
    def test_padding_equals_a_shorter_motion(self, vae):
        motion, valid = torch.randn(1, 12, 13), torch.arange(12).expand(1, 12) < 9
        torch.testing.assert_close(vae.encode(motion, valid).mean, vae.encode(motion[:, :9]).mean, atol=1e-5, rtol=0)
        latents = torch.randn(1, 3, 32)
        padded, shorter = vae.decode(latents, valid=valid), vae.decode(latents, frames=9)
        torch.testing.assert_close(padded[:, :9], shorter, atol=1e-5, rtol=0)
        assert (padded[:, 9:] == 0).all()


def test_sampling_and_kl():
    vae = MotionVAE(MotionVAEConfig(5, 4, 2, 16, 1, 2, 16, 0.0))
    latent = vae.encode(torch.randn(3, 4, 5))
    drawn = torch.stack([latent.sample(torch.Generator().manual_seed(i)) for i in range(2000)])
    torch.testing.assert_close(drawn.mean(0), latent.mean, atol=0.25, rtol=0)
    normal = type(latent)(torch.zeros(1, 2, 16), torch.zeros(1, 2, 16))
    assert normal.kl() == 0 and latent.kl() > 0


def test_the_papers_sizes():
    def millions(module: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)

    with torch.device("meta"):
        denoiser, five = LatentDenoiser(DenoiserConfig()), MotionVAE(MotionVAEConfig(depth=5))
    # FastHMR, Tab. 12 has 29.5 M for denoiser and motion decoder, which fits five layers of each; how it counts
    # positions and the embedding of time is not said.
    parts = [denoiser, five.decoder, five.readout]
    assert sum(millions(part) for part in parts) == pytest.approx(29.5, abs=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipTransformer(32, 4, 4, 48), "depth must be odd, got 4"),
        (lambda: SkipTransformer(30, 3, 4, 48), "heads must divide dim"),
        (lambda: MotionVAEConfig(latents=0), "latents must be a positive whole number"),
        (lambda: MotionVAEConfig(dropout=1.0), "dropout must be in"),
    ],
)
def test_sizes_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_that_do_not_fit(vae, denoiser):
    with pytest.raises(ValueError, match=r"motion must be \(B, up to 12, 13\), got \(1, 13, 13\)"):
        vae.encode(torch.zeros(1, 13, 13))
    with pytest.raises(ValueError, match="valid must be"):
        vae.encode(torch.zeros(1, 12, 13), torch.ones(1, 12))
    with pytest.raises(ValueError, match="frames must be 1 to 12"):
        vae.decode(torch.zeros(1, 3, 32), frames=13)
    with pytest.raises(ValueError, match="latents must be"):
        denoiser(torch.zeros(1, 4, 32), torch.zeros(1), torch.zeros(1, 12, 24))
    with pytest.raises(ValueError, match="features must be"):
        denoiser(torch.zeros(1, 3, 32), torch.zeros(1), torch.zeros(1, 12, 25))
