"""What an encoder says about a clip's frames, and what is true of them: the same bits whoever asks for which frames."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fasthmr.checkpoint import encoder_id
from fasthmr.data.batch import ClipBatch, collate, person_mask
from fasthmr.data.schema import Clip
from fasthmr.data.transforms import CROP_SCALE, Augmentation, make_sample
from fasthmr.models.hmr import HMR
from fasthmr.precision import Precision, autocast

#: Frames that go through the encoder at once, from a multiple of it on. A matrix product of other sizes may round
#: otherwise, so a frame always travels with the same neighbours, whichever window of the clip is asked for.
CHUNK_FRAMES = 32

People = Literal["subject", "all"]


class EncodedFrames(NamedTuple):
    """What an encoder says about N frames, float32.

    Attributes:
        features: (N, D) what the decoder is conditioned on.
        rotations: (N, 24, 3, 3), betas: (N, 10), camera: (N, 3) as of `HMROutput`.
    """

    features: Tensor
    rotations: Tensor
    betas: Tensor
    camera: Tensor

    def rows(self, start: int, stop: int) -> EncodedFrames:
        """Frames `start` to `stop` of these."""
        return EncodedFrames(*(tensor[start:stop] for tensor in self))


class TrueFrames(NamedTuple):
    """Labels of a clip's N frames.

    Attributes:
        key: the clip's.
        pose: (N, 24, 3) axis-angle, radians, the root in the camera frame; zeros where there is none.
        betas: (10,).
        valid: (N,) bool, frames whose pose is known.
        fps: () frames a second.
    """

    key: str
    pose: Tensor
    betas: Tensor
    valid: Tensor
    fps: Tensor

    @classmethod
    def of(cls, clip: Clip) -> TrueFrames:
        """All labels of a clip."""
        labelled = clip.body is not None and clip.status["pose"] != "missing"
        valid = torch.tensor(clip.valid & labelled)
        fps = torch.tensor(clip.fps, dtype=torch.float32)
        return cls(clip.key, torch.tensor(clip.pose), torch.tensor(clip.betas), valid, fps)

    def rows(self, start: int, stop: int) -> TrueFrames:
        """Frames `start` to `stop` of these."""
        return self._replace(pose=self.pose[start:stop], valid=self.valid[start:stop])

    def to(self, device: torch.device | str) -> TrueFrames:
        """The labels on another device."""
        return TrueFrames(self.key, *(tensor.to(device) for tensor in self[1:]))


def cut_chunks(clip: Clip, start: int, stop: int, crop_scale: float = CROP_SCALE) -> tuple[list[ClipBatch], int]:
    """The network's crops of a clip's frames `start` to `stop`, without augmentation.

    Returns:
        The chunks that hold them, one clip each, and the number of frames in the first chunk that come before `start`.
    """
    first = start // CHUNK_FRAMES * CHUNK_FRAMES
    chunks = []
    for begin in range(first, stop, CHUNK_FRAMES):
        index = np.arange(begin, min(begin + CHUNK_FRAMES, len(clip)))
        chunks.append(collate([make_sample(clip, index, np.random.default_rng(0), Augmentation.off(), crop_scale)]))
    return chunks, start - first


class FrameEncoder:
    """A frozen encoder that runs on chunks of frames.

    Args:
        hmr: the encoder; put into evaluation mode.
        mask_people: whose tokens merging protects: the tracked person's, or all people's.
        precision: that it computes in.

    Raises:
        ValueError: another choice of these.
    """

    def __init__(self, hmr: HMR, mask_people: People = "subject", precision: Precision = "32") -> None:
        for name, value, choices in (("mask_people", mask_people, People), ("precision", precision, Precision)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
        self.hmr = hmr.eval().requires_grad_(False)
        self.mask_people: People = mask_people
        self.precision: Precision = precision

    @functools.cached_property
    def id(self) -> str:
        """The encoder's `fasthmr.checkpoint.encoder_id`."""
        return encoder_id(self.hmr)

    @torch.no_grad()
    def __call__(self, chunks: Sequence[ClipBatch], device: torch.device | str) -> EncodedFrames:
        """Output for all frames of some chunks, on `device`, where the encoder moves to.

        Raises:
            ValueError: the encoder merges tokens by person mask, and a clip has none.
        """
        self.hmr.to(device)
        merging, outputs = self.hmr.config.token_merging, []
        required = merging is not None and merging.mask == "given"
        with autocast(self.precision, device):
            for chunk in chunks:
                chunk = chunk.to(device)
                mask = person_mask(chunk, self.mask_people, required)
                output = self.hmr(chunk.network_input(), mask, chunk.box_info())
                outputs.append(EncodedFrames(output.feature, output.rotations, output.betas, output.camera))
        return EncodedFrames(*map(torch.cat, zip(*outputs, strict=True)))
