"""A clip as members of a tar file and back: the only place that knows how a sample lies in a shard.

Sample KEY has the members (docs/shards.md says why):

    KEY.meta.json     what is text: schema version, key, source, fps, body, status, gender
    KEY.labels.npz    what is numbers: labels, cameras, and where each packed image begins
    KEY.frames.jpgs   the JPEG crops, one behind the other
    KEY.masks.pngs    the PNG instance masks, likewise
    KEY.full.jpgs     the full images, if they were kept
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fasthmr.data.schema import ARRAYS, READ_VERSIONS, SCHEMA_VERSION, Clip, ClipError, PackedImages

META, LABELS = "meta.json", "labels.npz"
IMAGES = {"frames": "frames.jpgs", "masks": "masks.pngs", "full_frames": "full.jpgs"}

#: labels take 2 kB a frame, so this is a clip of five hours; anything larger is damaged or made to exhaust memory.
MAX_LABELS_BYTES = 1 << 30
#: what damaged JSON, archives and arrays raise
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    OSError,
    EOFError,
    RecursionError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
)


def encode_clip(clip: Clip) -> dict[str, bytes]:
    """Members of a clip by extension, in the order in which they are written. The same clip gives the same bytes.

    Raises:
        ClipError: the clip breaks the schema.
    """
    clip.validate()
    meta = {
        "schema_version": SCHEMA_VERSION,
        "key": clip.key,
        "source": clip.source,
        "fps": clip.fps,
        "body": clip.body,
        "status": clip.status,
        "gender": clip.gender,
    }
    arrays = {name: getattr(clip, name) for name in ARRAYS}
    members = {META: json.dumps(meta, sort_keys=True).encode()}
    images: dict[str, bytes] = {}
    for name, extension in IMAGES.items():
        packed: PackedImages | None = getattr(clip, name)
        if packed is not None:
            arrays[f"{name}_offsets"] = packed.offsets
            images[extension] = packed.data
    members[LABELS] = _npz_bytes(arrays)
    return members | images


def decode_sample(sample: Mapping[str, Any]) -> Clip:
    """A clip from the members of a sample, as WebDataset and `ClipStore` read them; checked, images still encoded.

    Args:
        sample: extension -> bytes, and the clip's key as "__key__".

    Raises:
        ClipError: a member is missing or damaged, the schema version is another, or the clip breaks the schema.
    """
    key = str(sample.get("__key__", "without __key__"))
    for extension in (META, LABELS, IMAGES["frames"], IMAGES["masks"]):
        if extension not in sample:
            raise ClipError(f"clip {key}: the shard has no {extension} for it; it has {sorted(sample)}")
    try:
        meta = json.loads(sample[META])
        arrays = _read_npz(sample[LABELS])
    except _DAMAGE as error:
        raise ClipError(f"clip {key}: its labels are damaged: {error}") from error
    version = meta.get("schema_version") if isinstance(meta, dict) else None
    if version not in READ_VERSIONS:
        raise ClipError(
            f"clip {key}: has schema version {version}, this fasthmr reads {READ_VERSIONS}; make the shards anew"
        )
    try:
        fields: dict[str, Any] = {name: meta[name] for name in ("key", "source", "fps", "body", "status")}
        fields["gender"] = "neutral" if version == 1 else meta["gender"]
        fields |= {name: arrays[name] for name in ARRAYS}
        for name, extension in IMAGES.items():
            if extension in sample:
                fields[name] = _packed(key, name, sample[extension], arrays[f"{name}_offsets"])
    except KeyError as error:
        raise ClipError(f"clip {key}: its labels lack {error}") from error
    clip = Clip(**fields)
    clip.validate()
    if clip.key != key:
        raise ClipError(f"clip {key}: its labels say that it is clip {clip.key}: the shard's members are mixed up")
    return clip


def _packed(key: str, name: str, data: bytes, offsets: np.ndarray) -> PackedImages:
    steps_up = offsets.ndim == 1 and len(offsets) > 1 and offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
    if offsets.dtype != np.int64 or not steps_up or offsets[-1] != len(data):
        raise ClipError(f"clip {key}: the offsets of {name} do not fit its {len(data)} bytes")
    return PackedImages(data, offsets)


def _npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """An .npz whose bytes depend on the arrays only; np.savez would write the time of day.

    It is not compressed: that would save 1 % of a clip, and cost a fifth of the time of reading one.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
    return buffer.getvalue()


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    """Arrays of an .npz that somebody else may have made: nothing is unpacked before its size is known to be honest."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(info.file_size for info in archive.infolist())
        if size > MAX_LABELS_BYTES:
            raise ValueError(f"they would unpack to {size} bytes, more than {MAX_LABELS_BYTES}")
        for info in archive.infolist():
            with archive.open(info) as file:
                content = file.read(info.file_size)
            header = io.BytesIO(content)
            if np.lib.format.read_magic(header) != (1, 0):
                raise ValueError(f"{info.filename} is no array of NumPy's format 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - header.tell():
                raise ValueError(f"{info.filename} says {dtype} {shape}, which are not its {len(content)} bytes")
            # np.load would parse the header once more, which is most of the time that a small array takes.
            array = np.frombuffer(bytearray(content), dtype, math.prod(shape), header.tell())
            arrays[info.filename.removesuffix(".npy")] = array.reshape(shape, order="F" if fortran else "C")
    return arrays
