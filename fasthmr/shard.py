"""Make, convert, look at and verify shards of clips: `python -m fasthmr.shard make|convert|masks|inspect|verify`.

    python -m fasthmr.shard make --out data/walkers --clips 200 --seed 7
    python -m fasthmr.shard make --out data/mocap --clips 500 --motion PATH --backgrounds PHOTOS --workers 8
    python -m fasthmr.shard convert threedpw --root /data/3DPW --out data/3dpw_test --split test --dry_run
    python -m fasthmr.shard convert amass --root /data/AMASS --out data/amass
    python -m fasthmr.shard masks data/3dpw_train --out data/3dpw_masked --by folder --source MASKS
    python -m fasthmr.shard inspect data/walkers --show sheet.png
    python -m fasthmr.shard verify data/walkers

`make` and `convert` can be stopped and run again: finished shards are kept. `verify` ends with code 1 if anything is
wrong. docs/convert.md says what to download for `convert`, and what is kept of it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from fasthmr.body import BodyModel, load_body
from fasthmr.cli import HelpFormatter
from fasthmr.data.convert import SETS, amass
from fasthmr.data.convert.reading import ConvertError
from fasthmr.data.convert.source import (
    MISSING,
    REPORT,
    ConvertedSource,
    ForeignSet,
    Plan,
    Report,
    check,
    plan,
    unusable_pictures,
    written_report,
)
from fasthmr.data.convert.track import OFF, Crops
from fasthmr.data.masks import MaskedSource, frames_without_person, load_segmenter
from fasthmr.data.schema import MAX_IMAGE_PX, MIN_CROP_PX, Clip, Gender
from fasthmr.data.shards import ClipStore, Dropped, verify_shards, write_part, write_shards
from fasthmr.data.sheet import contact_sheet
from fasthmr.data.synth.amass import MotionFolder
from fasthmr.data.synth.motion import MotionError
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.files import write_png, write_text

#: clips in a contact sheet
_SHEET_CLIPS = 8
#: options of `convert` that mean nothing where there are no pictures
_OF_PICTURES = ("split", "body", "body_male", "body_female", "frames", "crop_px", "max_missing", "sheet")


def build_parser() -> ArgumentParser:
    """The command line; the options of `make` are the fields of `SynthConfig`."""
    make = ArgumentParser(description="Film synthetic people, or any motion of AMASS's format, and write shards.")
    make.add_argument("--out", type=str, required=True, help="folder of the set")
    make.add_argument("--body", type=str, default="free", help="`free`, or a body file in SMPL's format")
    make.add_argument("--clips_per_shard", type=int, default=16, help="what a killed writer loses at most")
    make.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    make.add_argument("--part", type=str, default="1/1", help="i/n: job i of n on a cluster; all write into --out")
    make.add_class_arguments(SynthConfig)
    masks = ArgumentParser(
        description="Write a set anew with person masks, where it has none. yolo is ultralytics' (AGPL-3.0: who ships "
        "or serves a program with it must open its source), rfdetr is Roboflow's (Apache-2.0); neither is installed "
        "by default.",
    )
    masks.add_argument("folder", type=str, help="the set")
    masks.add_argument("--out", type=str, required=True, help="folder of the new set")
    masks.add_argument("--by", choices=["folder", "yolo", "rfdetr"], required=True, help="who makes the masks")
    masks.add_argument("--source", type=str, default="", help="the folder of masks KEY/00000.png, or the weights")
    masks.add_argument("--clips_per_shard", type=int, default=16, help="what a killed writer loses at most")
    masks.add_argument("--workers", type=int, default=1, help="processes; each loads the network")
    inspect = ArgumentParser(description="Say what a set holds.")
    inspect.add_argument("folder", type=str)
    inspect.add_argument("--show", type=str, help="write a contact sheet to this PNG file")
    inspect.add_argument("--clips", type=int, default=8, help="clips listed and shown, spread over the set")
    verify = ArgumentParser(description="Compare all checksums, decode all images, check all labels.")
    verify.add_argument("folder", type=str)
    parser = ArgumentParser(prog="python -m fasthmr.shard", description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subcommands()
    commands.add_subcommand("make", make)
    commands.add_subcommand("convert", _convert_parser())
    commands.add_subcommand("masks", masks)
    commands.add_subcommand("inspect", inspect)
    commands.add_subcommand("verify", verify)
    return parser


def _convert_parser() -> ArgumentParser:
    convert = ArgumentParser(
        description="Convert a data set, as its makers distribute it, to shards. Nothing is downloaded.",
    )
    convert.add_argument("name", choices=[*SETS, "amass"], help="which set")
    convert.add_argument("--root", type=str, required=True, help="where it lies, as docs/convert.md shows")
    convert.add_argument("--out", type=str, required=True, help="folder of the set of shards; of packs for amass")
    splits = "; ".join(f"{name}: {', '.join(made.splits)}" for name, made in SETS.items() if len(made.splits) > 1)
    convert.add_argument(
        "--split", type=str, help=f"which part of the set, or which kind of labels, by default the first ({splits})"
    )
    convert.add_argument("--body", type=str, default="free", help="the neutral body: a body file in SMPL's format")
    convert.add_argument("--body_male", type=str, help="the male body, for sets whose labels are gendered")
    convert.add_argument("--body_female", type=str, help="the female body")
    convert.add_argument(
        "--frames", type=int, help="of the longest clip, 0 for whole tracks; default: as docs/convert.md says"
    )
    convert.add_argument("--crop_px", type=int, default=384, help="side of the stored crops")
    convert.add_argument("--clips_per_shard", type=int, default=16, help="what a killed conversion loses at most")
    convert.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    convert.add_argument("--part", type=str, default="1/1", help="i/n: job i of n on a cluster; all write into --out")
    convert.add_argument("--max_missing", type=float, default=0.01, help="share of pictures that may be missing")
    convert.add_argument(
        "--max_unusable", type=float, default=0.01, help="share of tracks, or pictures, that may be bad"
    )
    convert.add_argument("--dry_run", "--dry-run", action="store_true", help="only count, and estimate the time")
    convert.add_argument("--sheet", type=str, help="contact sheet, PNG; default sheet.png in --out, none on a dry run")
    return convert


def make_set(options: Namespace) -> int:
    """Write a set."""
    fields = SynthConfig.__dataclass_fields__
    source = SynthSource(SynthConfig(**{name: options[name] for name in fields}), load_body(options.body))
    manifest = write_part(source, options.out, *_part(options.part), options.clips_per_shard, options.workers)
    if manifest is None:
        print(f"{options.out}: part {options.part} is written, others are missing")
        return 0
    counts = f"{manifest.clips} clips, {manifest.frames} frames, {len(manifest.shards)} shards"
    print(f"{options.out}: {counts}, body {manifest.body}")
    return 0


def convert_set(options: Namespace) -> int:
    """Convert a set, or one job's part of it."""
    part, parts = _part(options.part)
    _check_values(options)
    if options.name == "amass":
        return _pack_amass(options, part, parts)
    made = SETS[options.name]
    foreign = made(Path(options.root), options.split or made.splits[0])
    check(foreign)
    print(f"{foreign.title}, {foreign.split}. {foreign.licence}")
    longest = foreign.longest if options.frames is None else options.frames
    clips = plan(foreign, foreign.units(), longest, options.workers, progress=True)
    for line in clips.report.lines():
        print(line)
    _require_most(clips, options.max_missing, options.max_unusable)
    bodies = _bodies(options, foreign, clips)
    out, most = Path(options.out), options.max_unusable
    unusable = [] if options.dry_run else unusable_pictures(out)  # a dry run does not look into OUT
    source = ConvertedSource(foreign, clips, bodies, Crops(options.crop_px), most, unusable)
    if options.dry_run:
        return _dry_run(options, source, bodies, clips.report.frames)
    manifest = write_part(source, out, part, parts, options.clips_per_shard, options.workers)
    if manifest is None:
        print(f"part {part} of {parts} is finished; the set is ready when all parts are")
        return 0
    report = written_report(clips.report, out, manifest)
    write_text(out / REPORT, report.to_json())
    for line in report.lines():
        print(line)
    if not manifest.clips:
        raise ConvertError(f"no clip could be made: {out / REPORT} says why")
    report.require_usable(most, clips.report.frames)
    store = ClipStore(out)
    chosen = np.unique(np.linspace(0, len(store) - 1, _SHEET_CLIPS).astype(int))
    _write_sheet(Path(options.sheet or out / "sheet.png"), [store[int(i)] for i in chosen], bodies)
    print(f"{out}: {manifest.clips} clips, {manifest.frames} frames, {len(manifest.shards)} shards")
    return 0


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConvertError(f"--part must be i/n with i from 1 to n, such as 3/16, got {text!r}")
    return int(found[1]), int(found[2])


def _check_values(options: Namespace) -> None:
    """Refuse numbers that cannot be, before any label is read."""
    if not MIN_CROP_PX <= options.crop_px <= MAX_IMAGE_PX:
        raise ConvertError(f"--crop_px must be {MIN_CROP_PX} to {MAX_IMAGE_PX}, got {options.crop_px}")
    for name, least in (("frames", 0), ("workers", 1), ("clips_per_shard", 1)):
        if options[name] is not None and options[name] < least:
            raise ConvertError(f"--{name} must be {least} or more, got {options[name]} (docs/convert.md)")
    for name in ("max_missing", "max_unusable"):
        if not 0 <= options[name] <= 1:
            raise ConvertError(f"--{name} must be a share from 0 to 1, such as 0.01, got {options[name]}")


def _require_most(clips: Plan, max_missing: float, max_unusable: float) -> None:
    """Refuse a download of which too much cannot be converted."""
    report = clips.report
    report.require_usable(max_unusable)
    missing = report.dropped[MISSING]
    if missing > max_missing * (total := missing + report.frames):
        raise ConvertError(
            f"{missing} of {total} pictures are missing ({report.names(MISSING)}): complete the download, or allow it "
            "with --max_missing"
        )
    if not clips.pieces:
        raise ConvertError("there is nothing to convert: no track has a picture")


def _bodies(options: Namespace, foreign: ForeignSet, clips: Plan) -> dict[Gender, BodyModel]:
    paths: dict[Gender, str | None] = {
        "neutral": options.body, "male": options.body_male, "female": options.body_female,
    }  # fmt: skip
    lacking = [f"--body_{gender}" for gender in clips.genders if paths[gender] is None]
    if lacking:
        raise ConvertError(
            f"{foreign.title} has labels of gendered bodies: give {' and '.join(lacking)} (SMPL_MALE.pkl, "
            "SMPL_FEMALE.pkl, from https://smpl.is.tue.mpg.de)"
        )
    wanted: set[Gender] = {"neutral", *clips.genders}
    return {gender: load_body(path) for gender, path in paths.items() if path is not None and gender in wanted}


def _dry_run(options: Namespace, source: ConvertedSource, bodies: dict[Gender, BodyModel], frames: int) -> int:
    seconds, tried = source.seconds()
    workers = max(1, options.workers)
    rate = f"{frames / seconds:.0f} frames/s"
    print(f"it will take about {seconds:.0f} s on one core ({rate}), {seconds / workers:.0f} s with {workers} workers")
    for left_out in (made.why for made in tried if isinstance(made, Dropped)):
        print(left_out if OFF.match(left_out) else f"left out: {left_out}")
    if options.sheet and (clips := [made for made in tried if isinstance(made, Clip)]):
        _write_sheet(Path(options.sheet), clips, bodies)
    print("nothing was written into " + options.out)
    return 0


def _write_sheet(path: Path, clips: list[Clip], bodies: dict[Gender, BodyModel]) -> None:
    write_png(path, contact_sheet(clips, bodies={str(gender): body for gender, body in bodies.items()}))
    print(f"contact sheet written to {path}: look whether the meshes fit")


def _pack_amass(options: Namespace, part: int, parts: int) -> int:
    """Pack AMASS's motions, or one job's subsets of them."""
    defaults = _convert_parser().get_defaults()
    if given := [f"--{name}" for name in _OF_PICTURES if options[name] != defaults[name]]:
        raise ConvertError(f"amass has no pictures, so {', '.join(given)} would do nothing: leave that away")
    root, out = Path(options.root), Path(options.out)
    subsets = amass.find_subsets(root)[part - 1 :: parts]
    print(f"AMASS. {amass.LICENCE}")
    if not subsets:
        print(f"there are fewer subsets than parts: part {part} of {parts} has nothing to do")
        return 0
    if options.dry_run:
        files = [file for subset in subsets for file in subset.files]
        frames = sum(map(_motion_frames, files))
        print(f"{len(subsets)} subsets, {len(files)} files, {frames} frames at {amass.FPS:g} fps")
        print(f"it will take about {amass.seconds(subsets):.0f} s on one core")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    total = Report()
    for subset in subsets:
        total.add(amass.pack(root, subset, out / f"{subset.name}.npz", options.workers, options.max_unusable))
    for line in total.lines():
        print(line)
    told = out / (REPORT if parts == 1 else f"report-{part}-of-{parts}.json")
    write_text(told, total.to_json())
    if not total.clips:
        raise ConvertError(f"no motion could be packed: {told} says why")
    print(f"{out}: {total.clips} motions, {total.frames / amass.FPS / 3600:.2f} hours; use it with --motion {out}")
    return 0


def _motion_frames(path: Path) -> int:
    """Frames that a file of AMASS will have in a pack, as its headers say; 0 if they are damaged or it is short."""
    try:
        return MotionFolder(path).num_windows(1, amass.FPS)
    except (MotionError, zlib.error):
        return 0


def mask_set(options: Namespace) -> int:
    """Write a set anew with masks."""
    source = MaskedSource(options.folder, load_segmenter(options.by, options.source))
    manifest = write_shards(source, options.out, options.clips_per_shard, options.workers)
    print(f"{options.out}: {manifest.clips} clips with masks by {options.by}")
    print(f"the person was not found in {frames_without_person(options.out)} of {manifest.frames} frames")
    return 0


def inspect_set(options: Namespace) -> int:
    """Print what a set holds, and draw its contact sheet."""
    store = ClipStore(options.folder)
    manifest = store.manifest
    size = sum(tar.stat().st_size for tar in store.shards)
    counts = f"{manifest.clips} clips, {manifest.frames} frames, {len(store.shards)} shards"
    print(f"{options.folder}: {counts}, {size / 1e6:.1f} MB")
    print(f"schema version {manifest.schema_version}, body {manifest.body}")
    told = {name: textwrap.shorten(str(value), 80, placeholder=" ...") for name, value in manifest.source.items()}
    print("made from " + ", ".join(f"{name}={value}" for name, value in told.items()))
    table = Table()
    for name in ("clip", "source", "frames", "fps", "image", "kB", "not ground truth"):
        table.add_column(name, no_wrap=name == "clip", overflow="fold")  # keys are for copying
    shown = [store[int(i)] for i in np.linspace(0, len(store) - 1, min(options.clips, len(store)))]
    for clip in shown:
        kilobytes = (len(clip.frames.data) + len(clip.masks.data)) / 1000
        other = ", ".join(f"{k}: {v}" for k, v in clip.status.items() if v != "ground_truth") or "-"
        width, height = clip.image_size
        table.add_row(
            clip.key, clip.source, str(len(clip)), f"{clip.fps:g}", f"{width}x{height}", f"{kilobytes:.0f}", other
        )
    Console().print(table)
    if options.show:
        write_png(Path(options.show), contact_sheet(shown))
        print(f"contact sheet written to {options.show}")
    return 0


def verify_set(options: Namespace) -> int:
    """Print every problem of a set; 1 if there is any."""
    problems = verify_shards(options.folder, progress=True)
    for problem in problems:
        print(problem)
    print(f"{options.folder}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}")
    return 1 if problems else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; user errors end in one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s")
    options = build_parser().parse_args(arguments)
    commands = {
        "make": make_set,
        "convert": convert_set,
        "masks": mask_set,
        "inspect": inspect_set,
        "verify": verify_set,
    }
    command = commands[options.subcommand]
    try:
        return command(options[options.subcommand])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished shards are kept, run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
