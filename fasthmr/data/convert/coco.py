"""COCO's layout: images, and annotations that name one each; a film is a folder of numbered pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from fasthmr.data.convert.reading import ConvertError, numbers

_NUMBER = re.compile(r"(\d+)\.\w+$")


@dataclass(frozen=True)
class Image:
    """A picture with its annotation. `number` is the last number in its name."""

    name: str
    number: int
    about: Mapping[str, Any]
    label: Mapping[str, Any]


def images_of(content: Mapping[str, Any], where: str, unlabelled: list[str]) -> list[Image]:
    """Pictures with one annotation each; the names of those without are added to `unlabelled`.

    Raises:
        ConvertError: it is not of this layout, or a picture has two annotations.
    """
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ConvertError(f"{where} must have the lists images and annotations; it has {', '.join(sorted(content))}")
    try:
        labels = {label["image_id"]: label for label in annotations}
        if len(labels) < len(annotations):
            twice = Counter(label["image_id"] for label in annotations).most_common(1)[0][0]
            raise ConvertError(f"{where}: image {twice} has several annotations; of each, one person is labelled")
        found = [(str(i["file_name"]), i, labels.get(i["id"])) for i in images]
    except (KeyError, TypeError) as error:
        raise ConvertError(f"{where}: an image or annotation lacks {error}: it is not COCO's layout") from error
    unlabelled += [name for name, _, label in found if label is None]
    return [Image(name, _number(name, where), about, label) for name, about, label in found if label is not None]


def sequences(images: Sequence[Image]) -> Iterator[tuple[str, list[Image]]]:
    """(folder, its pictures in order of their numbers); of a folder with several cameras' pictures, each by itself."""
    folders: dict[str, dict[str, list[Image]]] = {}
    for image in images:
        name = PurePosixPath(image.name)
        folders.setdefault(str(name.parent), {}).setdefault(_NUMBER.sub("", name.name), []).append(image)
    for folder, films in folders.items():
        for start, found in films.items():
            film = folder if len(films) == 1 else f"{folder}/{start}"
            yield film, sorted(found, key=lambda image: image.number)


def runs(images: Sequence[Image]) -> Iterator[tuple[list[Image], int]]:
    """Pictures in order, cut where the usual step of their numbers is broken: (pictures, step)."""
    if not images:
        return
    steps = np.diff([image.number for image in images])
    step = int(steps[steps > 0].min()) if (steps > 0).any() else 1
    edges = [0, *(np.flatnonzero(steps != step) + 1).tolist(), len(images)]
    for first, last in pairwise(edges):
        yield list(images[first:last]), step


def boxes(labels: Sequence[Mapping[str, Any]], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Centre (T,2) and side (T,) of COCO's `bbox` x y width height."""
    xywh = np.stack([numbers(label, "bbox", (4,), where) for label in labels])
    return xywh[:, :2] + xywh[:, 2:] / 2, xywh[:, 2:].max(1)


def _number(name: str, where: str) -> int:
    found = _NUMBER.search(name)
    if not found:
        raise ConvertError(f"{where}: file_name must end in a picture's number, got {name!r}")
    return int(found.group(1))
