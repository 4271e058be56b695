"""The pipeline: crops as in training, any number of frames, gaps, cameras, and files that hold both networks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
import torch
from tiny_decoder import DENOISER, ENCODER, PRIOR, WINDOW
from torch import Tensor

from fasthmr.body import BodyMismatchError
from fasthmr.checkpoint import EncoderMismatchError, encoder_id, save_encoder, save_pipeline
from fasthmr.conventions import CROP_PX, IMAGE_STD, MASK_SUBJECT
from fasthmr.data.batch import collate, person_mask
from fasthmr.data.crops import CROP_SCALE
from fasthmr.data.schema import Clip, PackedImages
from fasthmr.data.synth.source import SynthConfig, SynthSource
from fasthmr.data.transforms import Augmentation, make_sample
from fasthmr.geometry.boxes import apply_affine, crop_affine
from fasthmr.merging import TokenMerging
from fasthmr.models.denoiser import DenoiserConfig
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.hmr import HMR
from fasthmr.pipeline import Pipeline, PipelineConfig, default_intrinsics, load_pipeline
from fasthmr.sequence import SequenceConfig, StreamingDecoder, refine
from fasthmr.video.person import person_frames

EXACT = PipelineConfig(precision="32")
GREY = 1 / 255 / min(IMAGE_STD)  # one grey value, normalised


@dataclass(frozen=True)
class Film:
    """A clip, and its full images (T, H, W, 3), masks (T, H, W) of labels and boxes (T, 4)."""

    clip: Clip
    frames: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


@pytest.fixture(scope="module")
def film(free_body) -> Film:
    """Six frames from our own source, in full."""
    config = SynthConfig(clips=1, frames=6, seed=0, full_frames=True, second_person_share=1.0, occluder_share=0.0)
    clip = SynthSource(config, free_body).make(0)
    width, height = clip.image_size.tolist()
    masks = [
        cv2.warpAffine(
            clip.masks.decode(i), clip.crop_from_image[i].astype(float), (width, height),
            flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        )
        for i in range(len(clip))
    ]  # fmt: skip
    half = clip.box_size[:, None] / 2
    boxes = np.concatenate([clip.box_center - half, clip.box_center + half], axis=1)
    assert clip.full_frames is not None
    frames = np.stack([clip.full_frames.decode(i) for i in range(len(clip))])
    return Film(clip, frames, np.stack(masks), boxes)


@pytest.fixture(scope="module")
def hmr() -> HMR:
    torch.manual_seed(0)
    hmr = HMR(ENCODER).eval()
    with torch.no_grad():  # an untrained head looks at nothing
        torch.nn.init.normal_(hmr.smpl_head.layers[0].cross_attn.proj.weight)
        for readout in (hmr.smpl_head.decpose, hmr.smpl_head.decshape, hmr.smpl_head.deccam):
            readout.weight.mul_(20)
    return hmr


@pytest.fixture(scope="module")
def decoder(hmr) -> DiffusionDecoder:
    torch.manual_seed(1)
    sizes = {"feature_dim": ENCODER.head_dim, "window": WINDOW, "latents": PRIOR.latents, "dim": PRIOR.dim}
    denoiser = DenoiserConfig(**sizes, depth=DENOISER.depth, heads=DENOISER.heads, mlp_dim=DENOISER.mlp_dim)
    return DiffusionDecoder(DiffusionDecoderConfig(PRIOR, denoiser), encoder_id(hmr)).eval()


@pytest.fixture
def pipeline(hmr, free_body) -> Pipeline:
    return Pipeline(hmr, None, free_body, EXACT)


def shown_to(hmr: HMR, pipeline: Pipeline, *arguments: object, **settings: object) -> tuple[Tensor, Tensor]:
    """Images and person masks that the encoder sees."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = hmr.register_forward_pre_hook(
        lambda _, positional, named: seen.append((positional[0], named["person_mask"])), with_kwargs=True
    )
    try:
        pipeline.encode(*arguments, **settings)
    finally:
        hook.remove()
    images, masks = zip(*seen, strict=True)
    return torch.cat(images), torch.cat(masks)


def repeated(film: Film, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames, masks and boxes of a film that runs forwards and backwards until there are so many."""
    there_and_back = [*range(len(film.frames)), *reversed(range(len(film.frames)))]
    index = [there_and_back[i % len(there_and_back)] for i in range(frames)]
    return film.frames[index], film.masks[index], film.boxes[index]


class TestCrops:
    def test_equal_trainings_of_the_same_picture(self, film, hmr, pipeline):
        # A clip whose stored "crops" are the full images: training's own code, with the same pixels to cut from.
        png = [cv2.imencode(".png", cv2.cvtColor(f, cv2.COLOR_RGB2BGR))[1].tobytes() for f in film.frames]
        whole = np.tile(np.eye(2, 3, dtype=np.float32), (len(png), 1, 1))
        clip = replace(
            film.clip,
            frames=PackedImages(b"".join(png), np.cumsum([0, *map(len, png)])),
            masks=PackedImages.encode_png(film.masks),
            crop_from_image=whole,
        )
        batch = collate([make_sample(clip, range(len(png)), np.random.default_rng(0), Augmentation.off())])
        images, masks = shown_to(hmr, pipeline, film.frames, film.masks, film.boxes)
        difference = (images - batch.network_input()).abs()
        assert difference.max() <= 1.01 * GREY and (difference > 0).float().mean() < 1e-3
        assert (masks != person_mask(batch)).float().mean() < 1e-4

    def test_are_like_those_of_stored_crops(self, film, hmr, pipeline):
        # The stored crops were filmed at another size, with other noise, and compressed: the same picture otherwise.
        batch = collate([make_sample(film.clip, range(6), np.random.default_rng(0), Augmentation.off())])
        images, masks = shown_to(hmr, pipeline, film.frames, film.masks, film.boxes)
        difference = (images - batch.network_input()).abs().mean()
        shifted = (images.roll(3, dims=-1) - batch.network_input()).abs().mean()
        assert difference < 12 * GREY and difference < 0.7 * shifted
        assert (masks != person_mask(batch)).float().mean() < 0.01

    def test_large_pictures_are_blurred_before_they_shrink(self, hmr, pipeline):
        # Stripes of one pixel, interpolated between at random, keep 0.58 of their contrast. The blur leaves nothing.
        stripes = np.zeros((1, 1500, 1500, 3), np.uint8)
        stripes[:, :, ::2] = 255
        contrast = {}
        for side in (350, 1200):  # shrunk 1.6 and 5.6 times
            box = [[120.0, 120, 120 + side, 120 + side]]
            images, _ = shown_to(hmr, pipeline, stripes, np.ones((1, 1500, 1500), bool), box)
            inside = images[0, 0, 100:150, 100:150]
            contrast[side] = float(inside.std()) * IMAGE_STD[0] * 2
        assert contrast[350] > 0.5 and contrast[1200] < 0.1

    def test_other_people_are_not_the_subject(self, film, hmr, free_body):
        assert set(np.unique(film.masks)) == {0, 1, 2}
        subject, everyone = (
            shown_to(hmr, Pipeline(hmr, None, free_body, PipelineConfig(mask_people=who)), film.frames, film.masks)[1]
            for who in ("subject", "all")
        )
        assert everyone.sum() > subject.sum() > 0
        # Another numbering of the same people; and the other one followed.
        labels = film.masks.astype(np.int32) * 7
        pipeline = Pipeline(hmr, None, free_body, EXACT)
        assert torch.equal(shown_to(hmr, pipeline, film.frames, labels, subject=7)[1], subject)
        boxes = pipeline.encode(film.frames, labels, subject=14).box_center
        assert float((boxes - pipeline.encode(film.frames, labels, subject=7).box_center).abs().max()) > 10


class TestBoxes:
    def frames(self, masks: np.ndarray) -> np.ndarray:
        return np.zeros((*masks.shape, 3), np.uint8)

    def boxes(self, masks: np.ndarray, **settings: object) -> list:
        return [seen.box for seen in person_frames(self.frames(masks), masks, **settings)]

    def test_tight_around_the_person(self):
        masks = np.zeros((1, 50, 60), bool)
        masks[0, 10:31, 20:25] = True
        assert self.boxes(masks) == [(22.0, 20.0, 20.0)]  # pixels' centres: rows 10 to 30

    def test_smoothed_over_the_frames_around_and_held_over_none(self):
        masks = np.zeros((30, 40, 200), bool)
        for time, mask in enumerate(masks):
            left = 3 * time + (5 if time == 12 else 0)  # a jump in one frame
            mask[10:21, left : left + 5] = True
        masks[20] = False
        boxes = self.boxes(masks, smoothing=1.5)
        assert boxes[20] is None and all(box is not None for box in boxes[:20] + boxes[21:])
        centers = np.array([box[0] for box in boxes if box is not None])
        assert centers[12] - (3 * 12 + 2) < 0.3 * 5
        np.testing.assert_allclose(centers[6:8], [3 * 6 + 2, 3 * 7 + 2], atol=0.1)  # a steady walk is not changed

    def test_little_is_held_back(self):
        masks, pulled = np.ones((50, 8, 8), bool), []

        def frames():
            for number in range(50):
                pulled.append(number)
                yield np.zeros((8, 8, 3), np.uint8)

        stream = person_frames(frames(), masks, smoothing=1.5)
        next(stream)
        assert len(pulled) == 7

    def test_given_ones_are_taken_as_they_are(self, film, pipeline):
        boxes = film.boxes.copy()
        boxes[2] = np.nan
        seen = pipeline.encode(film.frames, film.masks, boxes)
        assert seen.valid.tolist() == [True, True, False, True, True, True]
        known = [0, 1, 3, 4, 5]
        np.testing.assert_allclose(seen.box_center[known], film.clip.box_center[known], atol=1e-3)
        np.testing.assert_allclose(seen.box_size[known], CROP_SCALE * film.clip.box_size[known], rtol=1e-5)


class TestEstimate:
    def test_without_a_decoder_it_is_the_encoders(self, film, hmr, pipeline):
        motion = pipeline(film.frames, film.masks, film.boxes, fps=25.0)
        images, masks = shown_to(hmr, pipeline, film.frames, film.masks, film.boxes)
        with torch.no_grad():
            output = hmr(images, masks)
        torch.testing.assert_close(motion.rotations, output.rotations)
        torch.testing.assert_close(motion.camera, output.camera)
        torch.testing.assert_close(motion.betas, output.betas.mean(0).expand(6, -1))
        assert not motion.interpolated.any() and motion.fps == 25.0 and motion.body == pipeline.body.id
        own = Pipeline(hmr, None, pipeline.body, replace(EXACT, average_betas=False))
        torch.testing.assert_close(own(film.frames, film.masks, film.boxes).betas, output.betas)

    def test_the_body_is_where_the_crops_camera_has_it(self, film, pipeline):
        # The weak-perspective camera puts the body's origin at (tx, ty) times half the crop and s, from its centre.
        lens = np.array([[900.0, 0, 250], [0, 900, 199], [0, 0, 1]])
        motion = pipeline(film.frames, film.masks, film.boxes, intrinsics=lens)
        projected = motion.translation @ motion.intrinsics.mT
        pixels = projected[:, :2] / projected[:, 2:]
        scale, shift = motion.camera[:, :1], motion.camera[:, 1:]
        torch.testing.assert_close(pixels, motion.box_center + scale * motion.box_size[:, None] / 2 * shift)
        # And a metre there is as long as in the crop: s times half the crop.
        torch.testing.assert_close(900 / motion.translation[:, 2], motion.camera[:, 0] * motion.box_size / 2)

    def test_without_intrinsics(self, film, pipeline):
        motion = pipeline(film.frames, film.masks)
        height, width = film.frames.shape[1:3]
        assert motion.image_size.tolist() == [width, height]
        assert torch.equal(motion.intrinsics, default_intrinsics((width, height)))
        assert default_intrinsics((1280, 960))[:, 2].tolist() == [640, 480, 1]
        assert float(default_intrinsics((1280, 960))[1, 1]) == 1600

    def test_arrays_or_generators_in_batches_of_any_size(self, film, hmr, free_body):
        expected = Pipeline(hmr, None, free_body, EXACT)(film.frames, film.masks)
        config = replace(EXACT, batch=4)
        lazily = Pipeline(hmr, None, free_body, config)(iter(film.frames), (m == MASK_SUBJECT for m in film.masks))
        for name in ("rotations", "betas", "camera", "translation", "box_center"):
            torch.testing.assert_close(getattr(lazily, name), getattr(expected, name), atol=1e-4, rtol=1e-4)

    def test_bf16_is_nearly_the_same(self, film, hmr, free_body):
        half, full = (
            Pipeline(hmr, None, free_body, PipelineConfig(precision=p))(film.frames, film.masks) for p in ("bf16", "32")
        )
        difference = (half.rotations - full.rotations).abs().max()
        assert 0 < difference < 0.2 and half.rotations.dtype == torch.float32

    def test_masks_reach_the_tokens(self, film, free_body):
        torch.manual_seed(0)
        net = replace(ENCODER, vit_depth=4, token_merging=TokenMerging(keep_tokens=90, per_layer=40))
        pipeline = Pipeline(HMR(net), None, free_body, EXACT)
        boxes = film.boxes
        one = pipeline.encode(film.frames, film.masks, boxes)
        other = pipeline.encode(film.frames, np.ones_like(film.masks), boxes)
        assert float((one.features - other.features).abs().max()) > 1e-4

    def test_gaps_are_bridged_and_marked(self, film, pipeline):
        frames, masks, _ = repeated(film, 9)
        masks = masks.copy()
        masks[[0, 3, 4]] = 0
        masks[8, :, :] = 0
        masks[8, 0, :3] = MASK_SUBJECT  # three pixels are nobody
        motion = pipeline(frames, masks)
        assert motion.interpolated.nonzero()[:, 0].tolist() == [0, 3, 4, 8]
        assert torch.equal(motion.rotations[[0, 8]], motion.rotations[[1, 7]])
        torch.testing.assert_close(motion.box_center[3], torch.lerp(motion.box_center[2], motion.box_center[5], 1 / 3))
        assert motion.translation.isfinite().all()
        turns = motion.rotations[2:5].mT @ motion.rotations[3:6]
        torch.testing.assert_close(turns[0], turns[1], atol=1e-4, rtol=0)


class TestDecoder:
    @pytest.mark.parametrize("frames", [1, 5, WINDOW, 2 * WINDOW + 5])
    def test_any_number_of_frames(self, film, hmr, decoder, free_body, frames):
        config = replace(EXACT, sequence=SequenceConfig(overlap=0.5))
        pipeline = Pipeline(hmr, decoder, free_body, config)
        images, masks, boxes = repeated(film, frames)
        motion = pipeline(images, masks, boxes)
        assert motion.rotations.shape == (frames, 24, 3, 3)
        seen = pipeline.encode(images, masks, boxes)
        expected = refine(decoder, free_body, seen.features, motion.betas, None, config.sequence)
        torch.testing.assert_close(motion.rotations, expected)
        assert torch.equal(pipeline.refine(seen.features, seen.rotations, motion.betas), motion.rotations)
        assert float((motion.rotations - seen.rotations).abs().max()) > 0.1  # not the encoder's own

    def test_one_file_holds_both(self, film, hmr, decoder, free_body, tmp_path):
        save_pipeline(tmp_path / "both.ckpt", hmr, decoder, free_body.id)
        loaded = load_pipeline(tmp_path / "both.ckpt", config=EXACT)
        expected = Pipeline(hmr, decoder, free_body, EXACT)(film.frames, film.masks)
        torch.testing.assert_close(loaded(film.frames, film.masks).rotations, expected.rotations)
        save_encoder(tmp_path / "encoder.ckpt", hmr, free_body.id)
        assert load_pipeline(tmp_path / "encoder.ckpt", free_body).decoder is None

    def test_frames_that_arrive_one_by_one(self, film, hmr, decoder, free_body):
        pipeline = Pipeline(hmr, decoder, free_body, EXACT)
        seen = pipeline.encode(*repeated(film, 2 * WINDOW + 5))
        stream = StreamingDecoder(decoder, free_body, stride=3, look_ahead=4)
        betas = seen.betas.cumsum(0) / torch.arange(1, len(seen.betas) + 1)[:, None]  # the mean so far
        got = [stream.push(f[None], b[None]) for f, b in zip(seen.features, betas, strict=True)]
        assert [sum(map(len, got[:n])) for n in (6, 7, 9, 10)] == [0, 3, 3, 6]
        rotations = torch.cat([*got, stream.finish()])
        assert rotations.shape == (2 * WINDOW + 5, 24, 3, 3)
        # The last window is the same as that of a shorter sequence: its end is decoded alike.
        last = refine(decoder, free_body, seen.features[-WINDOW:], betas[-WINDOW:])
        torch.testing.assert_close(rotations[-1], last[-1], atol=1e-5, rtol=0)

    def test_of_another_encoder(self, decoder, free_body):
        torch.manual_seed(5)
        with pytest.raises(EncoderMismatchError, match=str(decoder.encoder)):
            Pipeline(HMR(ENCODER), decoder, free_body)
        with pytest.raises(ValueError, match="the decoder takes features of width 32, the encoder gives 16"):
            Pipeline(HMR(replace(ENCODER, head_dim=16)), decoder, free_body)

    def test_of_another_body(self, hmr, free_body, tmp_path):
        save_encoder(tmp_path / "encoder.ckpt", hmr, "other@0123")
        with pytest.raises(BodyMismatchError, match="other@0123"):
            load_pipeline(tmp_path / "encoder.ckpt", free_body)


class TestMistakes:
    def test_input(self, film, pipeline):
        frames, masks, boxes = film.frames, film.masks, film.boxes
        height, width = masks.shape[1:]
        swapped = boxes[:, [2, 1, 0, 3]]
        for arguments, message in (
            ((frames, masks[:4]), "there are 4 masks, but more frames: every frame needs its own"),
            ((frames[:2], masks, boxes), "there are 2 frames, but more masks and boxes"),
            ((frames, masks, boxes[:3]), "there are 3 boxes, but more frames and masks"),
            ((frames, masks[:, :-1]), f"mask 0 is {width} x {height - 1} px, its frame is {width} x {height} px"),
            ((frames, masks[..., None]), r"mask 0 is of shape \(.*, 1\)"),
            (([*frames[:2], frames[2, :9]], masks), f"frame 2 is {width} x 9 px, those before are {width} x {height}"),
            ((frames / 255, masks), r"frame 0 must be \(H, W, 3\) uint8 RGB, got .* float64"),
            ((frames[..., 0], masks), r"frame 0 must be \(H, W, 3\) uint8 RGB"),
            ((frames, masks / 2), "mask 0 must be bool, or whole numbers .* got float64"),
            ((frames, 0 * masks), "none of the 6 frames shows the person: their masks have fewer than 16 pixels"),
            ((frames, masks, boxes, 30.0, None, 9), "fewer than 16 pixels labelled 9"),
            ((frames, masks, boxes, 30.0, None, 0), "subject must be a label of at least 1"),
            ((frames[:0], masks[:0]), "there are no frames"),
            ((frames, masks, boxes[:, :3]), r"boxes must be \(T, 4\) .* got \(6, 3\)"),
            ((frames, masks, swapped), "box 0 must have x0 < x1 and y0 < y1"),
            ((frames, masks, boxes, 0.0), "fps must be positive, got 0"),
            ((frames, masks, boxes, 30.0, np.eye(2)), r"intrinsics must be a finite \(3, 3\) matrix"),
            ((frames, masks, boxes, 30.0, -np.eye(3)), r"intrinsics must be \[\[f, 0, cx\]"),
        ):
            with pytest.raises(ValueError, match=message):
                pipeline(*arguments)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"precision": "16"}, "precision must be one of .*bf16.* got '16'"),
            ({"mask_people": "none"}, "mask_people must be one of"),
            ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
            ({"least_person_px": 0}, "least_person_px must be"),
            ({"box_smoothing": -1}, "box_smoothing must be 0 frames or more, got -1"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            PipelineConfig(**settings)

    def test_weights_that_are_not_finite(self, film, free_body):
        hmr = HMR(ENCODER)
        with torch.no_grad():
            hmr.smpl_head.deccam.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="the encoder gave numbers that are not finite"):
            Pipeline(hmr, None, free_body)(film.frames, film.masks)


def test_the_crop_is_where_the_boxes_say(film, hmr, pipeline):
    # A white blot in a black picture, at a place in the box: found at the same place in the crop.
    frames = np.zeros_like(film.frames[:1])
    center, size = film.clip.box_center[0], CROP_SCALE * film.clip.box_size[0]
    dot = np.rint(center + size * np.array([0.1, -0.2])).astype(int)
    frames[0, dot[1] - 9 : dot[1] + 10, dot[0] - 9 : dot[0] + 10] = 255
    frames[0] = cv2.GaussianBlur(frames[0], (0, 0), 6)
    images, _ = shown_to(hmr, pipeline, frames, film.masks[:1], film.boxes[:1])
    bright = images[0, 0] - images[0, 0].min()
    place = torch.stack([(bright.sum(k) * torch.arange(CROP_PX)).sum() / bright.sum() for k in (0, 1)]).numpy()
    expected = apply_affine(crop_affine(center, size, CROP_PX), dot[None])[0]
    np.testing.assert_allclose(place, expected, atol=0.05)
