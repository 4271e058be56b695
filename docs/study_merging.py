"""Tables of what merging costs in accuracy.

    python docs/study_merging.py CHECKPOINT --data SHARDS [--tables tau tokens choices]

Prints Markdown. Nothing is fine-tuned; docs/results.md has the tables, and the commands for those after fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch

from fasthmr.body import load_body
from fasthmr.calibration import CalibrationSet, PlanErrors
from fasthmr.checkpoint import load_encoder
from fasthmr.cost import encoder_cost
from fasthmr.merging import LayerMergePlan, TokenMerging, search_layer_merges
from fasthmr.models.hmr import HMR

TAUS_MM = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)


class Study:
    """An encoder, and the frames that it is measured on."""

    def __init__(self, checkpoint: str, data: str, frames_per_clip: int) -> None:
        self.hmr, self.body = load_encoder(checkpoint), load_body()
        self.frames = CalibrationSet.read(data, self.body.id, frames_per_clip)
        self._errors = self.errors_of(self.hmr)
        self._known: dict[LayerMergePlan, float] = {}

    def errors_of(self, hmr: HMR, cache_gb: float = 4.0) -> PlanErrors:
        return PlanErrors(hmr, self.body, self.frames, cache_gb=cache_gb)

    def error(self, plan: LayerMergePlan) -> float:
        """MPJPE under a plan, mm, each plan evaluated once over all searches."""
        if plan not in self._known:
            self._known[plan] = self._errors(plan)
        return self._known[plan]

    def measure(self, hmr: HMR) -> tuple[float, float]:
        """PA-MPJPE and MPJPE of an encoder, mm."""
        errors = self.errors_of(hmr, cache_gb=0.0)
        errors(LayerMergePlan(len(hmr.backbone.blocks)))
        values = errors.errors.compute()
        return float(values["pa_mpjpe_mm"]), float(values["mpjpe_mm"])

    def variant(self, tokens: TokenMerging | None, plan: LayerMergePlan | None = None) -> HMR:
        hmr = copy.deepcopy(self.hmr)
        if plan is not None:
            hmr.merge_layers(plan)
        hmr.set_token_merging(tokens)
        return hmr


def by_tau(study: Study) -> Iterator[list[str]]:
    """ECLM at several budgets (FastHMR, Tab. 2)."""
    yield ["tau, mm", "layers", "PA-MPJPE, mm", "MPJPE, mm", "MACs, G (thop)", "groups"]
    depth = study.hmr.config.vit_depth
    for tau in (None, *TAUS_MM):
        empty = LayerMergePlan(depth)
        plan = empty if tau is None else search_layer_merges(depth, study.error, tau)
        hmr = study.variant(None, plan)
        yield [
            "un-merged" if tau is None else f"{tau:g}",
            str(len(plan.layers)),
            *_errors(study, hmr),
            _macs(hmr),
            str(plan),
        ]


def by_tokens_per_layer(study: Study) -> Iterator[list[str]]:
    """How many tokens a layer merges, on all layers (FastHMR, Tab. 10; a layer can merge half of its tokens)."""
    yield ["tokens a layer", "layers that merge", "PA-MPJPE, mm", "MPJPE, mm", "MACs, G (thop)"]
    for per_layer in (None, 10, 20, 40, 60, 80, 96):
        tokens = (
            None if per_layer is None else TokenMerging(keep_tokens=max(90, 192 - 12 * per_layer), per_layer=per_layer)
        )
        hmr = study.variant(tokens)
        merging = len(hmr.backbone.tokens_merged(len(hmr.backbone.blocks)))
        left = "" if tokens is None or tokens.keep_tokens == 90 else f" ({tokens.keep_tokens} left)"
        yield ["none" if per_layer is None else f"{per_layer}{left}", str(merging), *_errors(study, hmr), _macs(hmr)]


def by_choice(study: Study) -> Iterator[list[str]]:
    """With and without the mask (FastHMR, Tab. 11), and how tokens are compared and averaged; 192 -> 90 tokens."""
    yield ["mask", "metric", "average", "proportional attention", "person share", "PA-MPJPE, mm", "MPJPE, mm"]
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
        yield [*settings, f"{tokens.person_share:g}", *_errors(study, study.variant(tokens))]


TABLES: dict[str, Callable[[Study], Iterator[list[str]]]] = {
    "tau": by_tau,
    "tokens": by_tokens_per_layer,
    "choices": by_choice,
}


def _errors(study: Study, hmr: HMR) -> list[str]:
    return [f"{value:.1f}" for value in study.measure(hmr)]


def _macs(hmr: HMR) -> str:
    return f"{encoder_cost(hmr.config, hmr.merge_plan).macs_thop / 1e9:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--frames_per_clip", type=int, default=12)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    options = parser.parse_args()
    study = Study(options.checkpoint, options.data, options.frames_per_clip)
    print(f"{study.frames.frames} frames, {torch.get_num_threads()} threads")
    for name in options.tables:
        print(f"\n{TABLES[name].__doc__}\n")
        for number, row in enumerate(TABLES[name](study)):
            print("| " + " | ".join(row) + " |", flush=True)
            if number == 0:
                print("|" + "---|" * len(row))


if __name__ == "__main__":
    main()
