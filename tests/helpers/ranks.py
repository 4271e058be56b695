"""A callback that writes down what each process ends with."""

import hashlib
import json
from pathlib import Path

import lightning as L


class WriteRanks(L.Callback):
    """At the end of training, a hash of all weights and the merge plan in `folder/rank<N>.json`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer, pl_module) -> None:
        digest = hashlib.sha256()
        for name, weight in sorted(pl_module.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.float().numpy().tobytes())
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"weights": digest.hexdigest(), "plan": pl_module.net.merge_plan.as_dict()["events"]}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(content))
