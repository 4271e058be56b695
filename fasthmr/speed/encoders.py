"""What encoders cost and how fast they are, measured in turn: those of checkpoints, or random weights."""

from __future__ import annotations

import copy

import torch
from rich.console import Console
from rich.table import Table

from fasthmr.checkpoint import load_encoder
from fasthmr.cost import encoder_cost, frames_per_second, merging_share
from fasthmr.merging import LayerMergePlan, TokenMerging
from fasthmr.models.hmr import HMR, HMRConfig
from fasthmr.precision import IN_WORDS, PrecisionChoice, chosen_precision
from fasthmr.report import readable, short_names

SIZES = {"hmr2": HMRConfig.hmr2(), "tiny": HMRConfig.tiny()}


def print_encoders(
    checkpoints: list[str],
    size: str,
    merged: int,
    batches: list[int],
    rounds: int,
    choice: PrecisionChoice = "auto",
    compiled: bool = False,
) -> None:
    """Print cost and speed of encoders: those of checkpoints, or one of a size with random weights in three versions.

    The TFLOP/s that are reached count every matrix product twice, for its multiplications and its additions.

    Raises:
        ValueError: a checkpoint or size that cannot be.
    """
    for name, values in (("--batch", batches), ("--rounds", [rounds])):
        if min(values) < 1:
            raise ValueError(f"{name} must be 1 or more, got {min(values)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if checkpoints:
        named = zip(short_names(checkpoints), checkpoints, strict=True)
        encoders = {name: load_encoder(path).to(device) for name, path in named}
    else:
        encoders = {name: hmr.to(device) for name, hmr in three_versions(SIZES[size], merged).items()}
    precision = chosen_precision(choice, device)
    how = f"{IN_WORDS[precision]}, {'compiled' if compiled else 'eager'}, {device}, {torch.get_num_threads()} threads"
    table = Table(title=f"{how}, medians of {rounds} measured in turn")
    names = ["encoder", "layers", "tokens", "params M", "MACs G (thop)", "MACs G (all)"]
    for batch in batches:
        names += [f"frames/s, batch {batch}", f"TFLOP/s, batch {batch}"]
    for name in names:
        table.add_column(name, justify="left" if name == "encoder" else "right")
    speeds = [frames_per_second(encoders, batch, rounds, precision, compiled) for batch in batches]
    first = next(iter(encoders))
    for name, hmr in encoders.items():
        cost = encoder_cost(hmr.config, hmr.merge_plan)
        numbers = [readable(cost.params / 1e6), readable(cost.macs_thop / 1e9), readable(cost.macs_all / 1e9)]
        for speed in speeds:
            numbers += [f"{speed[name]:.2f} ({speed[name] / speed[first]:.2f} x)"]
            numbers += [readable(2 * cost.macs_all * speed[name] / 1e12)]
        table.add_row(name, str(cost.layers), str(cost.tokens), *numbers)
    Console(width=100 + 40 * len(batches)).print(table)
    for name, hmr in encoders.items():
        if hmr.config.token_merging is not None:
            shares = (
                f"{merging_share(hmr, batch, rounds, precision, compiled):.1%} at batch {batch}" for batch in batches
            )
            print(f"{name}: of the first layer's time, choosing and merging tokens takes {', '.join(shares)}")


def three_versions(config: HMRConfig, merged: int) -> dict[str, HMR]:
    """An encoder as it is, with `merged` layers less, and with Mask-ToMe besides; random weights."""
    depth = config.vit_depth
    if not 0 < merged < depth:
        raise ValueError(f"--merged must be 1 to {depth - 1} of the {depth} layers, got {merged}")
    whole = HMR(config).eval()
    fewer = copy.deepcopy(whole)
    fewer.merge_layers(LayerMergePlan(depth).merged(depth - 1 - merged, depth - 1))
    fewest = copy.deepcopy(fewer)
    fewest.set_token_merging(TokenMerging())
    return {"baseline": whole, f"{depth - merged} layers": fewer, f"{depth - merged} layers, Mask-ToMe": fewest}
