"""How a clip's frames are best stored: the measurement behind docs/shards.md.

    python docs/measure_layouts.py DIR [--clips 8]

DIR is a finished set of shards, whose first clips are written again in every layout and read back, on one thread and
from the page cache. The rows for mp4 need PyAV (`pip install av`), which fasthmr itself does not use.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import webdataset as wds

from fasthmr.data.shards import ClipStore

try:
    import av
except ImportError:
    av = None

#: frames that training takes from a clip, one at random from each of as many equal parts
TRAINING_FRAMES = 8
Members = dict[str, bytes]


def decode_jpeg(encoded: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def encode_mp4(frames: list[np.ndarray], crf: int, gop: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": str(crf), "g": str(gop), "preset": "medium"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def decode_mp4(encoded: bytes, wanted: list[int], gop: int) -> Iterator[np.ndarray]:
    """The wanted frames, in rising order; seeks where a keyframe lies between two of them."""
    with av.open(io.BytesIO(encoded)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        per_frame = 1 / (stream.time_base * stream.average_rate)
        frames, at = container.decode(stream), 0
        for number in wanted:
            if number > at + 1 and number // gop > at // gop:
                container.seek(int(number * per_frame), stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                at = round(frame.pts / per_frame)
                if at == number:
                    yield frame.to_ndarray(format="rgb24")
                    break


class Layout:
    """A way to store frames: encode all, decode some."""

    def __init__(self, name: str, encode: Callable[[list[np.ndarray]], Members]) -> None:
        self.name, self.encode = name, encode

    def decode(self, members: Members, wanted: list[int]) -> list[np.ndarray]:
        raise NotImplementedError


class JpegMembers(Layout):
    """Every frame a member of the tar."""

    def decode(self, members: Members, wanted: list[int]) -> list[np.ndarray]:
        return [decode_jpeg(members[f"{i:04d}.jpg"]) for i in wanted]


class PackedJpeg(Layout):
    """All frames in one member, and their offsets in another."""

    def decode(self, members: Members, wanted: list[int]) -> list[np.ndarray]:
        at = np.frombuffer(members["offsets"], np.int64)
        return [decode_jpeg(members["jpgs"][at[i] : at[i + 1]]) for i in wanted]


class Mp4(Layout):
    """One H.264 video, CRF 18, with a keyframe every `gop` frames."""

    def __init__(self, gop: int) -> None:
        super().__init__(f"mp4 CRF 18, keyframe every {gop}", lambda frames: {"mp4": encode_mp4(frames, 18, gop)})
        self.gop = gop

    def decode(self, members: Members, wanted: list[int]) -> list[np.ndarray]:
        return list(decode_mp4(members["mp4"], wanted, self.gop))


def jpegs(frames: list[np.ndarray]) -> list[bytes]:
    flags = [cv2.IMWRITE_JPEG_QUALITY, 90]
    return [cv2.imencode(".jpg", cv2.cvtColor(f, cv2.COLOR_RGB2BGR), flags)[1].tobytes() for f in frames]


def as_members(frames: list[np.ndarray]) -> Members:
    return {f"{i:04d}.jpg": encoded for i, encoded in enumerate(jpegs(frames))}


def as_packed(frames: list[np.ndarray]) -> Members:
    encoded = jpegs(frames)
    return {"offsets": np.cumsum([0, *map(len, encoded)]).tobytes(), "jpgs": b"".join(encoded)}


def psnr_db(images: list[np.ndarray], originals: list[np.ndarray]) -> float:
    error = np.mean([np.square(a.astype(np.float32) - b).mean() for a, b in zip(images, originals, strict=True)])
    return float(10 * np.log10(255**2 / error))


def best_of(times: int, work: Callable[[], object]) -> float:
    """Seconds of CPU time of the fastest run: the others were disturbed."""
    durations = []
    for _ in range(times):
        start = time.process_time()
        work()
        durations.append(time.process_time() - start)
    return min(durations)


def measure(layout: Layout, clips: list[list[np.ndarray]]) -> str:
    """One row of the table."""
    stored = [layout.encode(frames) for frames in clips]
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "layout.tar"
        with tarfile.open(tar, "w") as archive:
            for number, members in enumerate(stored):
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{number:04d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        read_s = best_of(3, lambda: list(wds.tarfile_to_samples()([{"url": str(tar)}])))
    every = [list(range(len(frames))) for frames in clips]
    rng = np.random.default_rng(0)
    some = [[int(rng.choice(part)) for part in np.array_split(e, TRAINING_FRAMES)] for e in every]
    loss = psnr_db(layout.decode(stored[0], every[0]), clips[0])
    all_s = best_of(3, lambda: [layout.decode(s, w) for s, w in zip(stored, every, strict=True)])
    some_s = best_of(3, lambda: [layout.decode(s, w) for s, w in zip(stored, some, strict=True)])
    megabytes = sum(len(data) for members in stored for data in members.values()) / len(clips) / 1e6
    return (
        f"| {layout.name} | {megabytes:.2f} | {loss:.1f} | {1e3 * read_s / len(clips):.1f} "
        f"| {sum(map(len, every)) / all_s:.0f} | {1e3 * some_s / len(clips):.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=8)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    store = ClipStore(options.folder)
    packed = [store[i].frames for i in range(min(options.clips, len(store)))]
    clips = [[frames.decode(i) for i in range(len(frames))] for frames in packed]
    print(f"{len(clips)} clips of {len(clips[0])} frames, {clips[0][0].shape[0]} px")
    print("| layout | MB a clip | PSNR, dB | read, ms a clip | decode all, frames/s | decode 8, ms a clip |")
    print("|---|---|---|---|---|---|")
    layouts: list[Layout] = [
        JpegMembers("JPEG 90, a member each", as_members),
        PackedJpeg("JPEG 90, packed", as_packed),
    ]
    for layout in [*layouts, *([Mp4(8), Mp4(16), Mp4(250)] if av is not None else [])]:
        print(measure(layout, clips), flush=True)


if __name__ == "__main__":
    main()
