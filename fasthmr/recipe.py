"""Train in stages: a recipe is a file that names them, each a config of its own, in the order in which they run.

    name: fasthmr                         # stages run in runs/<name>/<stage>
    all: {motion: data/mocap}             # keys that every stage gets
    stages:
      small:
        config: encoder_tiny.yaml         # a one-stage file, relative to the recipe
        trainer: {max_epochs: 20}         # keys of this stage only
      tuned:
        config: encoder_tiny.yaml
        model: {init_args: {init_from: stage:small}}

The value `stage:small` stands for the best checkpoint that the earlier stage `small` ended with. It is never a path: a
file of such a name is written `./stage:small`.

On the command line, `--motion PATH` sets a key of every stage, `--tuned.trainer.max_epochs 2` one of a single stage.
The command line wins over the recipe, and in each of them a stage's own key over one for every stage.

A finished stage is skipped, an interrupted one goes on where it was, `--stage small` runs one. A stage remembers what
was in the checkpoints that it was given: once one of them has changed, it is neither skipped nor resumed, but named.

Stages may differ in how many processes they train on. Where the processes are there before (srun, torchrun), a stage
runs on all of them or, with `trainer: {devices: 1, num_nodes: 1}`, on the first, for which the others wait.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import re
import textwrap
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from fasthmr import stopping
from fasthmr.checkpoint import HEADER_KEY, read_checkpoint
from fasthmr.cli import UsageError, flatten, refuse_double_keys
from fasthmr.files import write_text
from fasthmr.processes import Process, stage_of_its_own
from fasthmr.resume import LAST_CHECKPOINT, ONLY_WATCH, matches

log = logging.getLogger(__name__)

DONE_FILE = "done.json"  # written when a stage has finished: its metrics, and the config and checkpoints that gave them
INPUTS_FILE = "inputs.json"  # written when a stage starts: the checkpoints of earlier stages that it is given
REFERENCE = "stage:"

#: keys of a stage that the recipe itself sets, and what to do instead
_OWN_KEYS = {
    "run_dir": "stages run in runs/NAME/STAGE, so choose another --name",
    "ckpt_path": "an interrupted stage goes on by itself",
}
#: keys of a stage that are not its command's
_STAGE_KEYS = ("config", "command")
#: would read like a key of every stage
_NO_STAGE_NAMES = ("all", "model", "data", "trainer")
#: seconds between two looks at whether another process has finished a stage, and between two lines about it
_LOOK_S, _TELL_S = 1.0, 300.0


@dataclass(frozen=True)
class StageResult:
    """What a stage ended with.

    Args:
        run_dir: where it wrote.
        metrics: of its checkpoint, or, with `validated_step`, of the last validation.
        checkpoint: the best, else the last one; "" if it has none.
        protocol: how the metrics were taken, in one line; "" where it has no protocol.
        resumed: it went on from an earlier run.
        skipped: it had finished before.
        validated_step: optimiser step of the last validation, if that was not of the checkpoint.
    """

    run_dir: Path
    metrics: dict[str, float]
    checkpoint: str
    protocol: str = ""
    resumed: bool = False
    skipped: bool = False
    validated_step: int | None = None


@dataclass(frozen=True)
class Artefact:
    """A checkpoint that a stage is given: the stage's keys whose value it is, its path, the hash of its content."""

    keys: list[str]
    checkpoint: str
    sha256: str


class Command(Protocol):
    """A kind of stage. Making one from its arguments checks them, and runs nothing."""

    @property
    def resolved(self) -> str:
        """The config as YAML, all files, overrides and interpolations applied."""

    def completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config of this kind, with the default of each key that it lacks; UsageError if it has one too many."""

    @property
    def alone(self) -> bool:
        """It runs on the first process of a job, whatever others there are."""

    def run(self, *, resume: bool) -> StageResult:
        """Run to the end; with `resume`, go on from where an earlier run stopped."""


#: kinds of stages by name, e.g. "fit"; each takes command-line arguments and raises UsageError if they are wrong
Commands = Mapping[str, Callable[[Sequence[str]], Command]]


# ---- what a recipe says --------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: its name in the recipe.
        command: which kind of stage it is.
        run_dir: folder that it writes to.
        config: file that it runs.
        layers: nested keys on top of the file; later ones win.
        options: keys and values of the command line, on top of the layers; a value may be left out.
    """

    name: str
    command: str
    run_dir: Path
    config: Path
    layers: list[dict[str, Any]]
    options: list[tuple[str, str | None]]

    @property
    def keys(self) -> dict[str, Any]:
        """What is set on top of the file: values by dotted key."""
        merged: dict[str, Any] = {}
        for layer in self.layers:
            merged |= flatten(layer)
        return merged | dict(self.options)

    @property
    def references(self) -> dict[str, list[str]]:
        """For each stage whose checkpoint is asked for, the keys that ask for it."""
        found: dict[str, list[str]] = {}
        for key, value in self.keys.items():
            for source in _references(value):
                found.setdefault(source, []).append(key)
        return found

    def arguments(self, checkpoints: Mapping[str, str]) -> list[str]:
        """What its command gets; references to the stages of `checkpoints` are replaced by paths."""
        arguments = ["-c", str(self.config), f"--run_dir={self.run_dir}"]
        for layer in self.layers:
            arguments += ["-c", yaml.safe_dump(_replaced(layer, checkpoints), sort_keys=False)]
        for key, value in self.options:
            arguments.append(f"--{key}" if value is None else f"--{key}={_replaced(value, checkpoints)}")
        return arguments


@dataclass(frozen=True)
class Recipe:
    """Stages by name, in order; `only`: the one to run, None for all. With `print_config` none is to run."""

    name: str
    stages: dict[str, Stage]
    only: str | None
    print_config: bool

    @property
    def to_run(self) -> list[Stage]:
        return [stage for stage in self.stages.values() if self.only in (None, stage.name)]


def load_recipe(files: Sequence[str], rest: Sequence[str]) -> Recipe | None:
    """Read a recipe and its overrides; None if no file names stages (then it is a one-stage config).

    With `--help` among the arguments it prints help and leaves.

    Args:
        files: config files; keys of later ones win.
        rest: the other command-line arguments.

    Raises:
        UsageError: a file is missing, is no YAML or has an unknown key; a stage has no config, a name that cannot be
            one, or asks for the checkpoint of a stage that is not before it; an argument belongs nowhere.
    """
    contents = [(Path(file), _read(file)) for file in files]
    if not any("stages" in content for _, content in contents):
        return None
    name = contents[0][0].stem
    shared: list[dict[str, Any]] = []
    own: dict[str, list[dict[str, Any]]] = {}
    for file, content in contents:
        if unknown := sorted(set(content) - {"name", "all", "stages"}):
            raise UsageError(
                f"unknown key {unknown[0]!r} in recipe {file}; it may have: name, all, stages "
                "(keys of every stage stand under `all`)"
            )
        name = content.get("name", name)
        shared.append(_mapping(content.get("all", {}), f"`all` in recipe {file}"))
        for stage, keys in _mapping(content.get("stages", {}), f"`stages` in recipe {file}").items():
            layer = dict(_mapping(keys, f"stage {stage!r} in recipe {file}"))
            if "config" in layer:
                layer["config"] = file.parent / layer["config"]
            own.setdefault(stage, []).append(layer)

    parser = _parser(name)
    options, extra = parser.parse_known_args(rest)
    overrides = _overrides(extra, own)
    stages = {}
    for stage, layers in own.items():
        ours = {key: value for layer in layers for key, value in layer.items() if key in _STAGE_KEYS}
        if "config" not in ours:
            raise UsageError(f"stage {stage!r} needs the key `config`, the file that it runs")
        stages[stage] = Stage(
            name=stage,
            command=ours.get("command", "fit"),
            run_dir=Path("runs", options.name, stage),
            config=ours["config"],
            layers=[*shared, *({k: v for k, v in layer.items() if k not in _STAGE_KEYS} for layer in layers)],
            options=[*overrides[None], *overrides[stage]],
        )
    recipe = Recipe(options.name, stages, options.stage, options.print_config)
    _check(recipe)
    if options.help:
        parser.epilog = _stage_list(recipe)
        parser.print_help()
        raise SystemExit(0)
    return recipe


def _read(file: str) -> dict[str, Any]:
    try:
        refuse_double_keys(text := Path(file).read_text(), file)
        return _mapping(yaml.safe_load(text), f"config {file}")
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read config {file}: {error}") from error


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{what} must be a mapping of keys, got {type(value).__name__}")
    return value


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fasthmr.fit",
        usage="%(prog)s -c RECIPE [-c MORE] [--name NAME] [--stage STAGE] [--KEY VALUE] [--STAGE.KEY VALUE] ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--name", default=name, help="stages run in runs/NAME/STAGE (default: %(default)s)")
    parser.add_argument("--stage", help="run only this stage")
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved config of each stage, and leave"
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this, and leave")
    return parser


def _stage_list(recipe: Recipe) -> str:
    lines = [f"stages of {recipe.name}, in this order:"]
    for stage in recipe.stages.values():
        given = "".join(f", given the checkpoint of {source}" for source in stage.references)
        lines.append(f"  {stage.name}: {stage.config}, in {stage.run_dir}{given}")
    config = next(iter(recipe.stages.values())).config
    return "\n".join(
        [*lines, "", f"The keys of a stage are those of its file: python -m fasthmr.fit -c {config} --help"]
    )


def _overrides(arguments: Sequence[str], stages: Collection[str]) -> dict[str | None, list[tuple[str, str | None]]]:
    """Keys and values of the command line, by the stage that they are for; None: for all."""
    pairs: list[tuple[str, str | None]] = []
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, given = argument[2:].partition("=")
            pairs.append((key, given if equals else None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], argument)
        else:
            raise UsageError(f"unexpected argument {argument!r}; keys start with --")
    found: dict[str | None, list[tuple[str, str | None]]] = {stage: [] for stage in (None, *stages)}
    for key, value in pairs:
        stage, _, rest = key.partition(".")
        if stage not in stages:
            found[None].append((key, value))
        elif rest:
            found[stage].append((rest, value))
        else:
            raise UsageError(f"--{stage} is a stage and takes no value: give one of its keys, --{stage}.KEY")
    return found


def _check(recipe: Recipe) -> None:
    if recipe.only is not None and recipe.only not in recipe.stages:
        raise UsageError(f"the recipe has no stage {recipe.only!r}; it has: {', '.join(recipe.stages)}")
    earlier: list[str] = []
    for stage in recipe.stages.values():
        if stage.name in _NO_STAGE_NAMES or not re.fullmatch(r"[A-Za-z][\w-]*", stage.name):
            raise UsageError(
                f"a stage cannot be called {stage.name!r}: it takes letters, digits, - and _, "
                f"and none of the names {', '.join(_NO_STAGE_NAMES)}"
            )
        for key, instead in _OWN_KEYS.items():
            if key in stage.keys:
                raise UsageError(f"{key} cannot be set for a stage of a recipe: {instead}")
        for source, keys in stage.references.items():
            if source not in earlier:
                raise UsageError(
                    f"stage {stage.name!r}: {', '.join(keys)} asks for {REFERENCE}{source}, but there is no earlier "
                    f"stage of that name; earlier stages: {', '.join(earlier) or 'none'}"
                )
        earlier.append(stage.name)


def _references(value: Any) -> set[str]:
    """Stages that are referred to anywhere in a value."""
    if isinstance(value, dict | list):
        return set().union(*map(_references, value.values() if isinstance(value, dict) else value))
    return {value.removeprefix(REFERENCE)} if isinstance(value, str) and value.startswith(REFERENCE) else set()


def _replaced(value: Any, checkpoints: Mapping[str, str]) -> Any:
    """A value with the references in it replaced by the paths of those stages' checkpoints."""
    if isinstance(value, dict):
        return {key: _replaced(inner, checkpoints) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, checkpoints) for inner in value]
    return checkpoints.get(value.removeprefix(REFERENCE), value) if _references(value) else value


# ---- running it ----------------------------------------------------------------------------------


def run_recipe(recipe: Recipe, commands: Commands) -> dict[str, StageResult]:
    """Run the stages that are not finished, in order; results by stage.

    Raises:
        UsageError: arguments of a stage are wrong, a checkpoint that it is to be given is not there, or it has been
            run with another one or another config. All that can be known is checked before the first stage runs.
    """
    to_come = [stage.name for stage in recipe.to_run]
    for stage in recipe.to_run:
        _command(stage, commands, {})
        _artefacts(recipe, stage, {}, to_come)
    results: dict[str, StageResult] = {}
    for number, stage in enumerate(recipe.to_run, 1):
        _say(f"stage {number} of {len(recipe.to_run)}: {stage.name}")
        inputs = _artefacts(recipe, stage, results)
        command = _command(stage, commands, inputs)
        result = _finished(stage.run_dir, command)
        process = Process.this()
        if result is None and command.alone and process.rank > 0:
            result = _wait_for_first_process(stage, command)
        elif result is None:
            _write_json(stage.run_dir / INPUTS_FILE, _as_dict(inputs))
            with stage_of_its_own():
                result = command.run(resume=True)
            if process.started_by == "lightning":
                # Lightning started this process for this stage; for a later one it starts others.
                raise SystemExit(0)
            save_result(result, command, inputs)
        results[stage.name] = result
        stopping.leave_if_asked()
    return results


def _wait_for_first_process(stage: Stage, command: Command) -> StageResult:
    """The result of a stage that the first process runs alone; what ends that one ends the whole job."""
    told = -_TELL_S
    began = time.monotonic()
    while (result := _finished(stage.run_dir, command)) is None:
        waited = time.monotonic() - began
        if waited - told >= _TELL_S:
            log.info("stage %s runs on the first process; waiting for it (%.0f min)", stage.name, waited / 60)
            told = waited
        time.sleep(_LOOK_S)
    return result


def resolved_configs(recipe: Recipe, commands: Commands) -> str:
    """The resolved config of each stage to run, as YAML by the stage's name; references stay as they are."""
    texts = {stage.name: _command(stage, commands, {}).resolved for stage in recipe.to_run}
    return "".join(f"{stage}:\n{textwrap.indent(text, '  ')}" for stage, text in texts.items())


def save_result(result: StageResult, command: Command, inputs: Mapping[str, Artefact]) -> None:
    """Write down that a run has finished, with what it was made from."""
    done = {
        "config": yaml.safe_load(command.resolved),
        "metrics": result.metrics,
        "validated_step": result.validated_step,
        "checkpoint": result.checkpoint,
        "protocol": result.protocol,
        "inputs": _as_dict(inputs),
    }
    _write_json(result.run_dir / DONE_FILE, done)


def content_sha256(checkpoint: str | Path) -> str:
    """SHA-256 of what a checkpoint hands on: header and weights. Optimiser and loop states do not count.

    Raises:
        FileNotFoundError, CheckpointError: there is no such file, or it is damaged.
    """
    content = read_checkpoint(Path(checkpoint))
    digest = hashlib.sha256(json.dumps(content.get(HEADER_KEY), sort_keys=True).encode())
    for name, tensor in sorted(content["state_dict"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _command(stage: Stage, commands: Commands, inputs: Mapping[str, Artefact]) -> Command:
    if stage.command not in commands:
        raise UsageError(f"stage {stage.name!r}: command must be one of {sorted(commands)}, got {stage.command!r}")
    try:
        return commands[stage.command](stage.arguments({source: a.checkpoint for source, a in inputs.items()}))
    except UsageError as error:
        hint = f" (keys of this stage only: --{stage.name}.KEY)" if "unknown key" in str(error) else ""
        raise UsageError(f"stage {stage.name!r}: {error}{hint}") from error


def _artefacts(
    recipe: Recipe, stage: Stage, results: Mapping[str, StageResult], to_come: Collection[str] = ()
) -> dict[str, Artefact]:
    """The checkpoints that a stage is given, by the stage that made them; of those `to_come`, only if they are there.

    Raises:
        UsageError: one is missing, or is another than the stage was given when it ran.
    """
    found = {}
    for source, keys in stage.references.items():
        run_dir = recipe.stages[source].run_dir
        needs = f"stage {stage.name!r} needs the checkpoint of stage {source!r} ({', '.join(keys)})"
        # Of a stage that ran just now from memory: with several processes only the first has written the file by now.
        result = results.get(source) or _stored(run_dir)
        if result is None:
            if source in to_come:
                continue
            raise UsageError(f"{needs}, which has not finished: run it first, with --stage {source} or without --stage")
        if not Path(result.checkpoint).is_file():
            raise UsageError(
                f"{needs}, but there is no file {result.checkpoint!r}: remove {run_dir}, and run it again "
                f"with --stage {source} or without --stage"
            )
        found[source] = Artefact(keys, result.checkpoint, content_sha256(result.checkpoint))
    _require_unchanged(stage, found)
    return found


def _require_unchanged(stage: Stage, inputs: Mapping[str, Artefact]) -> None:
    """Raise UsageError if a stage has run, or begun to, with other checkpoints than these."""
    if not any((stage.run_dir / file).exists() for file in (DONE_FILE, LAST_CHECKPOINT)):
        return
    before = _read_json(stage.run_dir / INPUTS_FILE)
    for source, now in inputs.items():
        old = before[source]["sha256"] if source in before else None
        if old != now.sha256:
            change = f"sha256 {old[:12]} -> {now.sha256[:12]}" if old else "it was given none"
            raise UsageError(
                f"stage {stage.name!r} has run with another checkpoint of stage {source!r} than there is now "
                f"({', '.join(now.keys)}: {now.checkpoint}, {change}): remove {stage.run_dir} to run it anew, "
                "or give the recipe another --name"
            )


def _stored(run_dir: Path) -> StageResult | None:
    """The result of a finished run in `run_dir`."""
    if not (run_dir / DONE_FILE).exists():
        return None
    done = _read_json(run_dir / DONE_FILE)
    return StageResult(
        run_dir,
        done["metrics"],
        done["checkpoint"],
        done.get("protocol", ""),
        skipped=True,
        validated_step=done.get("validated_step"),
    )


def _finished(run_dir: Path, command: Command) -> StageResult | None:
    """The result of a finished run of the same config in `run_dir`; None when it has not finished.

    Keys that only watch a run, or say how fast it goes or on how many processes it went, may be others.

    Raises:
        UsageError: it was of another config; names what changed.
    """
    result = _stored(run_dir)
    if result is None:
        return None
    before = flatten(_read_json(run_dir / DONE_FILE)["config"])
    with suppress(UsageError):  # keys that are younger than the run had their defaults; of others it is told below
        completed = command.completed(_read_json(run_dir / DONE_FILE)["config"])
        before = flatten(json.loads(json.dumps(completed, default=str)))
    now = flatten(json.loads(json.dumps(yaml.safe_load(command.resolved), default=str)))
    # A job of another size goes on with the stages that are left.
    free = (*_OWN_KEYS, *ONLY_WATCH, "trainer.devices", "trainer.num_nodes")
    changed = [k for k in sorted({*before, *now}) if not matches(k, free) and before.get(k) != now.get(k)]
    if changed:
        shown = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in changed[:5])
        raise UsageError(
            f"{run_dir} holds a finished run of another config ({shown}): give the new one another `--name`, "
            f"or remove {run_dir}"
        )
    return result


def _as_dict(inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    return {source: dataclasses.asdict(artefact) for source, artefact in inputs.items()}


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


@rank_zero_only
def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, default=str))


@rank_zero_only
def _say(message: str) -> None:
    log.info(message)
