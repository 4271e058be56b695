"""Calibration: the error of an encoder under a merge plan, on fixed frames of a set of clips."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fasthmr.body import BodyModel
from fasthmr.conventions import NUM_JOINTS
from fasthmr.data.batch import ClipBatch, collate, person_mask
from fasthmr.data.schema import Clip
from fasthmr.data.shards import ClipStore
from fasthmr.data.transforms import Augmentation, make_sample
from fasthmr.files import write_text
from fasthmr.merging import LayerMergePlan, MergedTokens, TokenMerging, merge_blocks
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.models.hmr import HMR, middle_columns
from fasthmr.models.vit import Block
from fasthmr.precision import PrecisionChoice, autocast, chosen_precision, require_precision
from fasthmr.ranks import from_all_ranks, from_first_rank, rank

People = Literal["subject", "all"]


@dataclass(frozen=True)
class CalibrationSet:
    """Frames of clips, one batch a clip.

    Attributes:
        clips: batches of one clip each, T frames spread evenly over it; of this rank.
        frames: how many frames there are, on all ranks.
        id: says which frames of which data these are.
    """

    clips: tuple[ClipBatch, ...]
    frames: int
    id: str

    @classmethod
    def read(
        cls,
        folder: str | Path,
        body_id: str,
        frames_per_clip: int = 80,
        max_clips: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> CalibrationSet:
        """Read shards into memory (0.26 MB a frame).

        Args:
            folder: a finished set of clips.
            body_id: of the model to calibrate.
            frames_per_clip: frames spread evenly over each clip; all of a shorter one.
            max_clips: take so many clips, spread evenly over the set; None: all.
            rank, world_size: this process takes every `world_size`-th clip.

        Raises:
            ShardError: no finished set of shards, or a damaged one.
            BodyMismatchError: labels of another body.
            ValueError: a number out of range, or a set without a frame that has a pose label.
        """
        for name, value in (("frames_per_clip", frames_per_clip), ("max_clips", max_clips)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        store = ClipStore(folder)
        store.require_body(body_id)
        chosen = np.linspace(0, len(store) - 1, min(max_clips or len(store), len(store))).round().astype(int)
        if not any(_has_labels(store[int(i)], frames_per_clip) for i in chosen):
            raise ValueError(f"{folder} has no pose labels to measure errors with: calibrate on a set that has")
        clips = tuple(_spread(store, int(i), frames_per_clip) for i in chosen[rank::world_size])
        shards = json.dumps([store.manifest.shards, [int(i) for i in chosen], frames_per_clip], sort_keys=True)
        lengths = [length for _, length in store.lengths()]
        frames = sum(min(frames_per_clip, lengths[i]) for i in chosen)
        return cls(clips, frames, hashlib.sha256(shards.encode()).hexdigest()[:16])

    def require_masks(self, merging: TokenMerging | None) -> None:
        """Refuse token merging by masks that a clip does not have: it is not the same as a clip without a person.

        Raises:
            ValueError: naming the clip.
        """
        if merging is not None and merging.mask == "given":
            for clip in self.clips:
                if not all(clip.has_masks):
                    person_mask(clip, required=True)  # raises


def _frames_of(clip: Clip, frames: int) -> np.ndarray:
    """Numbers of `frames` frames spread evenly over a clip; all of a shorter one."""
    return np.linspace(0, len(clip.frames) - 1, min(frames, len(clip.frames))).round().astype(int)


def _has_labels(clip: Clip, frames: int) -> bool:
    labelled = clip.body is not None and clip.status["pose"] != "missing"
    return labelled and bool(clip.valid[_frames_of(clip, frames)].any())


def _spread(store: ClipStore, index: int, frames: int) -> ClipBatch:
    clip = store[index]
    return collate([make_sample(clip, _frames_of(clip, frames), np.random.default_rng(0), Augmentation.off())])


class PlanErrors:
    """MPJPE of an encoder under a plan, over a calibration set: `errors(plan) -> mm`.

    A search changes the last layers first, and what comes before the first changed layer stays as it is: its output
    is kept, for as many layers as fit into `cache_gb`, so that an evaluation computes little more than what changed.
    The weights must not change while this lives. With several ranks, each holds its share of the clips and all must ask
    for the same plans.

    Args:
        hmr: the encoder, which may be merged already; a plan's layer i is its i-th remaining one.
        body: that the labels belong to.
        calibration: frames and labels.
        protocol: name of the evaluation protocol; one that regresses joints is not supported.
        cache_gb: memory for the layers' outputs; 0 keeps nothing.
        precision: "bf16", "32", or "auto": bf16 where the encoder's device has instructions for it.
        mask_people: whose tokens merging protects: the tracked person's ("subject"), or those of "all".

    Raises:
        ValueError: a setting that cannot be, or the encoder merges tokens by mask and a clip has none; names it.
    """

    def __init__(
        self,
        hmr: HMR,
        body: BodyModel,
        calibration: CalibrationSet,
        protocol: str = "body-24",
        cache_gb: float = 4.0,
        precision: PrecisionChoice = "auto",
        mask_people: People = "subject",
    ) -> None:
        require_precision(precision)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        if mask_people not in get_args(People):
            raise ValueError(f"mask_people must be 'subject' or 'all', got {mask_people!r}")
        if not 0 <= cache_gb < math.inf:
            raise ValueError(f"cache_gb must be 0 or more, got {cache_gb}")
        calibration.require_masks(hmr.config.token_merging)
        self.hmr, self.body, self.calibration = hmr, body, calibration
        self.device = hmr.smpl_head.init_cam.device
        self.errors = PoseErrors(PROTOCOLS[protocol]).to(self.device)
        self.mask_people: People = mask_people
        self.precision = chosen_precision(precision, self.device)
        self.depth = len(hmr.backbone.blocks)
        token_bytes = 4 * hmr.config.vit_dim * hmr.backbone.num_tokens
        here = sum(clip.valid.numel() for clip in calibration.clips)
        fits = int(cache_gb * 1e9 // max(1, token_bytes * here))
        # Layers whose inputs are kept, evenly spread; the last one can never be the first that changes.
        self.kept = sorted({int(layer) for layer in np.linspace(0, self.depth - 1, min(fits, self.depth)).round()})
        self._cache: list[dict[int, MergedTokens]] | None = None

    @torch.inference_mode()
    def __call__(self, plan: LayerMergePlan) -> float:
        """MPJPE of the encoder under a plan for its layers, mm.

        Raises:
            ValueError: the plan is for another number of layers, or leaves too few for token merging.
        """
        was_training = self.hmr.training
        self.hmr.eval()
        try:
            blocks = cast(list[Block], list(merge_blocks(self.hmr.backbone.layers, plan)))
            first = min((event.keep for event in plan.events), default=self.depth)
            if self._cache is None:
                self._cache = [self._fill(clip) for clip in self.calibration.clips]
            self.errors.reset()
            for clip, states in zip(self.calibration.clips, self._cache, strict=True):
                start = max((layer for layer in states if layer <= first), default=None)
                with self._amp():
                    state = self._embed(clip) if start is None else states[start]
                    state = self.hmr.backbone.run(state, blocks, start or 0)
                    output = self.hmr.read_out(self.hmr.backbone.finish(state), clip.box_info().to(self.device))
                self._add(clip, output.rotations, output.betas)
            return float(self.errors.compute()["mpjpe_mm"])
        finally:
            self.hmr.train(was_training)

    @torch.inference_mode()
    def token_features(self, samples: int = 1024, seed: int = 0) -> list[Tensor]:
        """Outputs of every layer, un-merged, at the same random tokens, for `linear_cka`.

        Token merging is left out, since merged tokens have no counterpart. Which tokens these are depends on the set
        and the seed alone: with several ranks, each computes those of its own clips, and all get all of them.

        Returns:
            `depth` tensors (samples, D), float32, on the CPU, the same on every rank; fewer samples from a set that has
            fewer tokens.
        """
        clips = sum(from_all_ranks(len(self.calibration.clips)))
        per_clip = -(-samples // max(1, clips))
        was_training = self.hmr.training
        self.hmr.eval()
        try:
            here = {clip.keys[0]: self._features_of(clip, per_clip, seed) for clip in self.calibration.clips}
        finally:
            self.hmr.train(was_training)
        every = dict(itertools.chain.from_iterable(share.items() for share in from_all_ranks(here)))
        by_key = torch.cat([every[key] for key in sorted(every)], dim=1)
        return list(by_key[:, :samples])

    def _features_of(self, clip: ClipBatch, count: int, seed: int) -> Tensor:
        """Outputs of every layer at `count` random tokens of a clip: (depth, count, D), on the CPU."""
        digest = hashlib.sha256(f"{seed} {clip.keys[0]}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        features = []
        with self._amp():
            tokens = self._embed(clip).tokens
            chosen = torch.randperm(tokens.shape[0] * tokens.shape[1], generator=generator)[:count].to(tokens.device)
            for block in self.hmr.backbone.layers:
                tokens = block(tokens)
                features.append(tokens.flatten(0, 1)[chosen].float().cpu())
        return torch.stack(features)

    def _fill(self, clip: ClipBatch) -> dict[int, MergedTokens]:
        states: dict[int, MergedTokens] = {}
        if not self.kept:
            return states
        with self._amp():
            state, layers = self._embed(clip), self.hmr.backbone.layers
            for layer in range(self.kept[-1] + 1):
                if layer in self.kept:
                    states[layer] = state
                state = self.hmr.backbone.run(state, layers, layer, layer + 1)
        return states

    def _embed(self, clip: ClipBatch) -> MergedTokens:
        images = middle_columns(clip.network_input()).to(self.device)
        mask = person_mask(clip, self.mask_people)
        person = self.hmr.person_tokens(mask if mask is None else mask.to(self.device))
        return MergedTokens.start(self.hmr.backbone.embed(images), person)

    def _add(self, clip: ClipBatch, rotations: Tensor, betas: Tensor) -> None:
        betas = self.errors.protocol.clip_betas(betas, clip.valid[0].to(self.device))
        if clip.genders == ["neutral"]:
            pose, shape = clip.rotations.flatten(0, 1).to(self.device), clip.betas.expand_as(betas).to(self.device)
            target = self.body.joints29(pose, shape)[None]
        else:  # the pose is another body's, whose joints are labels, too
            target = clip.joints3d[..., :3].to(self.device)
        self.errors.update(
            pred_joints=self.body.joints29(rotations, betas)[None, :, :NUM_JOINTS],
            target_joints=target[:, :, :NUM_JOINTS],
            pred_vertices=None,
            target_vertices=None,
            valid=(clip.valid & clip.has_pose[:, None]).to(self.device),
            fps=clip.fps,
        )

    def _amp(self) -> torch.autocast:
        return autocast(self.precision, self.device)


class RememberedErrors:
    """An error function that writes down what it evaluated, so that an interrupted search goes on where it was.

    With several ranks, the first one alone keeps the file and says for each plan whether it is known: a rank that
    evaluates waits for the others, so all must. That also lets a search go on with another number of processes. All
    ranks must ask for the same plans.

    Args:
        error: the error function.
        file: where to remember, JSON; written after each evaluation, whole.
        fingerprint: of everything that the errors depend on but the plan; a file of another one is an error.

    Attributes:
        evaluations: how many plans were evaluated, not remembered.
        seconds: that it took.

    Raises:
        ValueError: the file remembers errors of something else, or is none of ours; on every rank.
    """

    def __init__(self, error: Callable[[LayerMergePlan], float], file: Path, fingerprint: str) -> None:
        self.error, self.file, self.fingerprint = error, file, fingerprint
        self.evaluations, self.seconds = 0, 0.0
        self.remembered: dict[str, float] = {}
        problem = ""
        if rank() == 0:
            try:
                self.remembered = _read_errors(file, fingerprint)
            except ValueError as damage:
                problem = str(damage)
        problem = from_first_rank(problem)
        if problem:
            raise ValueError(problem)

    def __call__(self, plan: LayerMergePlan) -> float:
        """Error of a plan, mm, remembered or evaluated now."""
        key = plan.as_json()
        known = from_first_rank(self.remembered.get(key))
        if known is not None:
            return known
        start = time.perf_counter()
        value = self.error(plan)
        self.seconds += time.perf_counter() - start
        self.evaluations += 1
        if rank() == 0 and math.isfinite(value):
            self.remembered[key] = value
            write_text(self.file, json.dumps({"fingerprint": self.fingerprint, "errors_mm": self.remembered}, indent=1))
        return value

    def forget(self) -> None:
        """Remove the file: the search is done."""
        if rank() == 0:
            self.file.unlink(missing_ok=True)


def _read_errors(file: Path, fingerprint: str) -> dict[str, float]:
    """What a file remembers; nothing if there is none."""
    if not file.exists():
        return {}
    try:
        content: Any = json.loads(file.read_text())
        errors = {plan: float(value) for plan, value in content["errors_mm"].items()}
        found = content["fingerprint"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no record of a search, or damaged ({error}): remove it to search anew") from error
    if found != fingerprint:
        raise ValueError(
            f"{file} remembers a search of other weights, data or settings: remove it, or choose another --out"
        )
    return errors
