"""`python -m fasthmr.export` and the weights in this package: what goes in comes out, half as large if wanted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import BODY, MICRO, lightning_like

from fasthmr.body import load_body, require_same_body
from fasthmr.checkpoint import CheckpointError, load_encoder, read_header, save_encoder
from fasthmr.checkpoint_files import located
from fasthmr.export import main
from fasthmr.merge import main as merge
from fasthmr.merging import LayerMergePlan
from fasthmr.models.hmr import HMR


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
        output = load_encoder("shipped:encoder_tiny")(torch.zeros(1, 3, 256, 256))
    assert output.feature.shape == (1, 256) and output.rotations.isfinite().all()


def test_weights_that_are_not_shipped_are_named():
    with pytest.raises(FileNotFoundError, match="no weights 'encoder_huge' are shipped; there are: encoder_tiny"):
        load_encoder("shipped:encoder_huge")


def test_shipped_weights_are_merged_into_the_current_folder(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(LayerMergePlan(12).merged(3, 4).as_json())
    few = ["--max_clips=1", "--frames_per_clip=2", "--batch=1", "--plan=plan.json"]
    assert merge(["shipped:encoder_tiny", f"--data={tiny_shards}", *few]) == 0
    assert len(load_encoder(tmp_path / "encoder_tiny-merged.ckpt").backbone.blocks) == 11
    assert not list(located("shipped:encoder_tiny").parent.glob("*merged*"))
