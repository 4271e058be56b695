"""What training on many GPUs would need of network and disks: arithmetic alone.

No switch is shared and no step waits for data. Communication is counted as if none of it were hidden, so shares are an
upper limit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

#: a stream's reader spends at most this share of its time on opening shards
_OPENING_SHARE = 0.01
#: shards for each reader, so that none draws the same ones again and again
_SHARDS_PER_READER = 4
#: larger shards are no faster, and more is lost with one, or fetched again
_LARGEST_SHARD_BYTES = 1e9


def ring_bytes(processes: int, size: float) -> float:
    """Bytes that each process sends, and receives, in a ring all-reduce of `size` bytes: 2 (n - 1) / n of them."""
    return 2 * (processes - 1) / processes * size


@dataclass(frozen=True)
class Assumptions:
    """What a prediction follows from.

    Args:
        gpu_frames_per_s: frames/s of training on one GPU alone.
        step_frames: frames of a step on each GPU.
        gradient_bytes: of the whole model.
        link_bytes_per_s: what a GPU can send, while it receives as much.
        read_bytes_per_frame: read from shards for each frame that is trained on; more than it is stored in, as a clip
            is read for a few of its frames.
        loader_frames_per_s: of one loader process.
        clip_frames: frames that are taken from a clip that was read.
        gpus_per_node: GPUs that share a machine.
        open_s: seconds to open a shard.
        dataset_bytes: of all shards.

    Raises:
        ValueError: one is not positive; names it.
    """

    gpu_frames_per_s: float
    step_frames: int
    gradient_bytes: float
    link_bytes_per_s: float
    read_bytes_per_frame: float
    loader_frames_per_s: float
    clip_frames: int
    gpus_per_node: int
    open_s: float
    dataset_bytes: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value}")


@dataclass(frozen=True)
class Needs:
    """What training needs on so many GPUs.

    Args:
        gpus: how many.
        step_s: seconds of a step on each GPU, without communication.
        all_reduce_bytes: that each GPU sends in a step.
        all_reduce_s: seconds of that at the full speed of its link.
        workers: loader processes for each GPU.
        read_bytes_per_s: from storage, over all GPUs.
        opened_per_s: shards opened, over all GPUs, where clips are read at random.
        open_files: shards open at once on a machine, where they are read in sequence.
        smallest_shard_bytes: below it, opening takes a noticeable share of a sequential reader's time.
        largest_shard_bytes: above it, there are too few shards for all readers, or they are unwieldy.
    """

    gpus: int
    step_s: float
    all_reduce_bytes: float
    all_reduce_s: float
    workers: int
    read_bytes_per_s: float
    opened_per_s: float
    open_files: int
    smallest_shard_bytes: float
    largest_shard_bytes: float

    @property
    def communication(self) -> float:
        """Share of the time, if nothing of it is hidden behind the backward pass."""
        return self.all_reduce_s / (self.step_s + self.all_reduce_s)

    @property
    def shard_bytes(self) -> float | None:
        """The recommended size: the largest that fits; None where the set is too small to be read in sequence."""
        return self.largest_shard_bytes if self.largest_shard_bytes >= self.smallest_shard_bytes else None


def needs(gpus: int, given: Assumptions) -> Needs:
    """What training on `gpus` GPUs needs.

    A worked number: 1 GB of gradients over 8 GPUs on links of 25 GB/s (200 Gbit/s) take 2 * 7/8 GB / 25 GB/s = 70 ms.

    Raises:
        ValueError: there are no GPUs.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be 1 or more, got {gpus}")
    step_s = given.step_frames / given.gpu_frames_per_s
    sent = ring_bytes(gpus, given.gradient_bytes)
    sent_s = sent / given.link_bytes_per_s
    frames_per_s = gpus * given.step_frames / (step_s + sent_s)
    workers = math.ceil(given.gpu_frames_per_s / given.loader_frames_per_s)
    read = frames_per_s * given.read_bytes_per_frame
    return Needs(
        gpus=gpus,
        step_s=step_s,
        all_reduce_bytes=sent,
        all_reduce_s=sent_s,
        workers=workers,
        read_bytes_per_s=read,
        opened_per_s=frames_per_s / given.clip_frames,
        open_files=min(gpus, given.gpus_per_node) * workers,
        smallest_shard_bytes=read / (gpus * workers) * given.open_s * (1 - _OPENING_SHARE) / _OPENING_SHARE,
        largest_shard_bytes=min(_LARGEST_SHARD_BYTES, given.dataset_bytes / (_SHARDS_PER_READER * gpus * workers)),
    )
