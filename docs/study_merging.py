"""Tables of what merging costs in accuracy.

    python docs/study_merging.py CHECKPOINT --data SHARDS --calibration SHARDS [--tables tau tokens choices]

Layers are chosen on frames of CALIBRATION and measured on frames of DATA, spread evenly over their clips. Prints
Markdown. Nothing is fine-tuned here: docs/study_progressive.py does that. docs/results.md has the tables.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch

from fasthmr.body import load_body, require_same_body
from fasthmr.calibration import CalibrationSet, PlanErrors
from fasthmr.checkpoint import load_encoder, read_header
from fasthmr.cost import encoder_cost
from fasthmr.data.batch import person_mask
from fasthmr.merging import LayerMergePlan, TokenMerging, search_layer_merges
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.models.hmr import HMR
from fasthmr.precision import autocast

TAUS_MM = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
PROTOCOL = PROTOCOLS["body-24"]


class Study:
    """An encoder, the frames that layers are chosen on, and those that it is measured on."""

    def __init__(self, checkpoint: str, data: str, calibration: str, frames_per_clip: int, clips: int | None) -> None:
        self.hmr, self.body = load_encoder(checkpoint), load_body()
        require_same_body(self.body.id, read_header(checkpoint).body, where=checkpoint)
        self.depth = len(self.hmr.backbone.blocks)
        self.frames = CalibrationSet.read(data, self.body.id, frames_per_clip, clips)
        self.calibration = CalibrationSet.read(
            calibration, self.body.id, frames_per_clip, clips or len(self.frames.clips)
        )
        self._plan_errors = PlanErrors(self.hmr, self.body, self.calibration)
        self._known: dict[LayerMergePlan, float] = {}
        self._measured: dict[tuple[TokenMerging | None, LayerMergePlan], list[str]] = {}

    def error(self, plan: LayerMergePlan) -> float:
        """MPJPE under a plan on calibration frames, mm, each plan evaluated once over all searches."""
        if plan not in self._known:
            self._known[plan] = self._plan_errors(plan)
        return self._known[plan]

    def measure(self, tokens: TokenMerging | None, plan: LayerMergePlan | None = None) -> list[str]:
        """PA-MPJPE, MPJPE and PVE of the encoder so merged, mm; parameters, M, and multiply-adds of a frame, G, as thop
        counts. Nothing is measured twice."""
        plan = LayerMergePlan(self.depth) if plan is None else plan
        if (tokens, plan) not in self._measured:
            self._measured[tokens, plan] = self._measure(self.variant(tokens, plan))
        return self._measured[tokens, plan]

    @torch.inference_mode()
    def _measure(self, hmr: HMR) -> list[str]:
        errors = PoseErrors(PROTOCOL)
        settings = hmr.config.token_merging
        for clip in self.frames.clips:
            mask = person_mask(clip, required=settings is not None and settings.mask == "given")
            with autocast("auto", "cpu"):
                output = hmr(clip.network_input(), mask)
            frames = clip.valid.numel()
            betas = output.betas.mean(0, keepdim=True).expand(frames, -1) if PROTOCOL.average_betas else output.betas
            predicted = self.body(output.rotations, betas)
            target = self.body(clip.rotations.flatten(0, 1), clip.betas.expand(frames, -1))
            errors.update(
                pred_joints=predicted.joints[None],
                target_joints=target.joints[None],
                pred_vertices=predicted.vertices[None],
                target_vertices=target.vertices[None],
                valid=clip.valid & clip.has_pose[:, None],
                fps=clip.fps,
            )
        values = errors.compute()
        cost = encoder_cost(hmr.config, hmr.merge_plan)
        told = [f"{float(values[name]):.2f}" for name in ("pa_mpjpe_mm", "mpjpe_mm", "pve_mm")]
        return [*told, f"{cost.params / 1e6:.2f}", f"{cost.macs_thop / 1e9:.3f}"]

    def variant(self, tokens: TokenMerging | None, plan: LayerMergePlan) -> HMR:
        """A copy of the encoder with its layers merged by a plan, and its tokens."""
        hmr = copy.deepcopy(self.hmr)
        hmr.set_token_merging(None)
        hmr.merge_layers(self.hmr.merge_plan.then(plan))
        hmr.set_token_merging(tokens)
        return hmr


MEASURED = ["PA-MPJPE, mm", "MPJPE, mm", "PVE, mm", "parameters, M", "MACs, G (thop)"]


def by_tau(study: Study) -> Iterator[list[str]]:
    """ECLM at several budgets (FastHMR, Tab. 2)."""
    yield ["tau, mm", "layers", *MEASURED, "groups"]
    for tau in (None, *TAUS_MM):
        plan = LayerMergePlan(study.depth) if tau is None else search_layer_merges(study.depth, study.error, tau)
        name = "un-merged" if tau is None else f"{tau:g}"
        yield [name, str(len(plan.layers)), *study.measure(None, plan), str(plan)]


def by_tokens_per_layer(study: Study) -> Iterator[list[str]]:
    """How many tokens a layer merges, down to 90 of 192, on all layers (FastHMR, Tab. 10; a layer can merge half)."""
    yield ["tokens a layer", "layers that merge", *MEASURED]
    for per_layer in (None, 10, 20, 40, 60, 80, 96):
        tokens = None if per_layer is None else TokenMerging(per_layer=per_layer)
        merging = 0 if tokens is None else len(tokens.schedule(study.hmr.backbone.num_tokens, study.depth))
        yield ["none" if per_layer is None else str(per_layer), str(merging), *study.measure(tokens)]


def by_choice(study: Study) -> Iterator[list[str]]:
    """With and without the mask (FastHMR, Tab. 11), and how tokens are compared and averaged; 192 -> 90 tokens."""
    yield ["mask", "metric", "average", "proportional attention", "person share", *MEASURED[:3]]
    choices: list[TokenMerging] = [
        TokenMerging(),
        TokenMerging(mask="none"),
        TokenMerging(metric="tokens"),
        TokenMerging(average="size"),
        TokenMerging(average="size", proportional_attention=True),
        TokenMerging(proportional_attention=True),
        TokenMerging(person_share=0.0),
        TokenMerging(person_share=0.5),
    ]
    for tokens in choices:
        settings = [tokens.mask, tokens.metric, tokens.average, "yes" if tokens.proportional_attention else "no"]
        yield [*settings, f"{tokens.person_share:g}", *study.measure(tokens)[:3]]


TABLES: dict[str, Callable[[Study], Iterator[list[str]]]] = {
    "tau": by_tau,
    "tokens": by_tokens_per_layer,
    "choices": by_choice,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="folder of shards to measure on")
    parser.add_argument("--calibration", required=True, help="folder of shards to choose layers on")
    parser.add_argument("--frames_per_clip", type=int, default=27)
    parser.add_argument("--clips", type=int, help="so many clips of each, spread evenly; all of DATA if not given")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    options = parser.parse_args()
    study = Study(options.checkpoint, options.data, options.calibration, options.frames_per_clip, options.clips)
    print(f"chosen on {study.calibration.frames} frames, measured on {study.frames.frames}, {PROTOCOL.describe()}")
    for name in options.tables:
        print(f"\n{TABLES[name].__doc__}\n")
        for number, row in enumerate(TABLES[name](study)):
            print("| " + " | ".join(row) + " |", flush=True)
            if number == 0:
                print("|" + "---|" * len(row))


if __name__ == "__main__":
    main()
