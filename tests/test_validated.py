"""LastValidation: a validation that was due when a run was stopped is made up for, and its best weights are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks.progress import RunProgress
from callbacks.validated import LastValidation

#: of the validations at the steps 4, 8, 12 and 16
SCORES = {4: 180.0, 8: 150.0, 12: 155.0, 16: 160.0}


class Scored(L.LightningModule):
    """One weight that counts steps; `validated` says at which of them it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Parameter(torch.zeros(()))
        self.validated: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return -self.steps

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated.append(round(self.steps.item()))
        self.log("val/mpjpe_mm", SCORES[round(self.steps.item())])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(
    run: Path, keys: dict[str, Any], max_steps: int, batches: int, resume: Path | None = None
) -> tuple[Scored, ModelCheckpoint]:
    best = ModelCheckpoint(run, filename="best", monitor="val/mpjpe_mm", enable_version_counter=False)
    last = ModelCheckpoint(run, filename="step", every_n_train_steps=4, save_last=True, enable_version_counter=False)
    module = Scored()
    trainer = L.Trainer(
        default_root_dir=run, accelerator="cpu", logger=False, enable_model_summary=False, num_sanity_val_steps=0,
        max_steps=max_steps, callbacks=[RunProgress(), LastValidation(), best, last], **keys,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(batches)), DataLoader(torch.zeros(1)), ckpt_path=resume)
    return module, best


WHEN = {
    "within epochs": ({"val_check_interval": 4, "check_val_every_n_epoch": None}, 16),
    "at their ends": ({"check_val_every_n_epoch": 1}, 4),
    "after two of them": ({"check_val_every_n_epoch": 2}, 2),
}


@pytest.mark.parametrize(("keys", "batches"), WHEN.values(), ids=WHEN)
@pytest.mark.filterwarnings("ignore")
def test_the_best_weights_are_kept_though_the_run_stopped_after_them(keys, batches, tmp_path):
    train(tmp_path, keys, 10, batches)
    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["callbacks"]["LastValidation"]["pending"]

    module, best = train(tmp_path, keys, 16, batches, resume=last)
    assert module.validated == [8, 12, 16]
    assert best.best_model_score == 150.0
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["state_dict"]["steps"] == saved["global_step"] == 8
    assert saved["callbacks"]["LastValidation"] == {"step": 8, "metrics": {"val/mpjpe_mm": 150.0}, "pending": False}

    module, _ = train(tmp_path / "again", keys, 16, batches, resume=tmp_path / "best.ckpt")
    assert module.validated == [12, 16] and module.steps == 16


def test_checkpoints_that_do_not_say_whether_one_is_due_still_load():
    callback = LastValidation()
    callback.load_state_dict({"step": 3, "metrics": {"val/mpjpe_mm": 1.0}})
    assert callback.step == 3 and not callback.pending
