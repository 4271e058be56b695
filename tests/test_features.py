"""FeatureDataModule: cached or live features give the same training; windows, padding, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clips import drawn_clip
from tiny_decoder import ENCODER, LENGTHS, WINDOW, data, fit, make_clips, make_encoder, make_prior, module

from datamodules.encoding import CHUNK_FRAMES, FrameEncoder, TrueFrames, cut_chunks
from datamodules.feature_cache import FeatureCache, FeatureCacheError
from datamodules.features import FeatureBatch, FeatureDataModule, LiveBatch
from datamodules.order import SampleId
from fasthmr.body import BodyMismatchError
from fasthmr.checkpoint import load_encoder
from fasthmr.data.batch import collate, person_mask
from fasthmr.data.shards import ClipStore
from fasthmr.data.transforms import Augmentation, make_sample
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.merging import TokenMerging
from fasthmr.precision import autocast, chosen_precision


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips") / "set")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "encoder.ckpt")


def ready(clips: Path, encoder: str, folder: Path, **settings) -> FeatureDataModule:
    module = data(clips, encoder, folder, **settings)
    module.prepare_data()
    module.setup()
    return module


@pytest.fixture(scope="module")
def cached(clips, encoder, tmp_path_factory) -> FeatureDataModule:
    return ready(clips, encoder, tmp_path_factory.mktemp("features"))


def same(one: FeatureBatch, other: FeatureBatch) -> bool:
    fields = [f.name for f in dataclasses.fields(one) if f.name != "keys"]
    return one.keys == other.keys and all(torch.equal(getattr(one, f), getattr(other, f)) for f in fields)


class TestFrames:
    def test_features_are_the_encoders_on_the_crops(self, cached, clips, encoder):
        clip, hmr = ClipStore(clips)[3], load_encoder(encoder)
        batch = collate([make_sample(clip, np.arange(20), np.random.default_rng(0), Augmentation.off())])
        with torch.no_grad(), autocast("auto", "cpu"):
            output = hmr(batch.network_input())
        truth, frames = cached._train_windows.frames.frames.frames(3, 0, 20)
        expected = (output.feature, output.rotations, output.betas, output.camera)
        assert all(torch.equal(a, b) for a, b in zip(frames, expected, strict=True))
        assert truth.key == clip.key and torch.equal(axis_angle_to_matrix(truth.pose), batch.rotations[0])
        assert (frames.features[0] - frames.features[10]).abs().max() > 1e-3

    def test_a_frames_bits_do_not_depend_on_the_window(self, encoder):
        clip, run = drawn_clip(frames=40), FrameEncoder(load_encoder(encoder))
        whole = run(cut_chunks(clip, 0, 40)[0], "cpu")
        for start, stop in ((0, 5), (30, 40), (33, 34), (3, 40)):
            chunks, skip = cut_chunks(clip, start, stop)
            part = run(chunks, "cpu").rows(skip, skip + stop - start)
            assert all(torch.equal(a, b) for a, b in zip(part, whole.rows(start, stop), strict=True))
        assert len(cut_chunks(clip, 33, 40)[0]) == 1 and cut_chunks(clip, 33, 40)[1] == 33 - CHUNK_FRAMES

    def test_masks_reach_the_encoder(self, encoder):
        hmr, clip = load_encoder(encoder), drawn_clip(frames=3)
        hmr.set_token_merging(TokenMerging(keep_tokens=100, per_layer=60))
        output = FrameEncoder(hmr, precision="32")(cut_chunks(clip, 0, 3)[0], "cpu")
        batch = collate([make_sample(clip, np.arange(3), np.random.default_rng(0), Augmentation.off())])
        with torch.no_grad():
            protected = hmr(batch.network_input(), person_mask=person_mask(batch))
        assert torch.equal(output.features, protected.feature)
        without = dataclasses.replace(clip, status={**clip.status, "masks": "missing"})
        with pytest.raises(ValueError, match="these clips have no masks: clip"):
            FrameEncoder(hmr)(cut_chunks(without, 0, 3)[0], "cpu")
        hmr.set_token_merging(None)
        assert FrameEncoder(hmr)(cut_chunks(without, 0, 3)[0], "cpu").features.isfinite().all()

    def test_frames_without_a_pose_label_do_not_count(self):
        clip = drawn_clip(frames=4)
        holes = dataclasses.replace(clip, valid=np.array([True, False, True, True]))
        assert TrueFrames.of(holes).valid.tolist() == [True, False, True, True]
        without = dataclasses.replace(clip, status={**clip.status, "pose": "missing"})
        assert not TrueFrames.of(without).valid.any()


class TestWindows:
    def test_a_function_of_seed_epoch_and_clip(self, cached, clips, encoder):
        again = ready(clips, encoder, cached.folder)
        other = ready(clips, encoder, cached.folder, seed=1)
        samples = [SampleId(epoch, 2) for epoch in range(8)]
        one, two, three = (
            [m._train_windows[s].features[0, 0, 0].item() for s in samples] for m in (cached, again, other)
        )
        assert one == two != three and len(set(one)) > 4

    def test_shorter_clips_are_padded(self, cached):
        window = cached._train_windows[SampleId(0, 0)]
        assert window.valid[0].tolist() == [True] * 5 + [False] * (WINDOW - 5)
        assert (window.features[0, 5:] == 0).all() and (window.rotations[0, 5:] == torch.eye(3)).all()

    def test_validation_sees_every_frame_once(self, cached):
        seen = [(b.keys[i], int(b.valid[i].sum())) for b in cached.val_dataloader() for i in range(len(b.keys))]
        frames = {f"clip{i:03d}": sum(n for key, n in seen if key == f"clip{i:03d}") for i in range(len(LENGTHS))}
        assert list(frames.values()) == list(LENGTHS)
        assert [n for key, n in seen if key == "clip002"] == [12, 12, 11]
        assert all(b.features.shape[1:] == (WINDOW, ENCODER.head_dim) for b in cached.val_dataloader())

    def test_loader_processes_read_the_same(self, cached, clips, encoder):
        apart = ready(clips, encoder, cached.folder, workers=1)
        for one, other in zip(cached.train_dataloader(), apart.train_dataloader(), strict=True):
            assert same(one, other)

    def test_statistics_are_of_clips_from_everywhere(self, cached):
        assert cached.first_windows(3).keys == ["clip000", "clip002", "clip005"]
        assert cached.first_windows(50).keys == [f"clip{i:03d}" for i in range(6)]


class TestCachedAndLive:
    def test_the_same_training_bit_for_bit(self, clips, encoder, cached, tmp_path):
        prior, states = make_prior(tmp_path / "prior.ckpt"), []
        for cache in (True, False):
            model = module(prior, encoder)
            trainer = fit(model, data(clips, encoder, cached.folder, cache=cache), tmp_path / f"{cache}", steps=4)
            states.append(model.state_dict() | {k: v for k, v in trainer.callback_metrics.items()})
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        assert states[0]["decoder.feature_deviation"].std() > 0

    def test_the_same_batches(self, clips, encoder, cached, tmp_path):
        live = ready(clips, encoder, tmp_path / "none", cache=False)
        assert not (tmp_path / "none").exists()
        for loaders in (
            (cached.train_dataloader(), live.train_dataloader()),
            (cached.val_dataloader(), live.val_dataloader()),
        ):
            for one, other in zip(*loaders, strict=True):
                assert isinstance(other, LiveBatch)
                assert same(one, live.transfer_batch_to_device(other, torch.device("cpu"), 0))
        assert same(cached.first_windows(4), live.first_windows(4))


class TestCache:
    #: that of the data module, which depends on the machine, and the other one
    ITS, OTHER = ("bf16", "32") if chosen_precision("auto", "cpu") == "bf16" else ("32", "bf16")

    def cache(self, clips: Path, encoder: str, folder: Path, scale: float = 1.2, **settings) -> FeatureCache:
        net = FrameEncoder(load_encoder(encoder), **{"precision": self.ITS, **settings})
        return FeatureCache(folder, ClipStore(clips), net, scale)

    def test_what_is_there_is_not_computed_again(self, clips, encoder, tmp_path):
        cache = self.cache(clips, encoder, tmp_path)
        run, frames = cache.encoder, []

        def counting(chunks, device, limit: int = 1000):
            frames.append(chunks[0].valid.numel())
            if sum(frames) > limit:
                raise KeyboardInterrupt
            return run(chunks, device)

        cache.encoder = functools.partial(counting, limit=sum(LENGTHS[:4]))
        with pytest.raises(KeyboardInterrupt):  # in the second shard
            cache.fill("cpu", progress=False)
        assert [p.name for p in cache.folder.iterdir()] == ["shard-000000.pt"]
        with pytest.raises(FeatureCacheError, match=r"shard-000001\.pt is missing"):
            cache.open()
        cache.encoder = counting
        for left in (sum(LENGTHS[3:]), 0):
            frames.clear()
            cache.fill("cpu", progress=False)
            assert sum(frames) == left
        assert len(cache.open().frames(2, 30, 35)[1].features) == 5

    def test_everything_that_matters_has_its_own_folder(self, clips, encoder, tmp_path):
        other_set = make_clips(tmp_path / "other", LENGTHS[:4])
        caches = [
            self.cache(clips, encoder, tmp_path),
            self.cache(clips, make_encoder(tmp_path / "tuned.ckpt", seed=1), tmp_path),
            self.cache(clips, encoder, tmp_path, mask_people="all"),
            self.cache(clips, encoder, tmp_path, precision=self.OTHER),
            self.cache(clips, encoder, tmp_path, scale=1.3),
            self.cache(other_set, encoder, tmp_path),
        ]
        assert len({cache.folder for cache in caches}) == len(caches)
        assert self.cache(clips, encoder, tmp_path).folder == caches[0].folder

    def test_a_file_of_something_else_is_refused(self, clips, encoder, cached, tmp_path):
        mine = self.cache(clips, encoder, cached.folder)
        others = self.cache(clips, make_encoder(tmp_path / "tuned.ckpt", seed=1), tmp_path)
        shutil.copytree(mine.folder, others.folder)
        message = rf"shard-000000\.pt holds features of something else \(encoder: {mine.of['encoder']} -> "
        with pytest.raises(FeatureCacheError, match=message):
            others.open()
        with pytest.raises(FeatureCacheError, match=message):
            others.fill("cpu", progress=False)

    def test_a_damaged_file_is_named(self, clips, encoder, cached, tmp_path):
        cache = self.cache(clips, encoder, tmp_path)
        shutil.copytree(self.cache(clips, encoder, cached.folder).folder, cache.folder)
        path = cache.folder / "shard-000001.pt"
        content = bytearray(path.read_bytes())
        features = torch.load(path, weights_only=True)["features"].numpy().tobytes()
        content[content.find(features) + 10] ^= 1
        path.write_bytes(content)
        with pytest.raises(FeatureCacheError, match=r"shard-000001\.pt is damaged .*; remove it to compute it again"):
            cache.open()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(FeatureCacheError, match="remove it to compute it again"):
            cache.fill("cpu", progress=False)


class TestRefused:
    def batch(self, **fields) -> FeatureBatch:
        turned = torch.eye(3).expand(2, 4, 24, 3, 3)
        return FeatureBatch(
            **{
                "keys": ["a", "b"],
                "features": torch.zeros(2, 4, 8),
                "rotations": turned,
                "betas": torch.zeros(2, 10),
                "predicted_rotations": turned,
                "predicted_betas": torch.zeros(2, 4, 10),
                "camera": torch.zeros(2, 4, 3),
                "valid": torch.ones(2, 4, dtype=torch.bool),
                "fps": torch.ones(2),
                **fields,
            }
        )

    def test_motion_that_is_not_finite_names_the_clip(self):
        rotations = torch.eye(3).repeat(2, 4, 24, 1, 1)
        rotations[1, 2, 5] = torch.nan
        with pytest.raises(ValueError, match="rotations holds numbers that are not finite, in the clips: b"):
            self.batch(rotations=rotations)
        with pytest.raises(ValueError, match="fps holds numbers that are not finite, in the clips: a"):
            self.batch(fps=torch.tensor([torch.inf, 30]))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"features": torch.zeros(2, 8)}, r"features must have shape \(B, T, D\), got \(2, 8\)"),
            ({"features": torch.zeros(2, 5, 8)}, r"rotations must be torch.float32 of shape \(2, 5, 24, 3, 3\)"),
            ({"betas": torch.zeros(2, 4, 10)}, r"betas must be torch.float32 of shape \(2, 10\)"),
            ({"valid": torch.ones(2, 4)}, r"valid must be torch.bool of shape \(2, 4\), got torch.float32"),
            ({"keys": ["a"]}, r"keys must name the 2 clips of the batch, got 1"),
        ],
    )
    def test_shapes(self, fields, message):
        with pytest.raises(ValueError, match=message):
            self.batch(**fields)

    def test_another_body(self, clips, encoder, tmp_path):
        with pytest.raises(BodyMismatchError, match="other@01"):
            data(clips, make_encoder(tmp_path / "e.ckpt", body="other@01"), tmp_path).prepare_data()
        others = make_clips(tmp_path / "others", LENGTHS[:2], body="other@02")
        with pytest.raises(BodyMismatchError, match="other@02"):
            data(others, encoder, tmp_path, cache=False).setup()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"window": 2}, "window must be at least 3"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message, clips, encoder):
        with pytest.raises(ValueError, match=message):
            data(clips, encoder, Path("features"), **settings)

    def test_choices_that_cannot_be(self, encoder):
        for name in ("mask_people", "precision"):
            with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'none'"):
                FrameEncoder(load_encoder(encoder), **{name: "none"})

    def test_a_run_goes_on_with_its_own_data_only(self, cached, clips, encoder, tmp_path):
        other = ready(make_clips(tmp_path / "other", LENGTHS[:4]), encoder, tmp_path)
        other.load_state_dict(cached.state_dict())
        with pytest.raises(ValueError, match="order of training data cannot be continued"):
            other.train_dataloader()
