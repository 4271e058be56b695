"""What bounded latency costs in accuracy: the encoder alone, windows of the whole clip, and streaming.

    python docs/study_streaming.py PIPELINE --data SHARDS [--settings 1,0 8,8 ...]

Prints Markdown: a row for each (stride, look-ahead), errors by the protocol body-24. PIPELINE holds encoder and decoder
(`fasthmr.checkpoint.save_pipeline`). Clips should be several windows long: the first window of a stream is stretched.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from datamodules.encoding import EncodedFrames, FrameEncoder, cut_chunks
from fasthmr.conventions import NUM_JOINTS
from fasthmr.data.schema import Clip
from fasthmr.data.store import ClipStore
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.pipeline import Pipeline, load_pipeline
from fasthmr.precision import chosen_precision
from fasthmr.sequence import StreamingDecoder

SETTINGS = ("1,0", "8,0", "1,4", "4,4", "8,8", "8,16", "16,16", "16,32")
Method = Callable[[EncodedFrames], Tensor]


def methods(pipeline: Pipeline, settings: list[str]) -> Iterator[tuple[list[str], Method]]:
    """Name, latency and decoded frames a frame of each row, and what gives its rotations (T, 24, 3, 3)."""
    decoder, body = pipeline.decoder, pipeline.body
    assert decoder is not None
    yield ["encoder alone", "0", "0"], lambda seen: seen.rotations
    overlap = 1 / (1 - pipeline.config.sequence.overlap)
    yield ["whole clip", "all", f"{overlap:.2f}"], lambda seen: pipeline.refine(*seen[:2], _mean(seen.betas))
    for setting in settings:
        stride, look_ahead = map(int, setting.split(","))
        stream = StreamingDecoder(decoder, body, stride, look_ahead)

        def streamed(seen: EncodedFrames, stream: StreamingDecoder = stream) -> Tensor:
            so_far = seen.betas.cumsum(0) / torch.arange(1, len(seen.betas) + 1)[:, None]
            read = decoder.conditions(seen.features, seen.rotations, so_far, body)
            return torch.cat([stream.push(read, so_far), stream.finish()])

        name = f"stride {stride}, look-ahead {look_ahead}"
        yield [name, str(stream.latency), f"{decoder.window / stride:.1f}"], streamed


def add(errors: PoseErrors, pipeline: Pipeline, clip: Clip, seen: EncodedFrames, rotations: Tensor) -> None:
    """Add a clip to a row's errors."""
    betas = torch.from_numpy(clip.betas).expand(len(clip), -1)
    true = axis_angle_to_matrix(torch.from_numpy(clip.pose))
    ours, theirs = (
        pipeline.body.joints29(r, b)[None, :, :NUM_JOINTS] for r, b in ((rotations, _mean(seen.betas)), (true, betas))
    )
    errors.update(ours, theirs, None, None, torch.from_numpy(clip.valid)[None], torch.tensor([clip.fps]))


def _mean(betas: Tensor) -> Tensor:
    return betas.mean(0).expand(len(betas), -1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--data", required=True)
    parser.add_argument("--body", default="free")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="STRIDE,LOOK_AHEAD")
    options = parser.parse_args()
    pipeline = load_pipeline(options.pipeline, options.body)
    if pipeline.decoder is None:
        parser.error(f"{options.pipeline} has no decoder")
    store = ClipStore(options.data)
    store.require_body(pipeline.body.id)
    encoder = FrameEncoder(pipeline.hmr, precision=chosen_precision("auto", "cpu"))
    rows = [(row, method, PoseErrors(PROTOCOLS["body-24"])) for row, method in methods(pipeline, options.settings)]
    for clip in store:
        seen = encoder(cut_chunks(clip, 0, len(clip))[0], "cpu")
        for _, method, errors in rows:
            add(errors, pipeline, clip, seen, method(seen))
    print(f"{len(store)} clips, windows of {pipeline.decoder.window} frames\n")
    print("| | latency, frames | decoded frames a frame | PA-MPJPE, mm | MPJPE, mm | Accel, m/s^2 |")
    print("|" + "---|" * 6)
    for row, _, errors in rows:
        values = errors.compute()
        numbers = [f"{float(values[key]):.1f}" for key in ("pa_mpjpe_mm", "mpjpe_mm", "accel_m_s2")]
        print("| " + " | ".join([*row, *numbers]) + " |")


if __name__ == "__main__":
    main()
