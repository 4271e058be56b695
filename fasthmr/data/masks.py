"""Person masks for sets that have none: a segmenter looks at every stored crop, and the set is written anew with masks.

A segmenter tells people apart but not who is tracked: that is the one whose mask fills most of the person's box and
sticks out of it least. The crop, not the full image, is what it sees; that is where the person is largest.
"""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from fasthmr.conventions import MASK_OTHER, MASK_SUBJECT
from fasthmr.data.convert.reading import ConvertError, Picture, read_picture
from fasthmr.data.index import Manifest
from fasthmr.data.schema import Clip, PackedImages
from fasthmr.data.shards import ClipStore
from fasthmr.geometry.boxes import apply_affine

#: the tracked person's mask and box must overlap by this much (intersection over union)
_LEAST_OVERLAP = 0.1
#: what networks that know COCO's classes call people
_PERSON = "person"


class Segmenter(Protocol):
    """Finds people. `describe()` is JSON: all that the masks depend on."""

    def people(self, clip: Clip, frame: int, image: np.ndarray) -> np.ndarray:
        """Masks (N,S,S) bool of the people in a stored crop (S,S,3) uint8 RGB; N may be 0."""
        ...

    def describe(self) -> dict[str, Any]: ...


class MaskedSource:
    """A `ClipSource`: the clips of a set with masks by a segmenter, as pseudo labels.

    Args:
        folder: the finished set.
        segmenter: finds the people; pickled to worker processes.
    """

    def __init__(self, folder: str | Path, segmenter: Segmenter) -> None:
        self._store, self._segmenter = ClipStore(folder), segmenter

    def __len__(self) -> int:
        return len(self._store)

    def describe(self) -> dict[str, Any]:
        """The description of the set itself, its checksums, and the segmenter's."""
        manifest = self._store.manifest
        bodies = manifest.source.get("bodies", {})
        return {
            "kind": "masked", "body": manifest.body, "bodies": bodies, "of": manifest.source,
            "shards": clips_id(manifest), "masks": self._segmenter.describe(),
        }  # fmt: skip

    def make(self, index: int) -> Clip:
        """Clip `index`; one that has masks already stays as it is."""
        clip = self._store[index]
        if clip.status["masks"] != "missing":
            return clip
        labels = []
        for frame in range(len(clip)):
            image = clip.frames.decode(frame)
            labels.append(tell_apart(self._segmenter.people(clip, frame, image), _box(clip, frame)))
        return replace(clip, masks=PackedImages.encode_png(labels), status={**clip.status, "masks": "pseudo"})


def clips_id(manifest: Manifest) -> str:
    """What tells the clips of sets apart, from their checksums; a set and the same with masks have one id."""
    if manifest.source.get("kind") == "masked":
        return str(manifest.source["shards"])
    return hashlib.sha256("".join(sorted(manifest.shards.values())).encode()).hexdigest()


def frames_without_person(folder: str | Path) -> int:
    """How many frames of a set have a mask without the person who is tracked."""
    masks = (clip.masks.decode(frame) for clip in ClipStore(folder) for frame in range(len(clip)))
    return sum(not (mask == MASK_SUBJECT).any() for mask in masks)


def tell_apart(people: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Instances (S,S) uint8 of masks (N,S,S): the person of the box (4,) x0 y0 x1 y1 px, and others."""
    label = np.zeros(people.shape[1:], np.uint8)
    label[people.any(0)] = MASK_OTHER
    overlaps = [_overlap(box, mask) for mask in people]
    if overlaps and max(overlaps) >= _LEAST_OVERLAP:
        label[people[int(np.argmax(overlaps))]] = MASK_SUBJECT
    return label


def _overlap(box: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of a box and the square around a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0.0
    low, high = np.array([columns[0], rows[0]]), np.array([columns[-1] + 1, rows[-1] + 1])
    middle, side = (low + high) / 2, (high - low).max()
    low, high = middle - side / 2, middle + side / 2  # boxes of people are square
    shared = np.clip(np.minimum(high, box[2:]) - np.maximum(low, box[:2]), 0, None).prod()
    return float(shared / ((high - low).prod() + (box[2:] - box[:2]).prod() - shared))


def _box(clip: Clip, frame: int) -> np.ndarray:
    """(4,) x0 y0 x1 y1 of the person's box, px of the stored crop."""
    half = clip.box_size[frame] / 2
    corners = np.stack([clip.box_center[frame] - half, clip.box_center[frame] + half])
    return apply_affine(clip.crop_from_image[frame], corners).reshape(4)


@dataclass(frozen=True)
class MaskFolder:
    """Masks made elsewhere: FOLDER/KEY/00000.png for frame 0 of clip KEY, white (above 127) where the person is.

    A mask has the size of the full image, or of the stored crop.
    """

    folder: Path

    def people(self, clip: Clip, frame: int, image: np.ndarray) -> np.ndarray:
        """One mask (1,S,S).

        Raises:
            ConvertError: the mask is missing, damaged, or of another size.
        """
        mask = read_picture(self.folder, Picture(f"{clip.key}/{frame:05d}.png"))[..., 0]
        if mask.shape == (clip.image_size[1], clip.image_size[0]):
            side = (image.shape[1], image.shape[0])
            mask = cv2.warpAffine(mask, clip.crop_from_image[frame], side, flags=cv2.INTER_NEAREST)
        if mask.shape != image.shape[:2]:
            raise ConvertError(
                f"{self.folder}/{clip.key}/{frame:05d}.png is {mask.shape[1]}x{mask.shape[0]} px; it must have the "
                f"size of the image ({clip.image_size[0]}x{clip.image_size[1]}) or of the crop ({image.shape[1]})"
            )
        return mask[None] > 127

    def describe(self) -> dict[str, Any]:
        paths = sorted(self.folder.glob("*/*.png"))
        files = [(str(path.relative_to(self.folder)), path.stat().st_size) for path in paths]
        names_and_sizes = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return {"segmenter": "folder", "files": len(files), "names_and_sizes": names_and_sizes}


class Yolo:
    """Ultralytics' YOLO with masks. **AGPL-3.0**: what serves or ships a program with it must open its source.

    Args:
        weights: a .pt file, such as yolo11x-seg.pt; a bare name is downloaded by ultralytics itself. It is a pickle, of
            which ultralytics makes only its own and torch's layers; with ULTRALYTICS_SAFE_LOAD=0 it runs it.
        load: makes the network of the weights; tests give their own.

    Raises:
        ConvertError: the package is not installed, the file is damaged or unsafe, or the network makes no masks of
            people.
    """

    def __init__(self, weights: str, load: Callable[[str], Any] | None = None) -> None:
        self._weights, self._load = weights, load or _ultralytics
        self._network = _loaded(self._load, weights)
        self._person = [number for number, name in self._network.names.items() if name == _PERSON]
        if self._network.task != "segment" or not self._person:
            raise ConvertError(
                f"{weights} is a network to {self._network.task} {len(self._network.names)} classes: it takes one to "
                f"segment, of which one class is {_PERSON!r}, such as yolo11x-seg.pt"
            )

    def people(self, clip: Clip, frame: int, image: np.ndarray) -> np.ndarray:
        """Masks of the class person."""
        (result,) = self._network.predict(image[..., ::-1], classes=self._person, retina_masks=True, verbose=False)
        if result.masks is None:
            return np.zeros((0, *image.shape[:2]), bool)
        return np.asarray(result.masks.data.cpu().numpy()) > 0.5

    def describe(self) -> dict[str, Any]:
        return {"segmenter": "yolo", **_described(self._weights)}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._weights, self._load)  # the networks themselves cannot be pickled once they ran


class RfDetr:
    """Roboflow's RF-DETR with masks. Apache-2.0.

    Args:
        weights: a checkpoint file, which says or whose name says of which size it is (rf-detr-seg-medium.pt); empty
            for the package's own of medium size, which it downloads.
        load: makes the network of the weights; tests give their own.

    Raises:
        ConvertError: the package is not installed, the file is damaged or unsafe, or the network makes no masks of
            people.
    """

    def __init__(self, weights: str, load: Callable[[str], Any] | None = None) -> None:
        self._weights, self._load = weights, load or _rfdetr
        self._network = _loaded(self._load, weights)
        if _PERSON not in (names := self._network.class_names):
            raise ConvertError(
                f"{weights} knows the classes {textwrap.shorten(', '.join(names), 80)}: it takes a network one of "
                f"whose classes is {_PERSON!r}, such as rf-detr-seg-medium.pt"
            )

    def people(self, clip: Clip, frame: int, image: np.ndarray) -> np.ndarray:
        """Masks of the class person."""
        found = self._network.predict(image, threshold=0.4)
        named = [] if found.mask is None else zip(found.mask, found.data["class_name"], strict=True)
        masks = [np.asarray(mask, bool) for mask, name in named if name == _PERSON]
        return np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)

    def describe(self) -> dict[str, Any]:
        return {"segmenter": "rfdetr", **_described(self._weights)}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._weights, self._load)  # the networks themselves cannot be pickled once they ran


def _described(weights: str) -> dict[str, Any]:
    """Name and checksum of a file of weights; None for one that is where the package alone knows."""
    file = Path(weights)
    sha256 = None
    if file.is_file():
        with file.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return {"weights": file.name, "sha256": sha256}


def _loaded(load: Callable[[str], Any], weights: str) -> Any:
    """The network of a file of weights; whatever those who read it say of a bad one is a ConvertError."""
    try:
        return load(weights)
    except ConvertError:
        raise
    except Exception as error:  # of any kind: the readers are others', and fail where the file happens to be wrong
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ConvertError(f"the weights {weights!r} could not be loaded: {why}") from error


def _ultralytics(weights: str) -> Any:
    os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")  # read when it is imported: nothing in the pickle is run
    try:
        from ultralytics import YOLO
    except ImportError as error:
        raise ConvertError("YOLO takes `pip install fasthmr[yolo]`: ultralytics, whose licence is AGPL-3.0") from error
    return YOLO(weights)


def _rfdetr(weights: str) -> Any:
    try:
        from rfdetr import RFDETR, RFDETRSegMedium
    except ImportError as error:
        raise ConvertError("RF-DETR takes `pip install fasthmr[rfdetr]` (Apache-2.0)") from error
    network = RFDETR.from_checkpoint(weights) if weights else RFDETRSegMedium()
    if not network.model_config.segmentation_head:
        raise ConvertError(f"{weights} finds boxes only: it takes a network with masks, such as rf-detr-seg-medium.pt")
    return network


def load_segmenter(name: str, source: str) -> Segmenter:
    """A segmenter by its name in the command.

    Args:
        name: folder, yolo or rfdetr.
        source: the folder, or the weights.

    Raises:
        ConvertError: no such folder, or the package is not installed.
    """
    if name == "folder":
        if not Path(source).is_dir():
            raise ConvertError(f"there is no folder of masks {source!r}")
        return MaskFolder(Path(source))
    if name == "yolo" and not source:
        raise ConvertError("yolo takes --source, a file of weights such as yolo11x-seg.pt")
    return Yolo(source) if name == "yolo" else RfDetr(source)
