"""What the entry points share: a parser whose errors name the nearest key."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help with the lines of a module's description as they are, examples included."""


class UsageError(Exception):
    """The command cannot be run as given; the message says what, got, do."""


#: options whose value may be a file of keys
_OF_FILES = ("-c", "--config", "--data", "--model", "--trainer")


class FitParser(LightningArgumentParser):
    """LightningCLI's parser, with errors that name the unknown key and the nearest valid one, or one written twice."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's, after a look at the files that are named.

        Raises:
            UsageError: wrong arguments, or a key that stands twice in a file.
        """
        for word, after in pairwise([*(args or ()), ""]):
            option, equals, value = word.partition("=")
            value = value if equals else after
            if option in _OF_FILES:
                with contextlib.suppress(OSError, ValueError):  # no file, but YAML, or a folder
                    refuse_double_keys(Path(value).read_text(), value)
        return super().parse_args(args, *rest, **settings)

    def completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config with the default of each key that it lacks.

        Raises:
            UsageError: it has a key that there is not.
        """
        completed: dict[str, Any] = yaml.safe_load(self.dump(self.parse_object(config), skip_none=False))
        return completed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError instead of printing usage and leaving."""
        raise UsageError(explain(message, self))


def refuse_double_keys(text: str, file: str) -> None:
    """Refuse YAML in which a key stands twice in one mapping: of the two, YAML would silently take the last.

    Raises:
        UsageError: naming file, line and key.
    """
    try:
        nodes = [yaml.compose(text, yaml.SafeLoader)]
    except yaml.YAMLError:
        return  # whoever reads it says what is wrong
    seen: set[int] = set()  # an alias may lead back
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise UsageError(f"{file}, line {line}: {name!r} is in line {lines[name]} already: remove one")
            lines[name] = line
            nodes.append(value)


_UNKNOWN_KEY = (
    re.compile(r"unrecognized arguments: --([\w.+]+)"),
    re.compile(r"[Oo]ption '([\w.+]+)'"),
    re.compile(r"Key '([\w.+]+)'"),
)


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Shorten a parser's message about an unknown key and add the nearest valid keys."""
    if explained := re.search(r"unknown key '.*", message):
        return explained.group()  # by the parser of a part, within the message of the whole
    for pattern in _UNKNOWN_KEY:
        if found := pattern.search(message):
            key = found.group(1).rstrip("+")
            valid = valid_keys(parser)
            wrong = next((part for part in key.split(".") if part not in valid), key.rpartition(".")[2])
            near = difflib.get_close_matches(wrong, sorted(valid - {wrong}), n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; see --help or --print_config"
            return f"unknown key {key!r}{hint}"
    return innermost(message)


#: lines of a parser's dump that say nothing of the value
_FRAME = re.compile(r"(?:Parser key|Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|$)")
#: lines in which the parser itself speaks, and not a class that refused its arguments
_PARSERS = re.compile(r"(?:Expected|Not a valid subclass|Subclass types|Problem with|(?:or )?a (?:class path|dict) )")
_TYPE = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[([^]]*)\])(?:\. Got value:.*)?")


def innermost(message: str) -> str:
    """The sentence within a parser's dump of every type that a value might have had; other messages as they are."""
    if "Union subtypes" not in message:
        return message
    lines = [line.strip().removeprefix("- ").rstrip(".") for line in message.splitlines()]
    told = list(dict.fromkeys(line for line in lines if not _FRAME.match(line)))
    if refusals := [line for line in told if not _PARSERS.match(line)]:
        return "; ".join(refusals)
    types = [name or f"one of {options}" for name, options in (f.groups() for f in map(_TYPE.match, told) if f)]
    keys, given = (re.findall(pattern, message) for pattern in (r'Parser key "([^"]+)"', r"(?:Given|Got) value: (.*)"))
    if not (types and keys and given):
        return message
    return f"{keys[-1]} must be {' or '.join(types)}, got {given[0]}"


_FROM_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process.*\n(?:[\w.]+\.)?\1: (.*)", re.DOTALL)


def one_line(error: Exception) -> str:
    """What an error says, in one line: without the traceback of a loader process or the dump of a parser around it."""
    message = str(error)
    if found := _FROM_WORKER.match(message):
        message = found.group(2)
    return " ".join(innermost(message).split())


def valid_keys(parser: LightningArgumentParser) -> set[str]:
    """Parts of the dotted keys that a config may have, those of the classes it has named so far included."""
    keys = {
        "class_path",
        "init_args",
        *(part for key in vars(parser.get_defaults().as_flat()) for part in key.split(".")),
    }
    for base in (L.LightningModule, L.LightningDataModule, L.Callback):
        for cls in _subclasses(base):
            if cls.__module__.partition(".")[0] in ("fasthmr", "datamodules", "callbacks"):
                keys |= _parameters(cls)
    return keys


def _subclasses(cls: type) -> set[type]:
    direct: set[type] = set(cls.__subclasses__())
    return direct.union(*map(_subclasses, direct))


def _parameters(cls: type) -> set[str]:
    """Names of the constructor's parameters, and of those of dataclasses among their types."""
    names: set[str] = set()
    for name, parameter in inspect.signature(cls, eval_str=True).parameters.items():
        names.add(name)
        for option in (parameter.annotation, *typing.get_args(parameter.annotation)):
            if inspect.isclass(option) and dataclasses.is_dataclass(option):
                names |= _parameters(option)
    return names


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys; lists and scalars are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat
