"""Recipes: whose keys go where, what one stage hands to the next, and what happens when that has changed."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from test_fit import QUICK, TINY_NET, default_recipe, run_fit, tiny_data

from fasthmr.checkpoint import load_encoder, load_pipeline_parts, read_header
from fasthmr.cli import UsageError
from fasthmr.fit import fit
from fasthmr.models.motion_vae import MotionVAEConfig
from fasthmr.models.sampler import DiffusionConfig
from fasthmr.recipe import StageResult, content_sha256, load_recipe, run_recipe

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
PRETRAIN = str(ROOT / "conf/pretrain_tiny.yaml")

TWO_STAGES = """
name: two
all: {motion: everyone, trainer: {max_epochs: 5}}
stages:
  first: {config: one.yaml}
  second:
    config: one.yaml
    model: {init_from: stage:first}
    trainer: {max_epochs: 2}
"""


class FakeTraining:
    """A kind of stage that writes a checkpoint in no time; `trained` says which were run, and what they were given."""

    trained: list[dict]
    defaults: ClassVar[dict] = {}
    alone = True

    def __init__(self, arguments) -> None:
        self.config: dict = {}
        for flag, value in itertools.pairwise(arguments):
            if flag == "-c" and "\n" in value:
                self.config |= yaml.safe_load(value)
        self.config |= dict(a[2:].split("=", 1) for a in arguments if "=" in a and a.startswith("--"))
        if "oops" in self.config:
            raise UsageError("unknown key 'oops'")

    @property
    def resolved(self) -> str:
        return yaml.safe_dump(self.completed(self.config))

    def completed(self, config: dict) -> dict:
        return self.defaults | config

    def run(self, *, resume: bool) -> StageResult:
        self.trained.append(self.config)
        run_dir = Path(self.config["run_dir"])
        write_weights(run_dir / "checkpoints/last.ckpt", 1.0)
        return StageResult(run_dir, {"val/error": 3.0}, str(run_dir / "checkpoints/last.ckpt"), resumed=resume)


def write_weights(path: Path, weight: float, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"w": torch.full((3,), weight)}, "fasthmr": {"kind": "encoder"}, **more}, path)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Runs TWO_STAGES with fake trainings in an empty folder, and with the given arguments on the command line."""
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(TWO_STAGES)

    def run(*arguments: str) -> list[dict]:
        FakeTraining.trained = []
        loaded = load_recipe(["two.yaml"], arguments)
        assert loaded is not None
        run_recipe(loaded, {"fit": FakeTraining})
        return FakeTraining.trained

    return run


# ---- keys and references, on stages that take no time --------------------------------------------


def test_a_stage_is_given_the_checkpoint_of_an_earlier_one_and_remembers_its_content(recipe):
    first, second = recipe()
    path = "runs/two/first/checkpoints/last.ckpt"
    assert "model" not in first and second["model"] == {"init_from": path}
    expected = {"first": {"keys": ["model.init_from"], "checkpoint": path, "sha256": content_sha256(path)}}
    assert json.loads(Path("runs/two/second/inputs.json").read_text()) == expected
    assert json.loads(Path("runs/two/second/done.json").read_text())["inputs"] == expected


def test_the_hash_is_of_header_and_weights_only(tmp_path):
    for name, weight, more in (("a", 1.0, {}), ("b", 1.0, {"optimizer_states": [3]}), ("c", 2.0, {})):
        write_weights(tmp_path / name, weight, **more)
    write_weights(tmp_path / "d", 1.0, fasthmr={"kind": "another"})
    a, b, c, d = (content_sha256(tmp_path / name) for name in "abcd")
    assert a == b and len({a, c, d}) == 3


def test_keys_without_a_stage_reach_all_and_a_stages_own_key_wins(recipe):
    first, second = recipe("--motion", "mine", "--second.motion=its", "--third.motion=3", "--depth", "-1")
    assert (first["motion"], second["motion"]) == ("mine", "its")
    assert (first["trainer"], second["trainer"]) == ({"max_epochs": 5}, {"max_epochs": 2})
    assert first["depth"] == "-1" and second["third.motion"] == "3"  # no stage of that name: its parser will refuse it


def test_a_reference_can_be_given_or_taken_away_on_the_command_line(recipe):
    assert recipe("--second.teacher", "stage:first")[1]["teacher"] == "runs/two/first/checkpoints/last.ckpt"
    assert recipe("--name=alone", "--second.model.init_from=./stage:first", "--stage=second")[0]["run_dir"].startswith(
        "runs/alone"
    )
    assert json.loads(Path("runs/alone/second/done.json").read_text())["inputs"] == {}


def test_finished_stages_are_skipped_and_one_can_be_run_alone(recipe):
    assert [c["run_dir"] for c in recipe("--stage=first")] == ["runs/two/first"]
    assert [c["run_dir"] for c in recipe("--stage", "second")] == ["runs/two/second"]
    assert recipe() == []
    with pytest.raises(
        UsageError, match=r"first holds a finished run of another config \(motion: 'everyone' -> 'mine'\)"
    ):
        recipe("--first.motion=mine")
    assert recipe("--data.init_args.workers=0", "--trainer.logger=false", "--first.trainer.log_every_n_steps=1") == []


def test_a_finished_stage_of_before_a_key_was_there_had_its_default(recipe, monkeypatch):
    recipe()
    monkeypatch.setattr(FakeTraining, "defaults", {"younger": "0"})
    assert recipe() == []
    with pytest.raises(UsageError, match=r"finished run of another config \(younger: '0' -> '1'\)"):
        recipe("--younger=1")


def test_a_later_recipe_file_changes_single_keys(recipe):
    Path("more.yaml").write_text("stages: {second: {trainer: {devices: 1}}, third: {config: two.yaml}}")
    loaded = load_recipe(["two.yaml", "more.yaml"], [])
    assert loaded is not None and list(loaded.stages) == ["first", "second", "third"]
    assert loaded.name == "two"
    keys = loaded.stages["second"].keys
    assert (keys["trainer.max_epochs"], keys["trainer.devices"]) == (2, 1)


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_changed_checkpoint_stops_the_recipe_before_anything_trains(recipe, state):
    recipe()
    if state == "interrupted":
        Path("runs/two/second/done.json").unlink()
    write_weights(Path("runs/two/first/checkpoints/last.ckpt"), 2.0)
    old = json.loads(Path("runs/two/second/inputs.json").read_text())["first"]["sha256"]
    new = content_sha256("runs/two/first/checkpoints/last.ckpt")
    with pytest.raises(UsageError) as stopped:
        recipe()
    for named in ("'second'", "'first'", "model.init_from", f"{old[:12]} -> {new[:12]}", "remove runs/two/second"):
        assert named in str(stopped.value)
    shutil.rmtree("runs/two/second")
    assert [c["run_dir"] for c in recipe()] == ["runs/two/second"]


def test_a_stage_that_had_not_saved_anything_starts_again_with_what_there_is_now(recipe):
    recipe()
    Path("runs/two/second/done.json").unlink()
    Path("runs/two/second/checkpoints/last.ckpt").unlink()
    write_weights(Path("runs/two/first/checkpoints/last.ckpt"), 2.0)
    assert len(recipe()) == 1
    recorded = json.loads(Path("runs/two/second/inputs.json").read_text())["first"]["sha256"]
    assert recorded == content_sha256("runs/two/first/checkpoints/last.ckpt")


def test_a_missing_checkpoint_names_the_stage_to_run(recipe):
    with pytest.raises(
        UsageError, match=r"'second' needs .* 'first' \(model.init_from\), .*run it first, with --stage f"
    ):
        recipe("--stage=second")
    assert not Path("runs").exists()
    recipe()
    Path("runs/two/first/checkpoints/last.ckpt").unlink()
    with pytest.raises(
        UsageError, match=r"no file 'runs/two/first/checkpoints/last\.ckpt': remove runs/two/first, and"
    ):
        recipe()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--second.teacher=stage:third"],
            "teacher asks for stage:third, but there is no earlier stage .* stages: first",
        ),
        (["--second.teacher=stage:second"], "no earlier stage of that name; earlier stages: first"),
        (["--first.teacher=stage:second"], "no earlier stage of that name; earlier stages: none"),
        (["--teacher=stage:first"], "'first': teacher asks for stage:first, but there is no earlier stage"),
        (["--stage=third"], "no stage 'third'; it has: first, second"),
        (["--second.oops=1"], "'second': unknown key 'oops' .keys of this stage only: --second.KEY"),
        (["--second", "3"], "give one of its keys, --second.KEY"),
        (["3"], "unexpected argument '3'"),
        (["--run_dir=x"], "run_dir cannot be set .* choose another --name"),
        (["--second.ckpt_path=last"], "ckpt_path cannot be set .* goes on by itself"),
    ],
)
def test_mistakes_on_the_command_line_are_named_before_anything_runs(recipe, arguments, message):
    with pytest.raises(UsageError, match=message):
        recipe(*arguments)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {first: {trainer: {max_epochs: 1}}}", "'first' needs the key `config`"),
        ("stages: {model: {config: one.yaml}}", "cannot be called 'model'"),
        ("stages: {a.b: {config: one.yaml}}", "cannot be called 'a.b'"),
        ("stages: [first]", "`stages` in recipe bad.yaml must be a mapping of keys, got list"),
        ("stages: {first: }", "stage 'first' in recipe bad.yaml must be a mapping"),
        (
            "stages: {first: {config: one.yaml}}\nmotion: x",
            "unknown key 'motion' .*keys of every stage stand under `all`",
        ),
        ("stages: {first: {config: one.yaml, command: dance}}", r"must be one of \['fit'\], got 'dance'"),
    ],
)
def test_mistakes_in_a_recipe_are_named(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        run_recipe(load_recipe(["bad.yaml"], []), {"fit": FakeTraining})


# ---- stages on several processes -----------------------------------------------------------------


@pytest.fixture
def second_process(monkeypatch):
    """This process is the second of two that torchrun started; gives a function that changes its number."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    return lambda rank: monkeypatch.setenv("RANK", str(rank))


def test_a_process_that_a_stage_does_not_need_waits_for_the_first_one(recipe, second_process, monkeypatch):
    def look_again(seconds: float) -> None:
        second_process(0)
        assert len(recipe()) == 2
        second_process(1)

    monkeypatch.setattr("fasthmr.recipe.time.sleep", look_again)
    assert len(recipe()) == 2, "it trained, too"


def test_all_processes_run_a_stage_that_is_for_all(recipe, second_process, monkeypatch):
    monkeypatch.setattr(FakeTraining, "alone", False)
    assert len(recipe()) == 2


def test_a_process_that_lightning_started_ends_with_the_stage_it_was_started_for(recipe, monkeypatch):
    monkeypatch.setattr(FakeTraining, "alone", False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as left:
        recipe()
    assert left.value.code == 0 and len(FakeTraining.trained) == 1


def test_stages_on_two_processes_one_and_two_again(tiny_shards, tmp_path):
    Path(tmp_path / "mixed.yaml").write_text(
        yaml.safe_dump(
            {
                "stages": {
                    name: {"config": str(ROOT / "conf/encoder_tiny.yaml"), "trainer": {"devices": devices}}
                    for name, devices in (("pair", 2), ("single", 1), ("pair_again", 2))
                }
            },
            sort_keys=False,
        )
    )
    quick = [key for key in QUICK if "devices" not in key]
    keys = [*TINY_NET, *quick, *tiny_data(tiny_shards), "--trainer.max_epochs=1", "--trainer.limit_val_batches=1"]
    done = run_fit("-c", "mixed.yaml", *keys, "--data.init_args.batch_size=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage, steps in (("pair", 3), ("single", 6), ("pair_again", 3)):  # an epoch of 6 clips
        run = tmp_path / "runs/mixed" / stage
        assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == steps
        assert len(list(run.glob("events.out.tfevents.*"))) == 1
        assert json.loads((run / "summary.json").read_text())["processes"] == (1 if stage == "single" else 2)


# ---- the recipes in conf/, through the real entry point ------------------------------------------


def test_every_recipe_is_tested():
    recipes = {p.name for p in (ROOT / "conf").glob("*.yaml") if "stages" in yaml.safe_load(p.read_text())}
    assert recipes == {"fasthmr.yaml", "pretrain_tiny.yaml", "pretrain_decoder_tiny.yaml"}


def test_the_default_recipe_runs_its_stages(tiny_shards, tmp_path):
    done = run_fit("-c", str(ROOT / "conf/fasthmr.yaml"), *default_recipe(tiny_shards), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stages = ("prior", "encoder", "decoder", "evaluation")
    for number, stage in enumerate(stages, start=1):
        assert f"stage {number} of 4: {stage}" in done.stderr
    run = tmp_path / "runs/fasthmr"
    metrics = {stage: json.loads((run / stage / "done.json").read_text())["metrics"] for stage in stages}
    assert all(metrics[stage]["val/mpjpe_mm"] > 0 for stage in stages[:3])
    for row in ("baseline", "+ layers merged", "+ Mask-ToMe", "+ decoder"):
        assert row in done.stdout
    assert (run / "evaluation/side_by_side.mp4").stat().st_size > 10_000


def test_the_shipped_decoders_recipe_is_of_the_shipped_encoder(capsys):
    with pytest.raises(SystemExit):
        fit(["-c", str(ROOT / "conf/pretrain_decoder_tiny.yaml"), "--print_config", "--motion=M"])
    configs = yaml.safe_load(capsys.readouterr().out)
    prior, decoder = (configs[stage] for stage in ("prior", "decoder"))
    shipped = load_pipeline_parts("shipped:encoder_tiny+shipped:decoder_tiny")[1]
    assert shipped is not None
    assert MotionVAEConfig(**prior["model"]["init_args"]["vae"]) == shipped.config.prior
    arguments = decoder["model"]["init_args"]
    assert arguments["encoder"] == decoder["data"]["init_args"]["encoder"] == "shipped:encoder_tiny"
    assert DiffusionConfig(**arguments["diffusion"]) == shipped.config.diffusion
    assert decoder["data"]["init_args"]["make_train"]["motion"] == prior["data"]["init_args"]["train"] == "M"


def test_pretraining_hands_its_first_stage_to_the_second_which_resumes(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [*TINY_NET, "--model.init_args.net.vit_depth=3", *QUICK, *tiny_data(tiny_shards)]
    keys += [
        "--trainer.limit_val_batches=1",
        "--merged.trainer.max_epochs=1",
        "--more.trainer.max_epochs=1",
        "--many.trainer.max_epochs=1",
    ]
    # A learning rate of nothing: the second stage ends with the weights that it was given.
    keys += ["--full.model.init_args.optimizer.lr=1e-30"]
    results = fit(["-c", PRETRAIN, *keys, "--full.trainer.max_epochs=1"])
    assert results["merged"].checkpoint == "runs/pretrain_tiny/merged/checkpoints/best.ckpt"
    merged, full = (load_encoder(results[stage].checkpoint) for stage in ("merged", "full"))
    assert merged.config.token_merging.keep_tokens == 90 and full.config.token_merging is None
    for name, weight in full.state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[name], rtol=0, atol=1e-6)

    Path("runs/pretrain_tiny/full/done.json").unlink()  # as if it had been interrupted after its first epoch
    results = fit(["-c", PRETRAIN, *keys, "--full.trainer.max_epochs=2"])
    assert results["merged"].skipped and results["full"].resumed
    last = torch.load("runs/pretrain_tiny/full/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2 * 3
    assert read_header(results["full"].checkpoint).body.startswith("free@")


def printed(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        fit(["-c", PRETRAIN, *arguments])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_print_config_shows_every_stage_resolved(capsys):
    configs = yaml.safe_load(printed(capsys, "--print_config", "--motion=M", "--full.motion=F", "--name=other"))
    merged, full = configs["merged"], configs["full"]
    assert merged["data"]["init_args"]["make_train"]["motion"] == "M" and full["motion"] == "F"
    assert merged["trainer"]["logger"]["init_args"]["save_dir"] == "runs/other/merged"
    assert merged["data"]["init_args"]["train"] == full["data"]["init_args"]["train"] == "data/pretrain_tiny/train"
    assert full["model"]["init_args"]["init_from"] == "stage:merged"
    assert full["model"]["init_args"]["optimizer"]["lr"] == 2e-4
    merged, _, _, many = yaml.safe_load(printed(capsys, "--print_config", "--data_dir=there")).values()
    assert many["data"]["init_args"]["train"] == "there_many/train"
    assert many["data"]["init_args"]["val"] == merged["data"]["init_args"]["val"] == "there/val"
    assert many["model"]["init_args"]["init_from"] == "stage:more"


def test_help_explains_stages_and_lists_them(capsys):
    text = printed(capsys, "--help")
    assert "--stage STAGE" in text and "the best checkpoint that the earlier stage" in text
    assert "stages of pretrain_tiny, in this order:" in text
    assert "runs/pretrain_tiny/full, given the checkpoint of merged" in text


def test_an_unknown_key_of_a_later_stage_is_named_with_the_nearest_before_the_first_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"stage 'full': unknown key 'net\.vit_detph'; did you mean 'vit_depth'"):
        fit(["-c", PRETRAIN, "--full.model.init_args.net.vit_detph=3"])
    assert not Path("runs").exists()
