"""Progressive merging: layers go while training runs, inside the budget, and a resumed run ends with the same bits."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from progressive_run import NET, train
from study_progressive import Run, Study, StudyError, all_runs, fine_tune, plan_of_depth
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import progressive
from callbacks.progressive import ProgressiveMerging
from fasthmr.checkpoint import load_encoder, read_header, save_encoder
from fasthmr.lit.collapse import collapse_while_training, require_mergeable
from fasthmr.merging import LayerMergePlan, merge_blocks
from fasthmr.merging.policies import least_error_window, most_similar_window
from fasthmr.models.hmr import HMR

ROOT = Path(__file__).parents[1]


def same_state(a: Path, b: Path) -> None:
    """Weights, average, plan, optimiser and schedule of two checkpoints are equal, bit for bit."""
    one, two = (torch.load(path, weights_only=True) for path in (a, b))
    assert one["fasthmr"] == two["fasthmr"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    assert one["lr_schedulers"] == two["lr_schedulers"]
    (first,), (second,) = one["optimizer_states"], two["optimizer_states"]
    assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["state"][key][name]), (key, name)


def merging_of(trainer: L.Trainer) -> ProgressiveMerging:
    (callback,) = (c for c in trainer.callbacks if isinstance(c, ProgressiveMerging))
    return callback


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    train(tiny_shards, out)
    return out


class TestOneProcess:
    def test_layers_go_one_event_at_a_time(self, uninterrupted):
        depths = {
            step: len(load_encoder(uninterrupted / f"step{step}.ckpt").backbone.blocks) for step in range(2, 13, 2)
        }
        assert depths == {2: 6, 4: 6, 6: 5, 8: 5, 10: 4, 12: 4}
        assert len(read_header(uninterrupted / "step12.ckpt").merge_plan.events) == 2

    @pytest.mark.parametrize("step", [2, 4, 6])
    def test_resumes_bit_for_bit_before_and_between_merges(self, uninterrupted, tiny_shards, tmp_path, step):
        train(tiny_shards, tmp_path, resume=uninterrupted / f"step{step}.ckpt")
        same_state(tmp_path / "step12.ckpt", uninterrupted / "step12.ckpt")

    def test_resumes_bit_for_bit_after_merges_with_settings_that_change_no_number(
        self, uninterrupted, tiny_shards, tmp_path
    ):
        same = {"cache_gb": 0.0, "max_clips": 6}  # all six clips, as before
        trainer, _ = train(tiny_shards, tmp_path, resume=uninterrupted / "step10.ckpt", **same)
        same_state(tmp_path / "step12.ckpt", uninterrupted / "step12.ckpt")
        assert [event["step"] for event in merging_of(trainer).history] == [4, 8]

    def test_does_not_resume_as_another_run(self, uninterrupted, tiny_shards, tmp_path):
        changed = {"budget_mm": 5.0, "frames_per_clip": 2, "moments": "reset", "at_steps": [4, 10]}
        with pytest.raises(
            ValueError, match=r"began with other settings .*or start a new run from its weights"
        ) as told:
            train(tiny_shards, tmp_path, resume=uninterrupted / "step6.ckpt", **changed)
        for change in (
            "budget_mm: 1000.0 -> 5.0",
            "frames_per_clip: 3 -> 2",
            "moments: later -> reset",
            "at_steps: [4, 8] -> [4, 10]",
            "calibration_id: ",
        ):
            assert change in str(told.value)
        assert "policy" not in str(told.value) and not list(tmp_path.glob("*.ckpt"))

    def test_the_budget_holds(self, tiny_shards, tmp_path):
        trainer, module = train(tiny_shards, tmp_path, budget_mm=0.0)
        callback = merging_of(trainer)
        for event in callback.history:  # an error below the reference is inside any budget
            assert event["after_mm"] < callback.reference_mm
        assert len(module.net.backbone.blocks) == 6 - len(callback.history)

    def test_down_to_the_target_and_no_further(self, tiny_shards, tmp_path):
        _, module = train(tiny_shards, tmp_path, at_steps=[1, 2, 3, 4], layers_per_event=2, target_layers=3)
        assert len(module.net.backbone.blocks) == 3

    def test_a_schedule(self, tiny_shards, tmp_path):
        events = [{"keep": 3, "drop": [4, 5]}, {"keep": 0, "drop": [1]}]
        _, module = train(tiny_shards, tmp_path, policy="schedule", plan=events, budget_mm=None)
        assert module.net.merge_plan.as_dict()["events"] == events
        assert list(module.ema.module.backbone.blocks) == ["0", "2", "3"]

    def test_the_most_similar_neighbours(self, tiny_shards, tmp_path):
        _, module = train(tiny_shards, tmp_path, policy="cka")
        assert len(module.net.backbone.blocks) == 4

    @pytest.mark.parametrize(("validate_every", "pause", "merges", "step"), [(2, 5, [5, 10], 4), (3, 7, [7], 6)])
    def test_when_validation_has_settled(self, tiny_shards, tmp_path, validate_every, pause, merges, step):
        # The checkpoint that it resumes from, in the middle (4) and at the end (6) of an epoch, was written just before
        # the validation that settles it. Lightning leaves that validation out when it resumes.
        settings = {
            "settled_mm": 1000.0,
            "min_steps_between": pause,
            "trainer_keys": {
                "val_check_interval": validate_every,
                "check_val_every_n_epoch": None,
                "precision": "bf16-mixed",
            },
        }
        trainer, module = train(tiny_shards, tmp_path / "whole", **settings)
        assert [event["step"] for event in merging_of(trainer).history] == merges
        assert len(module.net.backbone.blocks) == 6 - len(merges)
        resumed, _ = train(tiny_shards, tmp_path / "resumed", resume=tmp_path / f"whole/step{step}.ckpt", **settings)
        assert merging_of(resumed).history == merging_of(trainer).history
        same_state(tmp_path / "resumed/step12.ckpt", tmp_path / "whole/step12.ckpt")

    def test_at_epochs_and_every_n_steps(self, tiny_shards, tmp_path):
        trainer, _ = train(tiny_shards, tmp_path / "epochs", at_epochs=[1])  # an epoch has 6 batches
        assert [event["step"] for event in merging_of(trainer).history] == [6]
        trainer, _ = train(tiny_shards, tmp_path / "steps", every_n_steps=5)
        assert [event["step"] for event in merging_of(trainer).history] == [5, 10]

    def test_with_gradient_accumulation_in_bf16_and_without_a_moving_average(self, tiny_shards, tmp_path):
        keys = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}
        trainer, module = train(tiny_shards, tmp_path / "whole", ema_decay=None, trainer_keys=keys)
        assert trainer.global_step == 12 and len(module.net.backbone.blocks) == 4
        assert module.ema is None
        resume = tmp_path / "whole/step6.ckpt"
        train(tiny_shards, tmp_path / "resumed", resume=resume, ema_decay=None, trainer_keys=keys)
        same_state(tmp_path / "resumed/step12.ckpt", tmp_path / "whole/step12.ckpt")

    @pytest.mark.parametrize("moments", ["later", "reset"])
    def test_moments_and_the_moving_average(self, tiny_shards, tmp_path, moments):
        class Watch(L.Callback):
            """Adam's first moment and the average: before layers 2 to 4 become one, and after that."""

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if trainer.global_step == 4:
                    self.later = self.moment(trainer, pl_module.net.backbone.blocks["4"])
                    self.average = copy.deepcopy(pl_module.ema.module.backbone.blocks)

            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.global_step == 4:
                    self.merged = self.moment(trainer, pl_module.net.backbone.blocks["2"])
                    self.merged_average = copy.deepcopy(pl_module.ema.module.backbone.blocks)

            @staticmethod
            def moment(trainer, block):
                state = trainer.optimizers[0].state.get(block.mlp.fc1.weight)
                return state["exp_avg"].clone() if state else None

        watch = Watch()
        keys = {"max_steps": 5}
        settings = {"policy": "schedule", "plan": [{"keep": 2, "drop": [3, 4]}], "moments": moments}
        train(tiny_shards, tmp_path, callbacks=[watch], trainer_keys=keys, **settings)
        if moments == "later":
            assert torch.equal(watch.merged, watch.later)
        else:
            assert watch.merged is None
        expected = merge_blocks(watch.average, LayerMergePlan(6).merged(2, 4))
        assert list(watch.merged_average) == ["0", "1", "2", "5"]
        for block, wanted in zip(watch.merged_average.values(), expected, strict=True):
            for (name, value), other in zip(block.named_parameters(), wanted.parameters(), strict=True):
                assert torch.equal(value, other), name

    def test_the_best_checkpoint_is_chosen_anew_at_each_depth(self, tiny_shards, tmp_path):
        def run(resume: Path | None = None) -> ModelCheckpoint:
            best = ModelCheckpoint(tmp_path, filename="best", monitor="val/mpjpe_mm")
            keys = {"val_check_interval": 2, "check_val_every_n_epoch": None}
            train(tiny_shards, tmp_path, resume=resume, callbacks=[best], at_steps=[8], trainer_keys=keys)
            return best

        best = run()
        assert len(load_encoder(tmp_path / "best_6_layers.ckpt").backbone.blocks) == 6
        assert len(load_encoder(best.best_model_path).backbone.blocks) == 5
        # Interrupted after the merge and resumed from before it, `best.ckpt` is not what the checkpoint says it is.
        best = run(resume=tmp_path / "step8.ckpt")
        assert len(load_encoder(tmp_path / "best_6_layers.ckpt").backbone.blocks) == 6
        assert len(load_encoder(best.best_model_path).backbone.blocks) == 5

    def test_what_tensorboard_shows(self, tiny_shards, tmp_path, monkeypatch):
        # reference; before and after at step 4, then at step 8
        measured = iter([100.0, 101.0, 101.5, 101.25, 103.0])
        monkeypatch.setattr(progressive, "PlanErrors", lambda *_: lambda plan: next(measured))
        events = [{"keep": 3, "drop": [4]}, {"keep": 0, "drop": [1]}]
        keys = {"logger": TensorBoardLogger(tmp_path, name="", version=""), "max_steps": 9}
        train(tiny_shards, tmp_path, policy="schedule", plan=events, budget_mm=2.0, trainer_keys=keys)
        shown = EventAccumulator(str(tmp_path)).Reload()

        def scalar(name: str) -> list[tuple[int, float]]:
            return [(event.step, event.value) for event in shown.Scalars(f"merge/{name}")]

        assert scalar("layers") == [(0, 6), (4, 5), (8, 5)]
        assert scalar("budget_used_mm") == [(0, 0), (4, 1.5), (8, 1.25)]
        assert scalar("error_before_mm") == [(4, 101), (8, 101.25)]
        assert scalar("error_after_mm") == [(4, 101.5), (8, 103)]
        told = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("merge/event/text_summary")]
        assert told == [
            "step 0: 6 layers, reference error 100.00 mm, used 0.00 of 2.00 mm",
            "step 4: 6 -> 5 layers, error 101.00 -> 101.50 mm, used 1.50 of 2.00 mm: 0 1 2 3+4 5",
            "step 8: refused: 5 -> 4 layers, error 101.25 -> 103.00 mm is outside the budget; used 1.25 of 2.00 mm. "
            "Tried: 0+1 2 3+4 5",
        ]
        assert [event.step for event in shown.Images("merge/plan")] == [0, 4]
        plans = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("merge/plan/text_summary")]
        assert "|  |  |  [==]  |" in plans[1]


@pytest.fixture(scope="module")
def two_processes(tiny_shards, tmp_path_factory) -> Path:
    """Runs on two processes, one after the other: whole, from three of its checkpoints, by `cka` and by `schedule`."""
    out = tmp_path_factory.mktemp("two_processes")
    jobs = [{"out": f"{out}/whole"}]
    jobs += [{"out": f"{out}/from{step}", "resume": f"{out}/whole/step{step}.ckpt"} for step in (4, 6, 10)]
    short = {"trainer_keys": {"max_steps": 10}}
    jobs += [
        {"out": f"{out}/schedule", "policy": "schedule", "plan": [{"keep": 1, "drop": [2, 3]}], **short},
        {"out": f"{out}/cka", "policy": "cka", "disagree": True, **short},
    ]
    (out / "jobs.json").write_text(json.dumps(jobs))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "tests/progressive_run.py", str(tiny_shards), str(out / "jobs.json"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


class TestTwoProcesses:
    def test_resume_bit_for_bit_before_between_and_after_merges(self, two_processes):
        assert len(load_encoder(two_processes / "whole/step12.ckpt").backbone.blocks) == 4
        for step in (4, 6, 10):
            same_state(two_processes / f"from{step}/step12.ckpt", two_processes / "whole/step12.ckpt")

    def test_all_evaluate_what_the_first_one_proposes(self, two_processes):
        first, second = ((two_processes / f"cka/asked{rank}.txt").read_text().splitlines() for rank in (0, 1))
        assert first == second
        assert first == [
            "0 1 2 3 4 5",  # the reference
            "0 1 2 3 4 5", "0+1 2 3 4 5",  # at step 4; the second process would have merged 1 and 2
            "0 1 2 3 4", "0+1 2 3 4",
        ]  # fmt: skip
        assert str(read_header(two_processes / "cka/step10.ckpt").merge_plan) == "0+1+2 3 4 5"

    def test_a_schedule(self, two_processes):
        assert str(read_header(two_processes / "schedule/step10.ckpt").merge_plan) == "0 1+2+3 4 5"


class TestPolicies:
    def test_the_least_error_inside_the_limit(self):
        errors = {"0 1 2+3": 5.0, "0 1+2 3": 2.0, "0+1 2 3": 3.0}
        choice = least_error_window(4, lambda plan: errors[str(plan)], 4.0, max_removed=1)
        assert str(choice.plan) == "0 1+2 3" and choice.error_mm == 2.0

    def test_the_nearest_one_where_none_is_inside(self):
        errors = {"0+1+2": 9.0, "0 1+2": 3.0, "0+1 2": 4.0}
        choice = least_error_window(3, lambda plan: errors[str(plan)], 2.0, max_removed=2)
        assert str(choice.plan) == "0 1+2" and choice.error_mm == 3.0

    def test_larger_windows_first(self):
        choice = least_error_window(4, lambda plan: 0.0, 1.0, max_removed=2)
        assert str(choice.plan) == "0 1+2+3"

    def test_most_similar(self):
        similarity = torch.eye(4)
        similarity[1, 2] = similarity[2, 1] = 0.9
        assert str(most_similar_window(similarity, 1)) == "0 1+2 3"
        assert most_similar_window(torch.eye(1), 1) is None


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "set exactly one of at_steps"),
            ({"at_steps": [1], "settled_mm": 1.0}, "set exactly one of"),
            ({"at_steps": [1], "budget_mm": -1.0}, "budget_mm must be a number of 0 or more"),
            ({"at_steps": [1], "budget_mm": None}, "needs budget_mm"),
            ({"at_steps": [1], "policy": "schedule"}, "plan belongs to policy"),
            ({"at_steps": [1], "layers_per_event": 0}, "layers_per_event must be 1 or more"),
            ({"at_steps": [1], "target_layers": 0}, "target_layers must be 1 or more"),
            ({"at_steps": [1], "precision": "16"}, "precision must be one of auto, bf16, 32, got '16'"),
            ({"at_steps": [1], "cache_gb": -1.0}, "cache_gb must be a number of 0 or more, got -1.0"),
            ({"at_steps": [1], "frames_per_clip": 0}, "frames_per_clip must be 1 or more, got 0"),
            ({"at_steps": [1], "max_clips": 0}, "max_clips must be 1 or more, got 0"),
            ({"at_steps": []}, r"at_steps must be one or more numbers of 0 or more, got \[\]"),
            ({"at_steps": [3, -1]}, r"at_steps must be one or more numbers of 0 or more, got \[3, -1\]"),
            ({"at_epochs": []}, r"at_epochs must be one or more numbers"),
            ({"settled_mm": float("nan")}, "settled_mm must be a number of 0 or more, got nan"),
            ({"settled_mm": -0.5}, "settled_mm must be a number of 0 or more, got -0.5"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            ProgressiveMerging("shards", **settings)

    def test_a_target_that_token_merging_cannot_work_with(self, tiny_shards, tmp_path):
        with pytest.raises(ValueError, match="takes 3 layers from 192 to 90 tokens, but there are 2"):
            train(tiny_shards, tmp_path, target_layers=2)

    def test_a_schedule_for_another_depth(self, tiny_shards, tmp_path):
        with pytest.raises(ValueError, match="must drop the layers that follow 5"):
            train(tiny_shards, tmp_path, policy="schedule", plan=[{"keep": 5, "drop": [6]}], target_layers=3)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"plan": [{"keep": 1, "drop": [2, 3, 4, 5]}]}, "takes 3 layers from 192 to 90 tokens, but there are 2"),
            (
                {"plan": [{"keep": 4, "drop": [5]}, {"keep": 0, "drop": [1]}], "target_layers": 5},
                r"leaves 4 layers, fewer than target_layers \(5\)",
            ),
        ],
    )
    def test_a_schedule_that_goes_too_far_is_refused_before_it_begins(self, tiny_shards, tmp_path, settings, message):
        class NotTrained(L.Callback):
            def on_train_start(self, trainer, pl_module):
                pytest.fail("training has begun")

        with pytest.raises(ValueError, match=message):
            train(tiny_shards, tmp_path, callbacks=[NotTrained()], policy="schedule", **settings)

    def test_other_strategies(self):
        from lightning.pytorch.strategies import FSDPStrategy

        with pytest.raises(ValueError, match="not under FSDPStrategy"):
            require_mergeable(FSDPStrategy())

    def test_a_plan_that_does_not_continue(self, tiny_shards, tmp_path):
        trainer, module = train(tiny_shards, tmp_path)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(ValueError, match="no beginning"):
            collapse_while_training(trainer, module, LayerMergePlan(NET.vit_depth).merged(0, 4))
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class TestStudy:
    def test_one_shot_merging_to_any_depth(self):
        cost = [9.0, 1.0, 4.0, 0.3, 2.0]  # of merging layers i and i + 1

        def error(plan: LayerMergePlan) -> float:
            edges = (*plan.layers, plan.depth)
            return sum(sum(cost[a : b - 1]) for a, b in itertools.pairwise(edges))

        plans = {layers: plan_of_depth(6, layers, error) for layers in range(5, 0, -1)}
        assert [len(plan.layers) for plan, _ in plans.values()] == [5, 4, 3, 2, 1]
        assert str(plans[5][0]) == "0 1 2 3+4 5" and plans[5][1] == pytest.approx(0.3, abs=0.02)
        with pytest.raises(StudyError, match="more than 3 of 6 layers at any budget"):
            plan_of_depth(6, 3, lambda plan: 1e9 * len(plan.events))

    def test_a_run_is_made_once_and_never_taken_for_another(self, free_body, tiny_shards, tmp_path):
        data, start = tmp_path / "data", tmp_path / "start.ckpt"
        data.mkdir()
        for name in ("train", "val"):
            (data / name).symlink_to(tiny_shards)
        save_encoder(start, HMR(NET), free_body.id)
        short = Study(start, data, tmp_path / "out", epochs=2, clips=4)
        run = Run("progressive", 5, seed=0, moments="reset")
        identity = short.identity()
        metrics = fine_tune(short, run, start, identity)
        assert metrics["mpjpe_mm"] > 0
        done = tmp_path / "out" / run.name / "done.json"
        finished = done.stat().st_mtime_ns
        assert fine_tune(short, run, start, identity) == metrics and done.stat().st_mtime_ns == finished
        longer = Study(start, data, tmp_path / "out", epochs=3, clips=4)
        with pytest.raises(StudyError, match=r"made from something else \(epochs: 2 -> 3.*choose another --out"):
            fine_tune(longer, run, start, longer.identity())

    def test_runs_are_all_different(self):
        runs = all_runs([8, 6], [0, 1, 1], ["later", "reset"], depth=12)
        assert len({run.name for run in runs}) == len(runs) == 2 + 2 * (2 + 4)
