"""`python -m helpers.stalled FOLDER`: trains 8 steps and prints them; at first, data for the sixth do not come."""

import sys

from fasthmr import stopping

if __name__ == "__main__":
    stopping.listen()

import os
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from callbacks.interrupt import SaveOnInterrupt


class Stalling(Dataset):
    """Its loader process stands still until it is alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 2

    def __getitem__(self, sample: int) -> torch.Tensor:
        file = self.folder / "asked"
        asked = len(file.read_text()) + 1 if file.exists() else 1
        file.write_text("x" * asked)
        training = os.getppid()
        while asked == 6 and os.getppid() == training:
            time.sleep(0.1)
        return torch.ones(())


class Counting(L.LightningModule):
    """Its weight counts steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return -self.steps

    def on_train_batch_end(self, *_: object) -> None:
        (Path(self.trainer.default_root_dir) / f"step {self.trainer.global_step}").touch()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def main(folder: Path) -> None:
    last = folder / "last.ckpt"
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=4,
        callbacks=[SaveOnInterrupt(last), saving], default_root_dir=folder,
    )  # fmt: skip
    module = Counting()
    loader = DataLoader(Stalling(folder), num_workers=1, persistent_workers=True)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
    print("steps:", trainer.global_step, module.steps.item())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
