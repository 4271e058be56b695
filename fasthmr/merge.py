"""Make a trained encoder cheaper within an error budget: `python -m fasthmr.merge CHECKPOINT --data SHARDS --tau 0.1`.

    python -m fasthmr.merge best.ckpt --data data/val --tau 0.1
    python -m fasthmr.merge best.ckpt --data data/val --tau 0.3 --keep_tokens 90       and Mask-ToMe in the result
    python -m fasthmr.merge best.ckpt --data data/val --plan plan.json                 a plan of your own, no search

ECLM (FastHMR, Alg. 1) walks from the last layer to the first and merges neighbours as long as the MPJPE on
calibration frames grows by less than `tau` mm. It writes OUT.ckpt (the merged encoder), OUT.json and OUT.png (what was
tried, errors, similarity of layers, cost, speed before and after). Interrupted, the same command goes on, with as many
processes as you like: what was evaluated is in OUT.search.json. With torchrun or srun, processes share the clips.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fasthmr.body import load_body, require_same_body
from fasthmr.calibration import CalibrationSet, People, PlanErrors, RememberedErrors
from fasthmr.checkpoint import load_encoder, read_header, save_encoder
from fasthmr.checkpoint_files import SHIPPED, located
from fasthmr.cli import HelpFormatter
from fasthmr.cost import encoder_cost, frames_per_second
from fasthmr.files import write_text
from fasthmr.merging import LayerMergePlan, SearchStep, TokenMerging, search_layer_merges
from fasthmr.merging.similarity import linear_cka
from fasthmr.metrics import PROTOCOLS
from fasthmr.models.hmr import HMR
from fasthmr.precision import chosen_precision
from fasthmr.ranks import chosen_device, join
from fasthmr.report import cost_rows, draw_merge_report

#: what is written, OUT and these
_ENDINGS = (".ckpt", ".json", ".png", ".search.json")
#: flags that are fields of `TokenMerging`
_TOKEN_FLAGS = ("keep_tokens", "per_layer", "mask", "person_share", "metric", "average", "proportional_attention")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m fasthmr.merge", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=str, help="encoder to merge; it may have merged layers already")
    parser.add_argument("--data", type=str, required=True, help="folder of shards with pose labels to calibrate on")
    parser.add_argument("--out", type=str | None, default=None, help="name of what is written, without ending")
    parser.add_argument("--tau", type=float, default=0.1, help="budget over the error of the encoder as it is, mm")
    parser.add_argument(
        "--commit_last_window", type=bool, default=True, help="false: forget a window still open at the end (Alg. 1)"
    )
    parser.add_argument(
        "--plan", type=str | None, default=None, help="JSON file of a plan to apply; nothing is searched"
    )
    parser.add_argument("--body", type=str, default="free", help="`free`, or a body file in SMPL's format")
    parser.add_argument("--protocol", type=str, default="body-24", help="of the error")
    parser.add_argument("--frames_per_clip", type=int, default=80, help="calibration frames, spread over each clip")
    parser.add_argument("--max_clips", type=int | None, default=None, help="calibration clips; all if not given")
    parser.add_argument("--cache_gb", type=float, default=4.0, help="memory for outputs of layers that do not change")
    parser.add_argument(
        "--precision", type=str, default="auto", help="bf16, 32, or auto: bf16 if there are instructions"
    )
    parser.add_argument(
        "--mask_people", type=str, default="subject", help="whose tokens are protected: of the `subject`, or of `all`"
    )
    parser.add_argument("--batch", type=int, default=8, help="frames at a time when speed is measured")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda; the best there is if not given")
    tokens = parser.add_argument_group(
        "Mask-ToMe in the result", "What is not given is as in the checkpoint, or has the default of docs/merging.md."
    )
    tokens.add_argument("--keep_tokens", type=int | None, default=None, help="tokens left in the end")
    tokens.add_argument("--per_layer", type=int | None, default=None, help="tokens merged in a layer")
    tokens.add_argument("--mask", type=str | None, default=None, help="protect the tokens of `given` masks, or `none`")
    tokens.add_argument(
        "--person_share",
        type=float | None,
        default=None,
        help="a token shows the person if this share of its patch does",
    )
    tokens.add_argument("--metric", type=str | None, default=None, help="of similarity: on `keys` or `tokens`")
    tokens.add_argument("--average", type=str | None, default=None, help="`plain`, or weighted by `size`")
    tokens.add_argument(
        "--proportional_attention", type=bool | None, default=None, help="add log sizes to the attention's logits"
    )
    return parser


def merge(options: Namespace) -> dict[str, Any]:
    """Do what the command line says; returns the report.

    Raises:
        ValueError: bad input; nothing was written.
        OSError: a file cannot be read or written.
    """
    path = located(options.checkpoint)
    out = Path(options.out) if options.out is not None else _default_out(options.checkpoint, path)
    _check(options, path, out)
    device = chosen_device(options.device)
    options.precision = chosen_precision(options.precision, device)
    rank, world_size = join(device)
    header = read_header(path)
    body = load_body(options.body)
    require_same_body(body.id, header.body, where=str(path))
    hmr = load_encoder(path).to(device)
    body = body.to(device)
    depth = len(hmr.backbone.blocks)
    tokens = _token_merging(hmr, options)
    given = None if options.plan is None else _read_plan(Path(options.plan))
    needed = max(1, len(hmr.backbone.tokens_merged(depth)))  # layers, for merging tokens as it is and as it will be
    if tokens is not None:
        needed = max(needed, len(tokens.schedule(hmr.backbone.num_tokens, depth)))
    if given is not None:
        left = len(hmr.merge_plan.then(given).layers)  # refuses another depth before anything is computed
        if left < needed:
            raise ValueError(f"{options.plan} leaves {left} layers, but merging tokens takes {needed}")

    frames = CalibrationSet.read(options.data, body.id, options.frames_per_clip, options.max_clips, rank, world_size)
    frames.require_masks(tokens)

    def errors_of(encoder: HMR, clips: CalibrationSet, cache_gb: float = 0.0) -> PlanErrors:
        return PlanErrors(encoder, body, clips, options.protocol, cache_gb, options.precision, options.mask_people)

    errors = errors_of(hmr, frames, options.cache_gb)
    out.parent.mkdir(parents=True, exist_ok=True)
    remembered = RememberedErrors(
        errors, _beside(out, ".search.json"), _fingerprint(path, frames, options, device.type)
    )
    steps: list[SearchStep] = []
    with tqdm(total=depth, unit="plan", desc="searching", disable=rank != 0) as bar:
        found = _search(given, depth, needed, _shown(bar, remembered), options, _watch(bar, steps))
    plan = hmr.merge_plan.then(found)
    merged = _merged(hmr, plan, tokens)
    last = errors_of(merged, frames)(LayerMergePlan(len(merged.backbone.blocks)))
    report: dict[str, Any] = {
        "checkpoint": str(path),
        "data": options.data,
        "calibration_frames": frames.frames,
        "protocol": options.protocol,
        "mask_people": options.mask_people,
        "tau_mm": options.tau if given is None else None,
        "plan": plan.as_dict(),
        "group_sizes": list(plan.group_sizes),
        "token_merging": None if tokens is None else asdict(tokens),
        "base_mpjpe_mm": remembered(LayerMergePlan(depth)),
        "layers_merged_mpjpe_mm": remembered(found),
        "final_mpjpe_mm": last,
        "steps": [{"groups": list(s.plan.group_sizes), "mpjpe_mm": s.error_mm, "accepted": s.accepted} for s in steps],
        "search": {
            "plans": len(steps),
            "evaluations": remembered.evaluations,  # the others were remembered
            "seconds": remembered.seconds,
            "layers_kept": errors.kept,
            "evaluations_per_s": remembered.evaluations / remembered.seconds if remembered.evaluations else None,
            "evaluations_per_s_without_cache": _rate_without_cache(errors_of, hmr, frames, found),
        },
        "commits": _commits(hmr.merge_plan, found, remembered),
        "cka": linear_cka(errors.token_features()).tolist(),
        "cost": {
            "before": encoder_cost(hmr.config, hmr.merge_plan).as_dict(),
            "after": encoder_cost(merged.config, plan).as_dict(),
        },
    }
    if rank == 0:
        speed = frames_per_second({"before": hmr, "after": merged}, options.batch, precision=options.precision)
        threads = torch.get_num_threads()
        where = {"device": device.type, "threads": threads, "precision": options.precision}
        report["frames_per_s"] = {"batch": options.batch, **where, **speed}
        save_encoder(_beside(out, ".ckpt"), merged, body.id)
        write_text(_beside(out, ".json"), json.dumps(report, indent=1))
        draw_merge_report(report, _beside(out, ".png"))
        _print(report, out)
    remembered.forget()
    return report


def _check(options: Namespace, checkpoint: Path, out: Path) -> None:
    """Refuse what can be refused without reading anything, naming the flag."""
    if not options.tau >= 0:
        raise ValueError(f"--tau must be 0 mm or more, got {options.tau}")
    if options.batch < 1:
        raise ValueError(f"--batch must be 1 or more, got {options.batch}")
    for name, choices in (("protocol", tuple(PROTOCOLS)), ("mask_people", get_args(People))):
        value = getattr(options, name)
        if value not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(choices)}, got {value!r}")
    if not out.name:
        raise ValueError(f"--out must end in a file's name, got {options.out!r}")
    for source in (checkpoint, *([Path(options.plan)] if options.plan is not None else [])):
        for ending in _ENDINGS:
            if _beside(out, ending).resolve() == source.resolve():
                raise ValueError(f"--out {out} would overwrite {source}, which is read: choose another name")


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _token_merging(hmr: HMR, options: Namespace) -> TokenMerging | None:
    """Token merging of the result: the checkpoint's own, changed by the flags that were given."""
    values = {name: getattr(options, name) for name in _TOKEN_FLAGS if getattr(options, name) is not None}
    current = hmr.config.token_merging
    if values and current is None and "keep_tokens" not in values:
        raise ValueError(f"--{next(iter(values))} needs --keep_tokens: {options.checkpoint} merges no tokens")
    return replace(current or TokenMerging(), **values) if values else current


def _read_plan(file: Path) -> LayerMergePlan:
    try:
        return LayerMergePlan.from_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no merge plan: {error}") from error


def _search(
    given: LayerMergePlan | None,
    depth: int,
    least: int,
    errors: Callable[[LayerMergePlan], float],
    options: Namespace,
    on_step: Callable[[SearchStep], None],
) -> LayerMergePlan:
    if given is None:
        return search_layer_merges(depth, errors, options.tau, options.commit_last_window, on_step, least)
    base = errors(LayerMergePlan(depth))
    for count in range(1, len(given.events) + 1):
        prefix = LayerMergePlan(depth, given.events[:count])
        on_step(SearchStep(prefix, errors(prefix), base, True, prefix))
    return given


def _shown(bar: tqdm, errors: Callable[[LayerMergePlan], float]) -> Callable[[LayerMergePlan], float]:
    """The error function, which shows what it is about to evaluate."""

    def error(plan: LayerMergePlan) -> float:
        bar.set_postfix_str(str(plan))
        return errors(plan)

    return error


def _watch(bar: tqdm, steps: list[SearchStep]) -> Callable[[SearchStep], None]:
    def on_step(step: SearchStep) -> None:
        steps.append(step)
        verdict = "base" if not step.plan.events else "accepted" if step.accepted else "refused"
        if not bar.disable:  # `write` prints for a disabled bar as well
            bar.write(f"{step.error_mm:9.3f} mm  {step.error_mm - step.base_mm:+8.3f}  {verdict:8}  {step.plan}")
        bar.update()

    return on_step


def _rate_without_cache(
    errors_of: Callable[[HMR, CalibrationSet], PlanErrors], hmr: HMR, frames: CalibrationSet, found: LayerMergePlan
) -> float:
    """Evaluations/s if nothing were kept, from two evaluations, of the first and the last plan, on one clip only."""
    one = replace(frames, clips=frames.clips[:1])
    errors = errors_of(hmr, one)
    start = time.perf_counter()
    for plan in (LayerMergePlan(found.depth), found):
        errors(plan)
    seconds = (time.perf_counter() - start) / 2
    here, all_here = (sum(clip.valid.numel() for clip in clips) for clips in (one.clips, frames.clips))
    return max(1, here) / max(1, all_here) / seconds


def _commits(
    before: LayerMergePlan, found: LayerMergePlan, errors: Callable[[LayerMergePlan], float]
) -> list[dict[str, Any]]:
    """Every event that was found, by original layer numbers, with the error before and after it; all of them were
    evaluated already."""
    values = [errors(LayerMergePlan(found.depth, found.events[:count])) for count in range(len(found.events) + 1)]
    return [
        {"keep": event.keep, "drop": list(event.drop), "before_mm": values[i], "after_mm": values[i + 1]}
        for i, event in enumerate(before.then(found).after(before))
    ]


def _merged(hmr: HMR, plan: LayerMergePlan, tokens: TokenMerging | None) -> HMR:
    """A copy with merged layers, and tokens merged as given."""
    device = hmr.smpl_head.init_cam.device
    with torch.device("meta"):
        merged = HMR(replace(hmr.config, token_merging=None))
        merged.merge_layers(hmr.merge_plan)
    merged.to_empty(device=device)
    merged.load_state_dict(hmr.state_dict())
    merged.merge_layers(plan)
    merged.set_token_merging(tokens)
    return merged.eval()


def _fingerprint(checkpoint: Path, frames: CalibrationSet, options: Namespace, device: str) -> str:
    settings = [frames.id, options.protocol, options.precision, options.mask_people, device]
    digest = hashlib.sha256(json.dumps(settings).encode())
    with checkpoint.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()[:16]


def _print(report: dict[str, Any], out: Path) -> None:
    table = Table(title=f"layers {LayerMergePlan.from_dict(report['plan'])}", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for row in cost_rows(report):
        table.add_row(*row)
    Console().print(table)
    search = report["search"]
    now, without = search["evaluations_per_s"], search["evaluations_per_s_without_cache"]
    rate = "" if now is None else f"{now:.2f} evaluations/s with {len(search['layers_kept'])} layers kept, "
    print(
        f"{search['plans']} plans on {report['calibration_frames']} frames, {search['evaluations']} evaluated now: "
        f"{rate}{without:.2f} evaluations/s with none kept"
    )
    print(f"written: {out}.ckpt {out}.json {out}.png")


def _default_out(given: str, path: Path) -> Path:
    """Name of the result where none is given: beside the checkpoint; of shipped weights in the current folder."""
    name = f"{path.stem}-merged"
    return Path(name) if given.startswith(SHIPPED) else path.with_name(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end in one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s")
    options = build_parser().parse_args(arguments)
    try:
        merge(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
