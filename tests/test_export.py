"""`python -m fasthmr.export` and the weights in this package: what goes in comes out, half as large if wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import BODY, MICRO, lightning_like
from test_checkpoint_decoder import CONFIG as DECODER

from fasthmr.body import load_body, require_same_body
from fasthmr.body.files import FREE_BODY
from fasthmr.checkpoint import (
    CheckpointError,
    encoder_id,
    load_encoder,
    load_human_fov,
    load_pipeline_parts,
    read_header,
    save_encoder,
    save_pipeline,
)
from fasthmr.checkpoint_files import located
from fasthmr.export import main
from fasthmr.hub import HubModel
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.merge import main as merge
from fasthmr.merging import LayerMergePlan
from fasthmr.models.adapters import hmr_state_dict
from fasthmr.models.diffusion_decoder import DiffusionDecoder
from fasthmr.models.hmr import HMR
from fasthmr.models.human_fov import HumanFoV


@pytest.fixture
def merged(tmp_path):
    torch.manual_seed(0)
    hmr = HMR(MICRO)
    hmr.merge_layers(LayerMergePlan(3).merged(1, 2))
    save_encoder(tmp_path / "merged.ckpt", hmr, BODY)
    return tmp_path / "merged.ckpt"


def export(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_an_exported_encoder_loads_with_its_plan(merged, tmp_path):
    assert export(merged, "-o", tmp_path / "new" / "out.safetensors") == 0
    before, after = load_encoder(merged), load_encoder(tmp_path / "new" / "out.safetensors")
    assert after.merge_plan == before.merge_plan and after.config == before.config
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    assert read_header(tmp_path / "new" / "out.safetensors").body == BODY


def test_bfloat16_halves_the_file_and_loads_as_float32(merged, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert export(merged, "-o", tmp_path / f"{dtype}.safetensors", "--dtype", dtype) == 0
    sizes = [(tmp_path / f"{dtype}.safetensors").stat().st_size for dtype in ("float32", "bfloat16")]
    assert sizes[1] < 0.6 * sizes[0]
    rounded, exact = load_encoder(tmp_path / "bfloat16.safetensors"), load_encoder(merged)
    for name, value in rounded.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact.state_dict()[name], rtol=2**-8, atol=0)


def test_of_a_training_checkpoint_the_averaged_weights_are_exported(tmp_path):
    trained, averaged = HMR(MICRO), HMR(MICRO)
    torch.save(lightning_like(trained, averaged, "ema.module."), tmp_path / "last.ckpt")
    assert export(tmp_path / "last.ckpt", "-o", tmp_path / "out.safetensors") == 0
    loaded = load_encoder(tmp_path / "out.safetensors").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in averaged.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.ckpt", "-o", "out.safetensors"], "no checkpoint at missing.ckpt"),
        (["{merged}", "-o", "out.bin"], "--out must end in .safetensors, got out.bin"),
        (["{merged}", "-o", "out.safetensors", "--dtype", "int8"], "--dtype must be one of float32, bfloat16"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message, merged, capsys):
    assert export(*(a.format(merged=merged) for a in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_files_that_are_not_ours_are_refused(merged, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(CheckpointError, match="no 'fasthmr' header in its metadata"):
        load_encoder(foreign)
    assert export(merged, "-o", tmp_path / "whole.safetensors") == 0
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        load_encoder(cut)


def test_the_shipped_encoder_is_the_tiny_one_of_the_free_body():
    header = read_header("shipped:encoder_tiny")
    require_same_body(load_body().id, header.body, where="the shipped encoder")
    assert (header.config.vit_dim, header.config.vit_depth, header.merge_plan.events) == (192, 12, ())
    assert located("shipped:encoder_tiny").stat().st_size < 16e6
    card = located("shipped:encoder_tiny").with_suffix(".md").read_text()
    assert header.body in card
    with torch.inference_mode():
        mask = torch.zeros(1, 256, 256, dtype=torch.bool)
        output = load_encoder("shipped:encoder_tiny")(torch.zeros(1, 3, 256, 256), mask)
    assert output.feature.shape == (1, 256) and output.rotations.isfinite().all()


def test_the_shipped_decoder_belongs_to_the_shipped_encoder():
    hmr, decoder, body = load_pipeline_parts("shipped:encoder_tiny+shipped:decoder_tiny")
    require_same_body(load_body().id, body, where="the shipped decoder")
    assert decoder is not None and decoder.encoder == encoder_id(hmr)
    assert body in located("shipped:decoder_tiny").with_suffix(".md").read_text()
    shipped = located("shipped:decoder_tiny").parent.glob("*.safetensors")
    assert sum(file.stat().st_size for file in shipped) < 25e6


def test_weights_that_are_not_shipped_are_named():
    there = "there are: decoder_tiny, encoder_tiny"
    with pytest.raises(FileNotFoundError, match=f"no weights 'encoder_huge' are shipped; {there}"):
        load_encoder("shipped:encoder_huge")


def test_shipped_weights_are_merged_into_the_current_folder(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(LayerMergePlan(12).merged(3, 4).as_json())
    few = ["--max_clips=1", "--frames_per_clip=2", "--batch=1", "--plan=plan.json"]
    assert merge(["shipped:encoder_tiny", f"--data={tiny_shards}", *few]) == 0
    assert len(load_encoder(tmp_path / "encoder_tiny-merged.ckpt").backbone.blocks) == 11
    assert not list(located("shipped:encoder_tiny").parent.glob("*merged*"))


class TestForeign:
    """Others' checkpoints become ours."""

    FIXTURES = Path(__file__).parent / "fixtures"
    #: the free body stands in for SMPL's file: the command takes whatever body is given
    SMPL = str(FREE_BODY)

    @pytest.mark.parametrize("which", ["hmr2", "camerahmr"])
    def test_an_encoder_loads_with_the_bodys_id(self, which, tmp_path):
        out, source = tmp_path / "ours.safetensors", self.FIXTURES / f"{which}_small.ckpt"
        assert export(source, "-o", out, "--from", "auto", "--body", self.SMPL, "--vit_heads", 4) == 0
        header = read_header(out)
        assert (header.body, header.config.architecture) == (load_body(self.SMPL).id, which)
        expected = hmr_state_dict(torch.load(source, weights_only=True)["state_dict"], which)
        assert all(torch.equal(value, expected[name]) for name, value in load_encoder(out).state_dict().items())
        assert json.loads(out.with_suffix(".json").read_text())["config"]["architecture"] == which

    def test_human_fov_is_a_file_of_its_own(self, tmp_path):
        fov, out = HumanFoV(width=4), tmp_path / "fov.safetensors"
        torch.save({"state_dict": fov.state_dict() | {"fc2.bias": torch.zeros(1)}}, tmp_path / "cam_model.ckpt")
        assert export(tmp_path / "cam_model.ckpt", "-o", out, "--from", "auto") == 0
        loaded = load_human_fov(out).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in fov.state_dict().items())
        with pytest.raises(CheckpointError, match="of kind 'human_fov', not 'encoder'"):
            load_encoder(out)

    def test_a_backbone_gets_a_new_head_and_can_be_started_from(self, tmp_path):
        foreign = torch.load(self.FIXTURES / "hmr2_small.ckpt", weights_only=True)["state_dict"]
        weights = {n: t for n, t in foreign.items() if n.startswith("backbone.")} | {"mano_head.x": torch.zeros(2)}
        torch.save({"state_dict": weights}, tmp_path / "hamer.ckpt")
        out = tmp_path / "start.safetensors"
        assert export(tmp_path / "hamer.ckpt", "-o", out, "--from", "backbone", "--vit_heads", 4) == 0
        module = MergedEncoderModule(read_header(out).config, ema_decay=None, init_from=str(out))
        assert torch.equal(module.net.backbone.pos_embed, weights["backbone.pos_embed"])

    def test_what_is_ours_already_is_refused(self, merged, tmp_path, capsys):
        for ours in (merged, "shipped:encoder_tiny"):
            assert export(ours, "-o", tmp_path / "out.safetensors", "--from", "auto") == 2
            assert f"{ours} is ours already: leave --from away" in capsys.readouterr().err
        assert export(merged, "-o", tmp_path / "folder", "--hub") == 0
        assert export(tmp_path / "folder/model.safetensors", "-o", tmp_path / "out.safetensors", "--from", "auto") == 2
        assert "is of a folder that --hub wrote: load that with" in capsys.readouterr().err
        assert not (tmp_path / "out.safetensors").exists()

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--from", "auto"], "predicts SMPL's poses: pass --body /path/to/SMPL_NEUTRAL.pkl"),
            (["--from", "hmr3"], "--from must be one of auto, hmr2, camerahmr, human_fov, backbone, got 'hmr3'"),
            (["--from", "backbone", "--head", "x"], "--head must be one of hmr2, camerahmr, got 'x'"),
            ([], "If it is HMR2.0's or CameraHMR's, or has such a backbone, convert it: python -m fasthmr.export"),
        ],
    )
    def test_mistakes_are_named_in_one_line(self, arguments, message, tmp_path, capsys):
        out = tmp_path / "out.safetensors"
        assert export(self.FIXTURES / "hmr2_small.ckpt", "-o", out, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not out.exists()


class TestHub:
    def test_a_folder_that_huggingface_hub_loads(self, merged, tmp_path):
        assert export(merged, "-o", tmp_path / "folder", "--hub") == 0
        assert {file.name for file in (tmp_path / "folder").iterdir()} == {
            "config.json", "model.safetensors", "README.md",
        }  # fmt: skip
        hmr, decoder, body = HubModel.from_pretrained(tmp_path / "folder").parts()
        expected = load_encoder(merged)
        assert (hmr.config, hmr.merge_plan, decoder, body) == (expected.config, expected.merge_plan, None, BODY)
        images = torch.randn(1, 3, 256, 256)
        torch.testing.assert_close(hmr(images).feature, expected(images).feature, rtol=0, atol=0)

    def test_a_pipeline(self, tmp_path):
        hmr = HMR(MICRO).eval()
        decoder = DiffusionDecoder(DECODER, encoder_id(hmr))
        save_pipeline(tmp_path / "both.ckpt", hmr, decoder, BODY)
        assert export(tmp_path / "both.ckpt", "-o", tmp_path / "folder", "--hub", "--dtype", "bfloat16") == 0
        loaded, its_decoder, _ = HubModel.from_pretrained(tmp_path / "folder").parts()
        assert its_decoder.encoder == encoder_id(loaded)
        for name, value in decoder.state_dict().items():
            torch.testing.assert_close(its_decoder.state_dict()[name], value, rtol=2**-8, atol=2**-8)

    def test_weights_that_do_not_fit_are_refused(self, merged, tmp_path):
        assert export(merged, "-o", tmp_path / "folder", "--hub") == 0
        weights = load_file(tmp_path / "folder" / "model.safetensors")
        del weights["hmr.smpl_head.decpose.bias"]
        save_file(weights, tmp_path / "folder" / "model.safetensors")
        with pytest.raises(RuntimeError, match=r"hmr\.smpl_head\.decpose\.bias"):
            HubModel.from_pretrained(tmp_path / "folder")

    def test_other_kinds_are_refused(self, tmp_path, capsys):
        torch.save({"state_dict": HumanFoV(width=1).state_dict()}, tmp_path / "cam_model.ckpt")
        assert export(tmp_path / "cam_model.ckpt", "-o", tmp_path / "folder", "--hub", "--from", "auto") == 2
        assert "of kind 'human_fov', not 'pipeline' or 'encoder'" in capsys.readouterr().err
