"""Make a trained encoder cheaper within an error budget: `python -m fasthmr.merge CHECKPOINT --data SHARDS --tau 0.1`.

    python -m fasthmr.merge best.ckpt --data data/val --tau 0.1
    python -m fasthmr.merge best.ckpt --data data/val --tau 0.3 --keep_tokens 90       and Mask-ToMe in the result
    python -m fasthmr.merge best.ckpt --data data/val --plan plan.json                 a plan of your own, no search

ECLM (FastHMR, Alg. 1) walks from the last layer to the first and merges neighbours as long as the MPJPE on
calibration frames grows by less than `tau` mm. It writes OUT.ckpt (the merged encoder), OUT.json and OUT.png (what was
tried, errors, similarity of layers, cost, speed before and after). Interrupted, the same command goes on: what was
evaluated is in OUT.search.json. With torchrun, processes share the clips.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fasthmr.body import load_body, require_same_body
from fasthmr.calibration import CalibrationSet, PlanErrors, RememberedErrors
from fasthmr.checkpoint import load_encoder, read_header, save_encoder
from fasthmr.cost import encoder_cost, frames_per_second
from fasthmr.files import write_text
from fasthmr.merging import LayerMergePlan, SearchStep, TokenMerging, search_layer_merges
from fasthmr.merging.similarity import linear_cka
from fasthmr.models.hmr import HMR
from fasthmr.report import draw_merge_report


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m fasthmr.merge", description=__doc__)
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
    parser.add_argument("--precision", type=str, default="bf16", help="bf16 or 32")
    parser.add_argument("--keep_tokens", type=int | None, default=None, help="Mask-ToMe in the result: tokens left")
    parser.add_argument("--per_layer", type=int, default=40, help="tokens merged in a layer")
    parser.add_argument("--mask", type=str, default="given", help="protect the tokens of `given` masks, or `none`")
    parser.add_argument("--batch", type=int, default=8, help="frames at a time when speed is measured")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda; the best there is if not given")
    return parser


def merge(options: Namespace) -> dict[str, Any]:
    """Do what the command line says; returns the report.

    Raises:
        ValueError: bad input; nothing was written.
        OSError: a file cannot be read or written.
    """
    rank, world_size = _process()
    path = Path(options.checkpoint)
    out = Path(options.out) if options.out is not None else path.with_name(f"{path.stem}-merged")
    header = read_header(path)
    body = load_body(options.body)
    require_same_body(body.id, header.body, where=str(path))
    if not options.tau >= 0:
        raise ValueError(f"--tau must be 0 mm or more, got {options.tau}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    hmr = load_encoder(path).to(device)
    body = body.to(device)
    depth = len(hmr.backbone.blocks)
    tokens = hmr.config.token_merging
    if options.keep_tokens is not None:
        tokens = TokenMerging(keep_tokens=options.keep_tokens, per_layer=options.per_layer, mask=options.mask)
        tokens.schedule(hmr.backbone.num_tokens, depth)
    given = None
    if options.plan is not None:
        given = LayerMergePlan.from_json(Path(options.plan).read_text())
        hmr.merge_plan.then(given)  # refuses another depth before anything is computed

    frames = CalibrationSet.read(options.data, body.id, options.frames_per_clip, options.max_clips, rank, world_size)
    errors = PlanErrors(hmr, body, frames, options.protocol, options.cache_gb, options.precision)
    remembered = RememberedErrors(
        errors,
        out.with_name(out.name + f".search{'' if rank == 0 else rank}.json"),
        _fingerprint(path, frames, options),
    )
    steps: list[SearchStep] = []
    start = time.perf_counter()
    with tqdm(total=depth, unit="plan", desc="searching", disable=rank != 0) as bar:
        found = _search(given, depth, remembered, options, _watch(bar, steps))
    seconds = time.perf_counter() - start
    plan = hmr.merge_plan.then(found)
    merged = _merged(hmr, plan, tokens)  # refuses too few layers
    last = PlanErrors(merged, body, frames, options.protocol, 0.0, options.precision)(
        LayerMergePlan(len(merged.backbone.blocks))
    )
    report: dict[str, Any] = {
        "checkpoint": str(path),
        "data": options.data,
        "calibration_frames": frames.frames,
        "protocol": options.protocol,
        "tau_mm": options.tau,
        "plan": plan.as_dict(),
        "group_sizes": list(plan.group_sizes),
        "token_merging": None if tokens is None else vars(tokens),
        "base_mpjpe_mm": remembered(LayerMergePlan(depth)),
        "layers_merged_mpjpe_mm": remembered(found),
        "final_mpjpe_mm": last,
        "steps": [{"groups": list(s.plan.group_sizes), "mpjpe_mm": s.error_mm, "accepted": s.accepted} for s in steps],
        "search": {"evaluations": len(steps), "seconds": seconds, "layers_kept": errors.kept},
        "commits": _commits(found, remembered),
        "cka": linear_cka(errors.token_features()).tolist(),
        "cost": {
            "before": encoder_cost(hmr.config, hmr.merge_plan).as_dict(),
            "after": encoder_cost(merged.config, plan).as_dict(),
        },
    }
    if rank == 0:
        speed = frames_per_second({"before": hmr, "after": merged}, options.batch)
        report["frames_per_s"] = {"batch": options.batch, "device": device, "threads": torch.get_num_threads(), **speed}
        out.parent.mkdir(parents=True, exist_ok=True)
        save_encoder(out.with_name(out.name + ".ckpt"), merged, body.id)
        write_text(out.with_name(out.name + ".json"), json.dumps(report, indent=1))
        draw_merge_report(report, out.with_name(out.name + ".png"))
        remembered.file.unlink(missing_ok=True)
        _print(report, out)
    elif remembered.file.exists():
        remembered.file.unlink()
    return report


def _search(
    given: LayerMergePlan | None,
    depth: int,
    errors: Callable[[LayerMergePlan], float],
    options: Namespace,
    on_step: Callable[[SearchStep], None],
) -> LayerMergePlan:
    if given is None:
        return search_layer_merges(depth, errors, options.tau, options.commit_last_window, on_step)
    base = errors(LayerMergePlan(depth))
    for count in range(1, len(given.events) + 1):
        prefix = LayerMergePlan(depth, given.events[:count])
        on_step(SearchStep(prefix, errors(prefix), base, True, prefix))
    return given


def _watch(bar: tqdm, steps: list[SearchStep]) -> Callable[[SearchStep], None]:
    def on_step(step: SearchStep) -> None:
        steps.append(step)
        verdict = "base" if not step.plan.events else "accepted" if step.accepted else "refused"
        bar.write(f"{step.error_mm:9.3f} mm  {step.error_mm - step.base_mm:+8.3f}  {verdict:8}  {step.plan}")
        bar.update()

    return on_step


def _commits(plan: LayerMergePlan, errors: Callable[[LayerMergePlan], float]) -> list[dict[str, Any]]:
    """Every event of a plan with the error before and after it; all of them were evaluated already."""
    prefixes = [LayerMergePlan(plan.depth, plan.events[:count]) for count in range(len(plan.events) + 1)]
    return [
        {"keep": event.keep, "drop": list(event.drop), "before_mm": errors(before), "after_mm": errors(after)}
        for event, before, after in zip(plan.events, prefixes, prefixes[1:], strict=False)
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


def _fingerprint(checkpoint: Path, frames: CalibrationSet, options: Namespace) -> str:
    digest = hashlib.sha256(json.dumps([frames.id, options.protocol, options.precision]).encode())
    with checkpoint.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()[:16]


def _process() -> tuple[int, int]:
    """(rank, world size), joining the others if torchrun started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _print(report: dict[str, Any], out: Path) -> None:
    before, after, speed = report["cost"]["before"], report["cost"]["after"], report["frames_per_s"]
    table = Table(title=f"layers {LayerMergePlan.from_dict(report['plan'])}", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("MPJPE, mm", f"{report['base_mpjpe_mm']:.2f}", f"{report['final_mpjpe_mm']:.2f}")
    table.add_row("layers", str(before["layers"]), str(after["layers"]))
    table.add_row("tokens", str(before["tokens"]), str(after["tokens"]))
    table.add_row("parameters, M", f"{before['params'] / 1e6:.2f}", f"{after['params'] / 1e6:.2f}")
    table.add_row("multiply-adds, G (thop)", f"{before['macs_thop'] / 1e9:.2f}", f"{after['macs_thop'] / 1e9:.2f}")
    table.add_row("multiply-adds, G (all)", f"{before['macs_all'] / 1e9:.2f}", f"{after['macs_all'] / 1e9:.2f}")
    table.add_row(
        f"frames/s, batch {speed['batch']}, {speed['device']}", f"{speed['before']:.1f}", f"{speed['after']:.1f}"
    )
    Console().print(table)
    search = report["search"]
    rate = search["evaluations"] / max(search["seconds"], 1e-9)
    print(f"{search['evaluations']} plans on {report['calibration_frames']} frames, {rate:.2f} plans/s")
    print(f"written: {out}.ckpt {out}.json {out}.png")


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
