"""What a clip must be, how it turns into bytes and back, and that no damaged bytes get through."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import fields, replace
from typing import Any

import cv2
import numpy as np
import pytest
from tiny_clips import IMAGE_SIZE, drawn_clip

from fasthmr.data import codec
from fasthmr.data.codec import decode_sample, encode_clip
from fasthmr.data.headers import image_shape
from fasthmr.data.schema import ARRAYS, LABELS, Clip, ClipError, PackedImages

FRAMES = 3


@pytest.fixture(scope="module")
def clip() -> Clip:
    return drawn_clip("walk-01", FRAMES)


@pytest.fixture(scope="module")
def members(clip: Clip) -> dict[str, Any]:
    return {"__key__": clip.key, **encode_clip(clip)}


def assert_same(got: Clip, expected: Clip) -> None:
    for field in fields(Clip):
        ours, theirs = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype, field.name
            np.testing.assert_array_equal(ours, theirs, field.name)
        elif isinstance(theirs, PackedImages):
            assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))], field.name
        else:
            assert ours == theirs, field.name


def with_missing(clip: Clip, *names: str, **changes: Any) -> Clip:
    zeros = {name: np.zeros_like(getattr(clip, name)) for name in names if name != "masks"}
    return replace(clip, **{**zeros, **changes}, status={**clip.status, **dict.fromkeys(names, "missing")})


# ---- there and back -------------------------------------------------------------------------------------------------


def test_a_clip_comes_back_as_it_was(clip: Clip, members: dict[str, Any]) -> None:
    assert_same(decode_sample(members), clip)


def test_full_frames_come_back_too(clip: Clip) -> None:
    width, height = IMAGE_SIZE
    full = PackedImages.encode_jpeg(np.full((FRAMES, height, width, 3), 90, np.uint8))
    kept = replace(clip, full_frames=full)
    assert_same(decode_sample({"__key__": clip.key, **encode_clip(kept)}), kept)


def test_a_clip_without_smpl_labels_needs_no_body(clip: Clip) -> None:
    unlabelled = with_missing(clip, "pose", "betas", "translation", body=None)
    assert decode_sample({"__key__": clip.key, **encode_clip(unlabelled)}).body is None


def test_the_same_clip_gives_the_same_bytes(clip: Clip) -> None:
    assert encode_clip(clip) == encode_clip(drawn_clip("walk-01", FRAMES))


def test_labels_can_be_read_with_numpy_and_json_alone(clip: Clip, members: dict[str, Any]) -> None:
    arrays = np.load(io.BytesIO(members["labels.npz"]), allow_pickle=False)
    assert set(ARRAYS) <= set(arrays.files)
    assert json.loads(members["meta.json"])["status"] == clip.status


def test_labels_may_have_been_written_by_numpy_in_either_order_and_can_be_written_to(
    clip: Clip, members: dict[str, Any]
) -> None:
    with np.load(io.BytesIO(members["labels.npz"])) as file:
        turned = {name: np.asfortranarray(file[name]) for name in file.files}
    content = io.BytesIO()
    np.savez(content, **turned)
    read = decode_sample({**members, "labels.npz": content.getvalue()})
    assert_same(read, clip)
    read.pose[0] = 0


def test_colours_come_back_as_rgb() -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 250
    decoded = PackedImages.encode_jpeg([red]).decode(0)
    assert np.abs(decoded.astype(int) - red).max() < 6


def test_masks_come_back_exactly() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (2, 40, 40)).astype(np.uint8)
    packed = PackedImages.encode_png(labels)
    np.testing.assert_array_equal([packed.decode(0), packed.decode(1)], labels)


# ---- every field is checked -----------------------------------------------------------------------------------------


def spoiled(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy.reshape(-1)[-1] = value
    return copy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("key", "a.b", "key must be 1 to 80 letters"),
        ("key", "../up", "key must be 1 to 80 letters"),
        ("key", "k" * 81, "key must be 1 to 80 letters"),
        ("key", 7, "key must be .*str"),
        ("fps", 0.0, "fps must be positive"),
        ("fps", float("nan"), "fps must be positive"),
        ("fps", "30", "fps must be .*float"),
        ("body", None, "body must be given, because .*pose.* labelled"),
        ("image_size", np.array([640, 0]), "image_size must be from 1 to 8192 px, got .*640, 0"),
        ("image_size", np.array([640, 480], np.int32), "image_size must be int64"),
        (
            "intrinsics",
            np.eye(4, dtype=np.float32),
            r"intrinsics must be float32 of shape \(3, 3\), got float32 \(4, 4\)",
        ),
        ("pose", lambda c: c.pose[:2], r"pose must be float32 of shape \(3, 24, 3\), got float32 \(2, 24, 3\)"),
        ("pose", lambda c: c.pose.astype(np.float64), "pose must be float32 .* got float64"),
        ("translation", lambda c: spoiled(c.translation, np.nan), "translation must be finite"),
        ("valid", lambda c: c.valid.astype(np.uint8), "valid must be bool"),
        ("box_size", lambda c: spoiled(c.box_size, -1), "box_size must be positive, got -1"),
        ("joints2d", lambda c: spoiled(c.joints2d, 1.5), r"joints2d must have confidences in \[0,1\], got .*1.5"),
        ("joints3d", lambda c: spoiled(c.joints3d, -0.5), r"joints3d must have confidences in \[0,1\], got .*-0.5"),
        ("status", {"pose": "ground_truth"}, "status must have exactly"),
        ("status", dict.fromkeys(LABELS, "guessed"), "status.joints2d must be one of .* got 'guessed'"),
        ("status", {**dict.fromkeys(LABELS, "pseudo"), "betas": "missing", "pose": "missing"}, "pose must hold zeros"),
        ("masks", PackedImages.encode_png([np.zeros((384, 384), np.uint8)]), "masks must hold 3 images, got 1"),
        ("masks", PackedImages.encode_png([np.zeros((400, 400), np.uint8)] * 3), r"masks\[0\] must have shape"),
        ("masks", lambda c: c.frames, r"masks\[0\] must have shape \(384, 384\), got \(384, 384, 3\)"),
        (
            "frames",
            PackedImages.encode_jpeg([np.zeros((256, 256, 3), np.uint8)] * 3),
            "be 384 to 8192 px wide, got 256",
        ),
        ("frames", PackedImages.encode_png([np.zeros((384, 384), np.uint8)] * 3), r"frames\[0\] must have shape"),
        ("frames", PackedImages(bytes(30), np.array([0, 10, 20, 30])), r"frames\[0\] is neither a JPEG nor a PNG"),
        ("full_frames", lambda c: c.frames, r"full_frames\[0\] must have shape \(480, 640, 3\)"),
    ],
)
def test_a_field_that_is_wrong_is_named(clip: Clip, field: str, value: Any, message: str) -> None:
    broken = replace(clip, **{field: value(clip) if callable(value) else value})
    with pytest.raises(ClipError, match=message) as error:
        encode_clip(broken)
    assert str(error.value).startswith(f"clip {broken.key}: ")


def test_a_clip_without_frames_is_refused() -> None:
    empty = PackedImages(b"", np.zeros(1, np.int64))
    with pytest.raises(ClipError, match="frames must hold at least one frame, got 0"):
        replace(drawn_clip("none", 1), frames=empty).validate()


def test_images_are_decoded_when_asked_for(clip: Clip) -> None:
    clip.check_images()
    first, second = clip.frames[0], bytearray(clip.frames[1])
    header = second.index(b"\xff\xda")  # all of the second frame's pixels, but not its header
    cut = bytes(second[:header])
    offsets = np.cumsum([0, len(first), len(cut), len(clip.frames[2])])
    damaged = replace(clip, frames=PackedImages(first + cut + clip.frames[2], offsets))
    damaged.validate()
    with pytest.raises(ClipError, match="clip walk-01: frames: frame 1 cannot be decoded"):
        damaged.check_images()


def test_masks_hold_known_instances(clip: Clip) -> None:
    strange = replace(clip, masks=PackedImages.encode_png([np.full((384, 384), 7, np.uint8)] * FRAMES))
    with pytest.raises(ClipError, match=r"masks\[0\] must hold instances 0 to 2, got 7"):
        strange.check_images()


# ---- headers of images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extension", "flags", "channels"),
    [
        (".jpg", [], 1),
        (".jpg", [], 3),
        (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], 3),
        (".png", [], 1),
        (".png", [], 3),
        (".png", [], 4),
    ],
)
def test_a_header_tells_the_shape(extension: str, flags: list[int], channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 255, (70, 90, channels)).astype(np.uint8)
    encoded = cv2.imencode(extension, image, flags)[1].tobytes()
    assert image_shape(encoded) == cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED).shape


def test_a_damaged_header_is_an_error_and_nothing_else(clip: Clip) -> None:
    rng = np.random.default_rng(0)
    for encoded in (clip.frames[0], clip.masks[0]):
        for _ in range(500):
            damaged = bytearray(encoded[: rng.integers(0, 700)])
            for at in rng.integers(0, max(1, len(damaged)), 3):
                damaged[at : at + 1] = bytes([rng.integers(256)])
            try:
                image_shape(bytes(damaged))
            except ValueError:
                continue


def test_an_image_that_claims_to_be_huge_is_not_unpacked(clip: Clip) -> None:
    frame = bytearray(clip.frames[0])
    size = frame.index(b"\xff\xc0") + 5
    frame[size : size + 4] = (60_000).to_bytes(2) * 2
    bomb = PackedImages(bytes(frame) * FRAMES, np.arange(FRAMES + 1) * len(frame))
    with pytest.raises(ClipError, match=r"frames\[0\] must be 384 to 8192 px wide, got 60000"):
        replace(clip, frames=bomb).validate()
    with pytest.raises(ClipError, match="cannot be decoded"):
        bomb.decode(0)


# ---- samples from outside -------------------------------------------------------------------------------------------


def npz(**content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def changed_meta(members: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**json.loads(members["meta.json"]), **changes}).encode()


@pytest.mark.parametrize("missing", ["meta.json", "labels.npz", "frames.jpgs", "masks.pngs"])
def test_a_missing_member_is_named(members: dict[str, Any], missing: str) -> None:
    rest = {name: data for name, data in members.items() if name != missing}
    with pytest.raises(ClipError, match=f"clip walk-01: the shard has no {missing}"):
        decode_sample(rest)


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("meta.json", b"{", "labels are damaged"),
        ("meta.json", b"[1]", "schema version None"),
        ("meta.json", b"[" * 100_000, "labels are damaged"),
        ("meta.json", lambda m: changed_meta(m, schema_version=99), r"schema version 99, this fasthmr reads \(1, 2\)"),
        ("meta.json", lambda m: changed_meta(m, key="other"), "its labels say that it is clip other"),
        ("meta.json", lambda m: changed_meta(m, fps=[1]), "fps must be"),
        ("meta.json", lambda m: changed_meta(m, status=None), "status must be"),
        ("labels.npz", b"PK", "labels are damaged"),
        ("labels.npz", npz(pose=npy(np.zeros(3))), "its labels lack"),
        ("labels.npz", npz(pose=b"no array"), "labels are damaged"),
        (
            "labels.npz",
            npz(pose=npy(np.array([{"a": 1}]), allow_pickle=True)),
            "labels are damaged: pose.npy says object",
        ),
        (
            "labels.npz",
            npz(pose=npy(np.zeros(3)).replace(b"(3,), }           ", b"(300000000000,), }")),
            r"labels are damaged: pose.npy says float64 \(300000000000,\)",
        ),
        ("frames.jpgs", lambda m: m["frames.jpgs"][:-9], "the offsets of frames do not fit its"),
        ("masks.pngs", b"", "the offsets of masks do not fit its 0 bytes"),
    ],
)
def test_damaged_members_are_told_and_never_unpacked(
    members: dict[str, Any], member: str, content: Any, message: str
) -> None:
    data = content(members) if callable(content) else content
    with pytest.raises(ClipError, match=message):
        decode_sample({**members, member: data})


def test_labels_that_would_unpack_to_too_much_are_refused(
    members: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_LABELS_BYTES", 1 << 20)
    with pytest.raises(ClipError, match=r"they would unpack to 80000128 bytes, more than 1048576"):
        decode_sample({**members, "labels.npz": npz(pose=npy(np.zeros(10**7)))})


def test_flipped_bytes_are_an_error_of_the_clip_or_harmless(members: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for round_ in range(300):
        member = ("meta.json", "labels.npz")[round_ % 2]
        damaged = bytearray(members[member])
        for at in rng.integers(0, len(damaged), 3):
            damaged[at] ^= 1 << rng.integers(8)
        try:
            decode_sample({**members, member: bytes(damaged)})
        except ClipError:
            refused += 1
    assert refused > 200
