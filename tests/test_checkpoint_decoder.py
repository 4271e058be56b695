"""Checkpoints of decoders, motion priors and pipelines: what is saved comes back, what does not belong is refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_decoder import ENCODER, PRIOR

from fasthmr.body import BodyMismatchError
from fasthmr.checkpoint import (
    CheckpointError,
    EncoderMismatchError,
    decoder_id,
    encoder_id,
    load_decoder,
    load_encoder,
    load_pipeline_parts,
    load_prior,
    network_of,
    require_same_encoder,
    save_decoder,
    save_encoder,
    save_pipeline,
    save_prior,
)
from fasthmr.merging import LayerMergePlan, TokenMerging
from fasthmr.models.denoiser import DenoiserConfig
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.hmr import HMR
from fasthmr.models.motion_prior import MotionPrior
from fasthmr.models.sampler import DiffusionConfig
from fasthmr.safetensors_io import write_safetensors

BODY = "free@0123456789abcdef"
CONFIG = DiffusionDecoderConfig(
    PRIOR,
    DenoiserConfig(feature_dim=32, window=12, latents=3, dim=32, depth=3, heads=2, mlp_dim=32),
    DiffusionConfig(objective="v"),
)


@pytest.fixture(scope="module")
def hmr() -> HMR:
    torch.manual_seed(0)
    return HMR(ENCODER).eval()


@pytest.fixture
def decoder(hmr) -> DiffusionDecoder:
    torch.manual_seed(1)
    decoder = DiffusionDecoder(CONFIG, encoder_id(hmr))
    decoder.fit_statistics(torch.randn(4, 12, 32), torch.randn(4, 12, 133), torch.ones(4, 12, dtype=torch.bool))
    return decoder.eval()


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


class TestEncoderId:
    def test_it_is_of_everything_that_a_feature_depends_on(self, hmr):
        lighter = copy.deepcopy(hmr)
        with torch.no_grad():
            lighter.smpl_head.token_pos.add_(1e-6)
        merging, merged = copy.deepcopy(hmr), copy.deepcopy(hmr)
        merging.set_token_merging(TokenMerging(keep_tokens=150))
        merged.merge_layers(LayerMergePlan(2).merged(0, 1))
        ids = {encoder_id(net) for net in (hmr, lighter, merging, merged)}
        assert len(ids) == 4 and all(len(i) == 16 and int(i, 16) >= 0 for i in ids)

    def test_it_is_of_nothing_else(self, hmr, tmp_path):
        save_encoder(tmp_path / "e.ckpt", hmr, BODY)
        assert encoder_id(load_encoder(tmp_path / "e.ckpt")) == encoder_id(hmr) == encoder_id(hmr.train())
        hmr.eval()

    def test_a_setting_that_is_yet_to_come_does_not_change_it(self, hmr):
        later = copy.deepcopy(hmr)
        kind = dataclasses.make_dataclass("HMRConfig", [("more", int, 1)], bases=(type(hmr.config),), frozen=True)
        later.config = kind(**hmr.config.as_dict())
        assert encoder_id(later) == encoder_id(hmr)


class TestDecoder:
    def test_round_trip(self, decoder, tmp_path):
        save_decoder(tmp_path / "d.ckpt", decoder, BODY, "0123456789abcdef")
        before = torch.get_rng_state()
        loaded, header = load_decoder(tmp_path / "d.ckpt")
        assert torch.equal(torch.get_rng_state(), before)  # loading draws no random numbers
        assert (header.format_version, header.config, header.body) == (2, CONFIG, BODY)
        assert header.encoder == loaded.encoder == "0123456789abcdef"
        assert same_weights(loaded, decoder) and not loaded.training
        assert not any(p.requires_grad for p in loaded.prior.parameters())
        features = torch.randn(2, 12, 32)
        for steps in (1, 4):
            assert torch.equal(loaded(features, steps=steps), decoder(features, steps=steps))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda header: header.pop("encoder"), "header field 'encoder' must be a str, got None"),
            (lambda header: header["config"]["denoiser"].update(widht=3), "unknown key 'widht' in denoiser"),
            (lambda header: header["config"]["prior"].update(dim=64), r"denoiser\.dim must be the prior's 64"),
            (lambda header: header["config"]["denoiser"].update(mlp_dim=64), "wrong shape denoiser"),
            (lambda header: header.update(kind="encoder"), "of kind 'encoder', not 'decoder'"),
        ],
    )
    def test_damaged_headers(self, change, message, decoder, tmp_path):
        save_decoder(tmp_path / "d.ckpt", decoder, BODY, "0123456789abcdef")
        content = torch.load(tmp_path / "d.ckpt", weights_only=True)
        change(content["fasthmr"])
        torch.save(content, tmp_path / "d.ckpt")
        with pytest.raises(CheckpointError, match=message):
            load_decoder(tmp_path / "d.ckpt")


class TestPipeline:
    @pytest.mark.parametrize("with_decoder", [True, False])
    def test_round_trip(self, with_decoder, hmr, decoder, tmp_path):
        save_pipeline(tmp_path / "p.ckpt", hmr, decoder if with_decoder else None, BODY)
        encoder, loaded, body = load_pipeline_parts(tmp_path / "p.ckpt")
        assert body == BODY and same_weights(encoder, hmr) and encoder.config == ENCODER
        if with_decoder:
            assert same_weights(loaded, decoder) and loaded.config == CONFIG and loaded.encoder == encoder_id(hmr)
        else:
            assert loaded is None

    def test_an_encoders_checkpoint_will_do(self, hmr, tmp_path):
        save_encoder(tmp_path / "e.ckpt", hmr, BODY)
        encoder, decoder, body = load_pipeline_parts(tmp_path / "e.ckpt")
        assert same_weights(encoder, hmr) and decoder is None and body == BODY

    def test_a_pair_of_checkpoints_is_one(self, hmr, decoder, tmp_path):
        save_encoder(tmp_path / "e.ckpt", hmr, BODY)
        save_decoder(tmp_path / "d.ckpt", decoder, BODY, encoder_id(hmr))
        encoder, loaded, body = load_pipeline_parts(f"{tmp_path}/e.ckpt+{tmp_path}/d.ckpt")
        assert body == BODY and same_weights(encoder, hmr) and same_weights(loaded, decoder)
        write_safetensors(tmp_path / "p.safetensors", *network_of(f"{tmp_path}/e.ckpt+{tmp_path}/d.ckpt"))
        encoder, loaded, body = load_pipeline_parts(tmp_path / "p.safetensors")
        assert body == BODY and same_weights(encoder, hmr) and same_weights(loaded, decoder)
        assert loaded.encoder == encoder_id(hmr)

    def test_names_with_a_plus(self, hmr, decoder, tmp_path):
        save_encoder(tmp_path / "a+b", hmr, BODY)
        save_decoder(tmp_path / "c+d", decoder, BODY, encoder_id(hmr))
        assert load_pipeline_parts(tmp_path / "a+b")[1] is None
        assert same_weights(load_pipeline_parts(f"{tmp_path}/a+b+{tmp_path}/c+d")[1], decoder)
        with pytest.raises(FileNotFoundError, match="no checkpoint at missing"):
            load_pipeline_parts(f"missing+{tmp_path}/c+d")
        with pytest.raises(FileNotFoundError, match=r"no weights 'decoder' are shipped"):
            load_pipeline_parts("shipped:encoder_tiny+shipped:decoder")

    def test_pairs_that_do_not_belong_together(self, hmr, decoder, tmp_path):
        save_encoder(tmp_path / "e.ckpt", hmr, BODY)
        save_decoder(tmp_path / "d.ckpt", decoder, BODY, "0123456789abcdef")
        save_decoder(tmp_path / "b.ckpt", decoder, "other@0123", encoder_id(hmr))
        for load in (load_pipeline_parts, network_of):
            with pytest.raises(EncoderMismatchError, match=r"d\.ckpt belongs to encoder 0123456789abcdef, but"):
                load(f"{tmp_path}/e.ckpt+{tmp_path}/d.ckpt")
            with pytest.raises(BodyMismatchError, match=r"b\.ckpt belongs to body 'other@0123'"):
                load(f"{tmp_path}/e.ckpt+{tmp_path}/b.ckpt")

    def test_a_decoders_id_is_of_its_weights_and_priors(self, decoder):
        other = copy.deepcopy(decoder)
        with torch.no_grad():
            next(other.prior.parameters()).add_(1e-6)
        assert decoder_id(other) != decoder_id(decoder) == decoder_id(copy.deepcopy(decoder))

    def test_merged_layers_and_tokens_come_back(self, hmr, tmp_path):
        merged = copy.deepcopy(hmr)
        merged.merge_layers(LayerMergePlan(2).merged(0, 1))
        merged.set_token_merging(TokenMerging(keep_tokens=160))
        save_pipeline(tmp_path / "p.ckpt", merged, None, BODY)
        assert encoder_id(load_pipeline_parts(tmp_path / "p.ckpt")[0]) == encoder_id(merged)

    def test_a_decoder_of_another_encoder(self, hmr, decoder, tmp_path):
        tuned = copy.deepcopy(hmr)
        with torch.no_grad():
            tuned.smpl_head.token_pos.add_(0.1)
        with pytest.raises(
            EncoderMismatchError, match=rf"encoder {encoder_id(hmr)}, but .* encoder {encoder_id(tuned)}"
        ):
            save_pipeline(tmp_path / "p.ckpt", tuned, decoder, BODY)
        with pytest.raises(EncoderMismatchError, match="the decoder belongs to no encoder"):
            save_pipeline(tmp_path / "p.ckpt", hmr, DiffusionDecoder(CONFIG), BODY)
        assert not list(tmp_path.iterdir())
        require_same_encoder(encoder_id(hmr), decoder.encoder, where="the decoder")

    def test_half_precision_does_not_part_them(self, hmr, decoder, tmp_path):
        save_pipeline(tmp_path / "p.ckpt", hmr, decoder, BODY)
        write_safetensors(tmp_path / "p.safetensors", *network_of(tmp_path / "p.ckpt"), torch.bfloat16)
        encoder, loaded, _ = load_pipeline_parts(tmp_path / "p.safetensors")
        assert loaded.encoder == encoder_id(encoder) != encoder_id(hmr)
        save_pipeline(tmp_path / "again.ckpt", encoder, loaded, BODY)

    def test_another_kind(self, tmp_path):
        save_prior(tmp_path / "v.ckpt", MotionPrior(PRIOR), BODY)
        with pytest.raises(CheckpointError, match="of kind 'motion_prior', not 'pipeline' or 'encoder'"):
            load_pipeline_parts(tmp_path / "v.ckpt")

    def test_a_part_that_is_missing(self, hmr, decoder, tmp_path):
        save_pipeline(tmp_path / "p.ckpt", hmr, decoder, BODY)
        content = torch.load(tmp_path / "p.ckpt", weights_only=True)
        content["state_dict"] = {k: v for k, v in content["state_dict"].items() if k.startswith("hmr.")}
        torch.save(content, tmp_path / "p.ckpt")
        with pytest.raises(CheckpointError, match=r"no weights whose names start with 'decoder\.'"):
            load_pipeline_parts(tmp_path / "p.ckpt")


def test_a_prior_comes_back(tmp_path):
    prior = MotionPrior(PRIOR)
    prior.fit_statistics(torch.randn(20, 133))
    save_prior(tmp_path / "v.ckpt", prior, BODY)
    loaded, body = load_prior(tmp_path / "v.ckpt")
    assert same_weights(loaded, prior) and loaded.config == PRIOR and body == BODY


class TestNetworkOf:
    def test_a_training_checkpoint_without_what_training_needs(self, hmr, tmp_path):
        average = {f"ema.module.{k}": v for k, v in hmr.state_dict().items()}
        save_encoder(tmp_path / "e.ckpt", hmr, BODY)
        content = torch.load(tmp_path / "e.ckpt", weights_only=True)
        content["fasthmr"]["weights_prefix"] = "ema.module."
        content["state_dict"] = {**average, **{f"net.{k}": v + 1 for k, v in hmr.state_dict().items()}}
        torch.save(content | {"optimizer_states": []}, tmp_path / "e.ckpt")
        header, weights = network_of(tmp_path / "e.ckpt")
        assert header["weights_prefix"] == "" and header["kind"] == "encoder"
        assert weights.keys() == hmr.state_dict().keys()
        write_safetensors(tmp_path / "e.safetensors", header, weights)
        assert same_weights(load_encoder(tmp_path / "e.safetensors"), hmr)

    def test_files_of_others(self, tmp_path):
        Path(tmp_path / "x.safetensors").write_bytes(b"hello")
        with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged or no safetensors file"):
            network_of(tmp_path / "x.safetensors")
        torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match="has no 'fasthmr' header"):
            network_of(tmp_path / "x.ckpt")
