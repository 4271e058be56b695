"""Progressive merging: layers go while training runs, inside the budget, and a resumed run ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from progressive_run import NET, train

from callbacks.progressive import ProgressiveMerging
from fasthmr.checkpoint import load_encoder, read_header
from fasthmr.lit.collapse import collapse_while_training, require_mergeable
from fasthmr.merging import LayerMergePlan
from fasthmr.merging.policies import least_error_window, most_similar_window

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

    @pytest.mark.parametrize("step", [2, 4, 6, 8, 10])
    def test_resumes_bit_for_bit_before_between_and_after_merges(self, uninterrupted, tiny_shards, tmp_path, step):
        train(tiny_shards, tmp_path, resume=uninterrupted / f"step{step}.ckpt")
        same_state(tmp_path / "step12.ckpt", uninterrupted / "step12.ckpt")

    def test_the_budget_holds(self, tiny_shards, tmp_path):
        trainer, module = train(tiny_shards, tmp_path, budget_mm=0.0)
        (callback,) = (c for c in trainer.callbacks if isinstance(c, ProgressiveMerging))
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

    def test_when_validation_has_settled(self, tiny_shards, tmp_path):
        validate = {"val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer, module = train(tiny_shards, tmp_path, settled_mm=1000.0, min_steps_between=5, trainer_keys=validate)
        (callback,) = (c for c in trainer.callbacks if isinstance(c, ProgressiveMerging))
        assert [event["step"] for event in callback.history] == [5, 10]
        assert len(module.net.backbone.blocks) == 4

    def test_at_epochs_and_every_n_steps(self, tiny_shards, tmp_path):
        trainer, _ = train(tiny_shards, tmp_path / "epochs", at_epochs=[1])  # an epoch has 6 batches
        (callback,) = (c for c in trainer.callbacks if isinstance(c, ProgressiveMerging))
        assert [event["step"] for event in callback.history] == [6]
        trainer, _ = train(tiny_shards, tmp_path / "steps", every_n_steps=5)
        (callback,) = (c for c in trainer.callbacks if isinstance(c, ProgressiveMerging))
        assert [event["step"] for event in callback.history] == [5, 10]

    def test_with_gradient_accumulation(self, tiny_shards, tmp_path):
        trainer, module = train(tiny_shards, tmp_path, trainer_keys={"accumulate_grad_batches": 3})
        assert trainer.global_step == 12 and len(module.net.backbone.blocks) == 4

    @pytest.mark.parametrize("moments", ["later", "reset"])
    def test_moments(self, tiny_shards, tmp_path, moments):
        class Watch(L.Callback):
            """Looks at Adam's first moment: of layer 4 before it goes into layer 3, and of layer 3 after that."""

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if trainer.global_step == 4:
                    self.later = self.moment(trainer, pl_module.net.backbone.blocks["4"])

            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.global_step == 4:
                    self.merged = self.moment(trainer, pl_module.net.backbone.blocks["3"])

            @staticmethod
            def moment(trainer, block):
                state = trainer.optimizers[0].state.get(block.mlp.fc1.weight)
                return state["exp_avg"].clone() if state else None

        watch = Watch()
        events = [{"keep": 3, "drop": [4]}]
        train(tiny_shards, tmp_path, callbacks=[watch], policy="schedule", plan=events, moments=moments)
        if moments == "later":
            assert torch.equal(watch.merged, watch.later)
        else:
            assert watch.merged is None

    def test_the_best_checkpoint_is_chosen_anew_at_each_depth(self, tiny_shards, tmp_path):
        best = ModelCheckpoint(tmp_path, filename="best", monitor="val/mpjpe_mm")
        trainer, _ = train(
            tiny_shards,
            tmp_path,
            callbacks=[best],
            at_steps=[8],
            trainer_keys={"val_check_interval": 2, "check_val_every_n_epoch": None},
        )
        assert len(load_encoder(tmp_path / "best_6_layers.ckpt").backbone.blocks) == 6
        assert len(load_encoder(best.best_model_path).backbone.blocks) == 5
        assert trainer.global_step == 12


def test_two_processes_hold_the_same_model_and_resume_bit_for_bit(tiny_shards, tmp_path):
    def run(out: Path, *more: str) -> None:
        command = [sys.executable, "tests/progressive_run.py", str(tiny_shards), str(out), "--devices", "2", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    run(tmp_path / "whole")
    assert len(load_encoder(tmp_path / "whole/step12.ckpt").backbone.blocks) == 4
    for step in (4, 6):
        run(tmp_path / f"from{step}", "--resume", str(tmp_path / f"whole/step{step}.ckpt"))
        same_state(tmp_path / f"from{step}/step12.ckpt", tmp_path / "whole/step12.ckpt")


class TestPolicies:
    def test_the_least_error_inside_the_limit(self):
        errors = {"0 1 2+3": 5.0, "0 1+2 3": 2.0, "0+1 2 3": 3.0}
        choice = least_error_window(4, lambda plan: errors[str(plan)], 4.0, max_removed=1)
        assert str(choice.plan) == "0 1+2 3" and choice.error_mm == 2.0
        assert least_error_window(4, lambda plan: errors[str(plan)], 2.0, max_removed=1) is None

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
            ({"at_steps": [1], "budget_mm": -1.0}, "budget_mm must be 0 or more"),
            ({"at_steps": [1], "budget_mm": None}, "needs budget_mm"),
            ({"at_steps": [1], "policy": "schedule"}, "plan belongs to policy"),
            ({"at_steps": [1], "layers_per_event": 0}, "layers_per_event must be 1 or more"),
            ({"at_steps": [1], "target_layers": 0}, "target_layers must be 1 or more"),
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
