"""The evaluation as a stage of a recipe: what it is given, what it leaves, and that it is not done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_evaluate import make_decoder
from test_recipe import FakeTraining
from tiny_decoder import make_clips, make_encoder

import fasthmr.evaluation_stage as module
from fasthmr.cli import UsageError
from fasthmr.evaluate import main
from fasthmr.evaluation_stage import EvaluationStage, finished_table
from fasthmr.fit import COMMANDS, print_results
from fasthmr.recipe import StageResult, load_recipe, run_recipe

CONFIG = Path(__file__).parents[1] / "conf/evaluation_tiny.yaml"
RECIPE = """
stages:
  encoder: {config: unused.yaml}
  decoder: {config: unused.yaml}
  evaluation:
    command: evaluate
    config: evaluation_tiny.yaml
    data: val
    systems:
      alone: {encoder: stage:encoder}
      + decoder: {encoder: stage:encoder, decoder: stage:decoder}
    precision: "32"
    bootstrap: 20
    speed: false
    workers: 0
"""


class Trained(FakeTraining):
    """A stage that "trains" a checkpoint that lies there."""

    def run(self, *, resume: bool) -> StageResult:
        run_dir = Path(self.config["run_dir"])
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{run_dir.name}.ckpt", run_dir / "checkpoints/best.ckpt")
        return StageResult(run_dir, {"val/error": 3.0}, str(run_dir / "checkpoints/best.ckpt"))


@pytest.fixture
def recipe(tmp_path, monkeypatch, free_body):
    """Runs RECIPE in a folder with clips and checkpoints, with the given arguments on the command line."""
    monkeypatch.chdir(tmp_path)
    make_clips(Path("val"), (5, 8))
    make_decoder(Path("decoder.ckpt"), make_encoder(Path("encoder.ckpt")), free_body.id)
    Path("recipe.yaml").write_text(RECIPE)
    shutil.copy(CONFIG, "evaluation_tiny.yaml")

    def run(*arguments: str) -> dict[str, StageResult]:
        loaded = load_recipe(["recipe.yaml"], arguments)
        assert loaded is not None
        return run_recipe(loaded, {**COMMANDS, "fit": Trained})

    return run


def test_it_is_given_the_checkpoints_of_earlier_stages_and_shows_what_it_found(recipe, capsys):
    # keys for every stage are for those that train
    results = recipe("--trainer.max_epochs=3", "--motion=mine", "--evaluation.video=null")
    out = Path("runs/recipe/evaluation")
    alone, decoded = json.loads((out / "results.json").read_text())["systems"]
    assert alone["checkpoint"] == "runs/recipe/encoder/checkpoints/best.ckpt"
    assert decoded["checkpoint"] == f"{alone['checkpoint']}+runs/recipe/decoder/checkpoints/best.ckpt"
    done = json.loads((out / "done.json").read_text())
    assert done["metrics"]["+ decoder/mpjpe_mm"] == decoded["errors"]["mpjpe_mm"]["value"]
    assert set(done["inputs"]) == {"encoder", "decoder"} and "trainer" not in done["config"]
    print_results(results)
    printed = capsys.readouterr().out
    assert finished_table(out) in printed and printed.index("run folder") < printed.index("Protocol body-24")
    board = EventAccumulator(str(out)).Reload()
    assert board.Tags()["tensors"] == ["table/text_summary"]
    assert board.Tags()["images"] == ["error_over_time", "jitter_over_time", "joints"]


def test_it_is_skipped_when_it_has_finished_and_refuses_other_checkpoints(recipe, monkeypatch):
    recipe("--evaluation.video=null")
    monkeypatch.setattr(module, "evaluate", None)  # would fail
    assert recipe("--evaluation.video=null")["evaluation"].skipped
    with pytest.raises(UsageError, match=r"another config \(bootstrap: 20 -> 30"):
        recipe("--evaluation.video=null", "--evaluation.bootstrap=30")
    make_encoder(Path("runs/recipe/encoder/checkpoints/best.ckpt"), seed=1)
    with pytest.raises(UsageError, match="'evaluation' has run with another checkpoint of stage 'encoder'"):
        recipe("--evaluation.video=null")


def test_the_config_on_its_own_with_a_video(recipe, capsys):
    keys = ["--data=val", "--systems.baseline.encoder=encoder.ckpt", "--speed=false", "--workers=0", "--bootstrap=20"]
    assert main(["-c", str(CONFIG), "--run_dir=mine", "--max_clips=1", *keys]) == 0
    assert "written: mine" in capsys.readouterr().out
    assert Path("mine/side_by_side.mp4").stat().st_size > 1000
    assert "side by side" in EventAccumulator("mine").Reload().Tags()["images"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bootstrp=3"], "unknown key 'bootstrp'; did you mean 'bootstrap'"),
        (["--systems.a.encodr=x"], "unknown key 'encodr'; did you mean 'encoder'"),
        (["--protocol=none"], "protocol must be one of body-24"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, message):
    with pytest.raises(UsageError, match=message):
        EvaluationStage(["-c", str(CONFIG), *arguments])


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path):
    config = tmp_path / "twice.yaml"
    config.write_text("data: val\nsystems:\n  a: {encoder: x}\n  b: {encoder: y}\n  a: {encoder: z}\n")
    with pytest.raises(UsageError, match=r"twice\.yaml, line 5: 'a' is in line 3 already: remove one"):
        EvaluationStage(["-c", str(config)])
    with pytest.raises(UsageError, match=r"twice\.yaml, line 5: 'a' is in line 3 already: remove one"):
        load_recipe([str(config)], [])
    config.write_text("data: val\nsystems: {a: {encoder: x, encoder: y}}\n")
    with pytest.raises(UsageError, match=r"line 2: 'encoder' is in line 2 already"):
        EvaluationStage(["-c", str(config)])


@pytest.mark.parametrize("arguments", [["-c={}"], ["--config={}"], ["--config", "{}"]])
def test_a_key_that_stands_twice_is_named_however_its_file_is_given(tmp_path, arguments):
    config = tmp_path / "twice.yaml"
    config.write_text("data: val\ndata: train\n")
    with pytest.raises(UsageError, match=r"twice\.yaml, line 2: 'data' is in line 1 already: remove one"):
        EvaluationStage([argument.format(config) for argument in arguments])


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("arguments", [["--data", "{}"], ["--data={}"], ["--model={}"], ["--trainer", "{}"]])
def test_a_key_that_stands_twice_in_the_file_of_a_part_is_named(tmp_path, arguments):
    part = tmp_path / "part.yaml"
    part.write_text("init_args:\n  train: a\n  train: b\n")
    config = CONFIG.with_name("encoder_tiny.yaml")
    with pytest.raises(UsageError, match=r"part\.yaml, line 3: 'train' is in line 2 already: remove one"):
        COMMANDS["fit"](["-c", str(config), *(argument.format(part) for argument in arguments)])


def test_the_config_names_no_stage_that_a_file_on_its_own_does_not_have():
    assert "stage:" not in json.dumps(yaml.safe_load(CONFIG.read_text()))
