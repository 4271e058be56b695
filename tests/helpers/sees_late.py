"""`python -m helpers.sees_late ARGUMENTS...`: fasthmr.fit, whose second process sees files late (network folders)."""

import itertools
import os
from pathlib import Path

from fasthmr import fit

if os.environ.get("LOCAL_RANK") == "1":
    looks, read = itertools.count(), fit.read_checkpoint

    def read_late(path: Path) -> dict:
        if next(looks) < 2:
            raise FileNotFoundError(f"no checkpoint at {path}")
        return read(path)

    fit.read_checkpoint = read_late
    fit.checkpoint_to_resume = lambda *arguments: None

if __name__ == "__main__":
    fit.leave(fit.main())
