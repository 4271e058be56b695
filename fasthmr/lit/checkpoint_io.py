"""AtomicCheckpointIO: training checkpoints appear whole or not at all, and are read without executing anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from fasthmr.checkpoint import read_checkpoint, write_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint reading and writing through `fasthmr.checkpoint`.

    Lightning's own writer makes its temporary file in the system's temporary folder, which may be another disk; the
    move from there is a copy, which a killed job leaves half done.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path` by renaming a finished file beside it.

        Raises:
            OSError: it cannot be written, e.g. a full disk; says where, how much is free, and what to do.
        """
        try:
            write_checkpoint(Path(path), checkpoint)
        except (OSError, RuntimeError) as error:
            # torch's writer turns the file's OSError into a RuntimeError about itself
            reason = error if isinstance(error, OSError) else error.__context__ or error
            free = shutil.disk_usage(Path(path).parent).free
            raise OSError(
                f"cannot write the checkpoint {path} ({getattr(reason, 'strerror', None) or reason}; "
                f"{free / 1e6:.0f} MB are free there): make room and go on with --ckpt_path last, "
                "or start again with --run_dir on another disk"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> dict:
        """Read a checkpoint; only tensors and plain data are accepted, whatever `weights_only` says."""
        return read_checkpoint(Path(path))
