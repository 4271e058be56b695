"""Mixtures: each set has its share, runs resume exactly, missing labels do not count, and the paper's configs train."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import foreign_sets as foreign
import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fit import MIXTURES, QUICK, ROOT, TINY_NET
from tiny_decoder import WINDOW, make_clips, make_encoder
from tiny_training import Seen, make_set, quiet

from datamodules.clips import ClipDataModule
from datamodules.features import FeatureBatch, FeatureDataModule, LiveWindow
from datamodules.mixture import shares_of
from datamodules.order import MixtureOrder, SampleId, dealt_out
from fasthmr.body import BodyMismatchError, BodyModel
from fasthmr.data.batch import ClipBatch, collate
from fasthmr.data.index import MANIFEST, Manifest
from fasthmr.data.masks import clips_id
from fasthmr.data.shards import ClipStore, ShardError
from fasthmr.data.synth.source import SynthConfig
from fasthmr.data.transforms import Augmentation, make_sample
from fasthmr.evaluation_stage import EvaluationStage
from fasthmr.fit import fit
from fasthmr.lit.encoder import MergedEncoderModule
from fasthmr.models.hmr import HMRConfig
from fasthmr.resume import MAY_CHANGE, matches
from fasthmr.shard import main as shard

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
TINY = HMRConfig(
    vit_dim=32, vit_depth=2, vit_heads=2, head_dim=32, head_depth=1, head_heads=2, head_dim_head=16, head_mlp_dim=32
)

# ---- the order, without data ----------------------------------------------------------------------------------------

SIZES = {"large": 1000, "middle": 100, "small": 7}
SHARES = {"large": 0.2, "middle": 0.5, "small": 0.3}


def order(done: int = 0, rank: int = 0, **changes) -> MixtureOrder:
    settings = {"sizes": SIZES, "shares": SHARES, "samples": 203, "batch_size": 4, "seed": 3, **changes}
    return MixtureOrder(batches_done=lambda: done, rank=rank, world_size=2, **settings)


def epochs(count: int) -> list[list[SampleId]]:
    """The samples of whole epochs over both ranks: 25 steps of 2 x 4 each."""
    ranks = [order(rank=rank) for rank in range(2)]
    return [[s for n in range(25 * e, 25 * e + 25) for o in ranks for s in o.batch(n)] for e in range(count)]


def set_of(clip: int) -> str:
    return "large" if clip < 1000 else "middle" if clip < 1100 else "small"


def test_every_epoch_has_each_set_in_exactly_its_share() -> None:
    places = [[set_of(sample.clip) for sample in samples] for samples in epochs(2)]
    for sets in places:
        assert Counter(sets) == {"large": 40, "middle": 100, "small": 60}
    assert places[0] != places[1], "in other places each time"


def test_a_set_is_shown_whole_before_any_of_it_comes_again_and_never_alike() -> None:
    shown = Counter(s.clip for samples in epochs(5) for s in samples)
    assert {shown[clip] for clip in range(1000)} == {0, 1}, "5 x 40 of a thousand"
    assert {shown[clip] for clip in range(1000, 1100)} == {5}
    assert {shown[clip] for clip in range(1100, 1107)} == {42, 43}
    every = [s for samples in epochs(5) for s in samples]
    assert len(set(every)) == len(every), "a sample's random numbers follow from it"


def test_the_order_of_a_mixture_continues_from_any_batch_on_any_rank() -> None:
    for rank in range(2):
        whole = [*order(0, rank), *order(25, rank)]
        for done in range(0, 30, 7):
            rest = list(order(done, rank))
            assert rest == whole[done : done + len(rest)] and (done + len(rest)) % 25 == 0


@pytest.mark.parametrize(("total", "shares"), [(10, [1 / 3] * 3), (10, [0.3, 0.7]), (7, [0.05, 0.05, 0.9]), (0, [1.0])])
def test_counts_add_up_and_are_within_one_of_the_shares(total: int, shares: list[float]) -> None:
    counts = dealt_out(total, dict(enumerate(shares)))
    assert sum(counts.values()) == total
    assert all(abs(counts[i] - share * total) < 1 for i, share in enumerate(shares))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 7}, r"needs 4 clips on each of 2 rank.*has only 7"),
        (
            {"shares": {"large": 0.998, "middle": 0.001, "small": 0.001}},
            "set 'middle' has a share of 0.001, which is no",
        ),
    ],
)
def test_an_epoch_that_is_too_short_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order(**changes)


# ---- in a trainer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 clips of 4 frames, and 5 of 1."""
    directory = tmp_path_factory.mktemp("sets")
    make_set(directory / "clips", 7)
    make_set(directory / "stills", 5, frames=1)
    return directory


def module(data: Path, **settings) -> ClipDataModule:
    settings = {
        "train": {name: str(data / name) for name in ("clips", "stills")}, "val": data / "clips",
        "weights": {"clips": 3, "stills": 1}, "frames_per_clip": 1, "val_frames": 3, "batch_size": 2, "workers": 0,
        "clips_per_epoch": 12, **settings,
    }  # fmt: skip
    return ClipDataModule(**settings)


def seen(data: Path, ckpt_path: Path | None = None, save: Path | None = None, epochs: int = 2, **settings):
    """What a run is shown: (number of the batch, clips, digest of pixels and labels)."""
    quiet()
    watch = Seen()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, limit_val_batches=0, logger=False,
        use_distributed_sampler=False, enable_checkpointing=save is not None, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(save, "{step}", every_n_train_steps=1, save_top_k=-1)] if save else [],
    )  # fmt: skip
    trainer.fit(watch, datamodule=module(data, **settings), ckpt_path=ckpt_path)
    return watch.trained


def test_a_resumed_mixture_is_shown_what_an_uninterrupted_one_is(data: Path, tmp_path: Path) -> None:
    whole = seen(data, save=tmp_path)
    assert [number for number, _, _ in whole] == list(range(12)), "2 epochs of 12 clips in batches of 2"
    for step in (2, 6, 9):  # in an epoch, at its end, in another one
        assert seen(data, ckpt_path=tmp_path / f"step={step}.ckpt") == whole[step:]
    assert seen(data, workers=1) == whole, "loader processes change nothing"
    swapped = {name: str(data / name) for name in ("stills", "clips")}
    assert seen(data, train=swapped, weights={"stills": 0.1, "clips": 0.3}) == whole, "order and scale mean nothing"
    for change, message in (
        ({"weights": {"clips": 1, "stills": 1}}, r"shares: \{'clips': 0.75, 'stills': 0.25\} -> \{'clips': 0.5"),
        ({"clips_per_epoch": 10}, "clips_per_epoch: 12 -> 10"),
        ({"train": {"clips": str(data / "stills"), "stills": str(data / "clips")}}, "clips: "),
    ):
        with pytest.raises(ValueError, match=f"cannot be continued .*{message}"):
            seen(data, ckpt_path=tmp_path / "step=2.ckpt", **change)
    moved = "data.init_args.train.clips"
    assert matches(moved, MAY_CHANGE) and not matches("data.init_args.weights.clips", MAY_CHANGE)


def test_shares_are_the_same_in_any_order_of_the_keys() -> None:
    weights = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    orders = [dict(order) for order in itertools.permutations(weights.items())]
    assert all(shares_of(order, order) == shares_of(weights, weights) for order in orders)


def test_a_single_set_does_not_go_on_as_a_mixture(data: Path) -> None:
    one = ClipDataModule(data / "clips", data / "clips", workers=0, frames_per_clip=1, batch_size=2, val_frames=3)
    one.setup("fit")
    mixed = module(data, train={"only": str(data / "clips")}, weights={"only": 1.0}, clips_per_epoch=4)
    mixed.setup("fit")
    mixed.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"cannot be continued .*shares: None -> "):
        mixed.train_dataloader()


def test_a_mixture_of_one_set_is_that_set(data: Path) -> None:
    one, single = {"only": str(data / "clips")}, data / "clips"
    plain = {"clips_per_epoch": None, "frames_per_clip": 2}
    assert seen(data, train=one, weights={"only": 1.0}, **plain) == seen(data, train=single, weights=None, **plain)


def test_the_start_says_what_an_epoch_is_made_of(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = module(data, clips_per_epoch=None, batch_size=4)
    loaded.setup("fit")
    with caplog.at_level(logging.INFO, "datamodules.clips"):
        loaded.train_dataloader()
    assert caplog.messages == [
        "a mixture; an epoch is 3 steps:\n"
        "set     clips  frames  share  samples an epoch  passes an epoch\n"
        "clips       7      28  75.0%                 9             1.29\n"
        "stills      5       5  25.0%                 3             0.60"
    ]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"clips": 1.0, "stills": 0.0}}, r"weights\.stills must be positive, got 0"),
        ({"weights": {"clips": 1.0, "stills": -1.0}}, r"weights\.stills must be positive, got -1"),
        ({"weights": {"clips": 1.0, "stills": float("nan")}}, r"weights\.stills must be positive, got nan"),
        ({"weights": {"clips": 1.0}}, r"same sets.*\['clips', 'stills'\] and \['clips'\]"),
        ({"weights": None}, r"same sets.*\['clips', 'stills'\] and \[\]"),
        ({"train": {}, "weights": {}}, "one or more"),
        ({"train": "folder", "clips_per_epoch": None}, "weights are for mixtures"),
        ({"streaming": True}, "set streaming to false"),
        ({"make_train": SynthConfig(clips=1, frames=4)}, "make_train to null"),
        ({"clips_per_epoch": 0}, "clips_per_epoch must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_mixture_are_named(data: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(data, **settings)


def with_third(data: Path, folder: Path) -> ClipDataModule:
    sets = {"clips": str(data / "clips"), "stills": str(data / "stills"), "third": str(folder)}
    return module(data, train=sets, weights=dict.fromkeys(sets, 1.0))


def test_sets_that_cannot_be_mixed_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sets 'clips' and 'third' are the same clips"):
        with_third(data, data / "clips").setup()
    shutil.copytree(data / "clips", tmp_path / "masked")
    manifest = Manifest.read(data / "clips")
    masked = {"kind": "masked", "body": manifest.body, "shards": clips_id(manifest)}
    others = {name: "0" * 64 for name in manifest.shards}
    (tmp_path / "masked" / MANIFEST).write_text(json.dumps(vars(manifest) | {"source": masked, "shards": others}))
    with pytest.raises(ValueError, match="sets 'clips' and 'third' are the same clips"):
        with_third(data, tmp_path / "masked").setup()
    make_set(tmp_path / "other", 1, body="somebody@123")
    with pytest.raises(BodyMismatchError, match=r"sets 'clips' and 'third' .*'free@.*clips\).*'somebody@123'.*other\)"):
        with_third(data, tmp_path / "other").setup()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/job.json").touch()
    with pytest.raises(ShardError, match=r"no set of shards in .*unfinished: it is not finished"):
        with_third(data, tmp_path / "unfinished").setup()
    (tmp_path / "empty").mkdir()
    content = json.loads((data / "clips" / MANIFEST).read_text()) | {"clips": 0, "frames": 0, "shards": {}}
    (tmp_path / "empty" / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"set 'third' in .*empty has no clips"):
        with_third(data, tmp_path / "empty").setup()
    with pytest.raises(ValueError, match=r"stills has 1 frames, fewer than frames_per_clip=2"):
        module(data, frames_per_clip=2).setup()


# ---- the field's sets, in miniature: clips and stills, some without labels -----------------------------------------


def convert(name: str, root: Path, out: Path, *options: str) -> None:
    assert shard(["convert", name, "--root", str(root), "--out", str(out), "--workers=1", *options]) == 0


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, free_body: BodyModel) -> Path:
    """The folders that conf/train_*.yaml name: all converted, those without masks given some."""
    out, raw = tmp_path_factory.mktemp("converted"), tmp_path_factory.mktemp("raw")
    made = foreign.take(free_body, seed=8, size=(160, 120), still=True)
    foreign.write_bedlam(raw / "bedlam", "scene", made)
    foreign.write_h36m_hybrik(raw / "h36m", made)
    foreign.write_3dhp_neural_annot(raw / "mpi_inf_3dhp", made)
    bare = foreign.hmr2_person(made, 0, has_body_pose=0.0, has_betas=0.0, keypoints_3d=np.zeros((44, 4)))
    members = foreign.hmr2_members("000001", made, 0, [foreign.hmr2_person(made, 0), bare])
    foreign.write_tar(raw / "4dhumans/coco/000000.tar", members)
    labels = foreign.bedlam_labels(made, [f"{i}.jpg" for i in range(4)])
    (raw / "camerahmr/labels").mkdir(parents=True)
    np.savez(raw / "camerahmr/labels/coco-release.npz", **{k: v for k, v in labels.items() if k != "sub"})
    for i, image in enumerate(made.images):
        foreign.write_picture(raw / f"camerahmr/images/coco/{i}.jpg", image)
    for name in ("bedlam", "h36m", "mpi_inf_3dhp", "4dhumans", "camerahmr"):
        convert(name, raw / name, raw / "sets" / name)
        for key, frames in ClipStore(raw / "sets" / name).lengths():
            for i in range(frames):
                foreign.write_picture(raw / "masks" / key / f"{i:05d}.png", np.full((120, 160, 3), 255, np.uint8))
        command = ["masks", str(raw / "sets" / name), "--out", str(out / name), "--by=folder", "--source"]
        assert shard([*command, str(raw / "masks"), "--workers=1"]) == 0
    (out / "h36m_test").symlink_to(out / "h36m")
    return out


@pytest.fixture(scope="module")
def mixed(sets: Path) -> ClipBatch:
    """A frame of a clip, a still, and a still without pose, shape and 3D joints."""
    still, bare = ClipStore(sets / "4dhumans")
    clips = (ClipStore(sets / "bedlam")[0], still, bare)
    return collate([make_sample(clip, [0], np.random.default_rng(0), Augmentation()) for clip in clips])


@pytest.mark.parametrize("architecture", ["hmr2", "camerahmr"])
def test_missing_labels_do_not_contribute(mixed: ClipBatch, architecture: str) -> None:
    assert mixed.has_pose.tolist() == mixed.has_betas.tolist() == [True, True, False]
    assert mixed.joints3d[2, ..., 3].max() == 0 < mixed.joints2d[2, ..., 2].max()
    torch.manual_seed(0)
    net = replace(TINY, architecture=architecture)
    encoder = MergedEncoderModule(net, ema_decay=None).eval()

    def parts_and_gradient(batch: ClipBatch) -> tuple[dict[str, float], torch.Tensor]:
        parts = encoder.loss(batch)
        (gradient,) = torch.autograd.grad(parts["total"], [encoder.net.smpl_head.decpose.weight])
        return {name: value.item() for name, value in parts.items()}, gradient

    def changed(clip: int, value: float) -> ClipBatch:
        """Other numbers where clip `clip` may have no labels."""
        fields = {name: getattr(mixed, name).clone() for name in ("rotations", "betas", "joints3d", "translation")}
        fields["rotations"][clip] = fields["betas"][clip] = fields["translation"][clip] = value
        fields["joints3d"][clip, ..., :3] = value
        return replace(mixed, **fields)

    parts, gradient = parts_and_gradient(mixed)
    assert all(np.isfinite(list(parts.values()))) and gradient.isfinite().all() and gradient.any()
    for value in (7.0, float("nan")):
        other_parts, other_gradient = parts_and_gradient(changed(2, value))
        assert other_parts == parts and torch.equal(other_gradient, gradient)
    with_labels, _ = parts_and_gradient(changed(1, 7.0))
    assert with_labels["root"] > parts["root"] and with_labels["betas"] > parts["betas"], "the test can tell"


def test_a_still_without_a_camera_gets_one(sets: Path) -> None:
    sample = make_sample(ClipStore(sets / "4dhumans")[0], [0], np.random.default_rng(0), Augmentation.off())
    assert sample.intrinsics.tolist() == [[200, 0, 80], [0, 200, 60], [0, 0, 1]]


# ---- features, for the decoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_windows_of_a_mixture_are_those_of_its_sets(tmp_path: Path, cache: bool) -> None:
    sets = {"long": make_clips(tmp_path / "long", (20, 13)), "short": make_clips(tmp_path / "short", (5, 1, 12))}
    encoder = make_encoder(tmp_path / "encoder.ckpt")

    def windows(train: object, weights: dict[str, float] | None, clips_per_epoch: int | None) -> FeatureDataModule:
        data = FeatureDataModule(
            train, sets["long"], encoder, tmp_path / "features", cache=cache, window=WINDOW, batch_size=2, workers=0,
            weights=weights, clips_per_epoch=clips_per_epoch,
        )  # fmt: skip
        data.prepare_data()
        data.setup()
        return data

    def numbers(window: FeatureBatch | LiveWindow) -> torch.Tensor:
        return window.features if isinstance(window, FeatureBatch) else window.chunks[0].images

    mixed = windows({name: str(folder) for name, folder in sets.items()}, {"long": 1, "short": 3}, 8)
    short = windows(sets["short"], None, None)
    first = mixed._train_windows[SampleId(0, 2)]  # clip 0 of the second set
    assert torch.equal(numbers(first), numbers(short._train_windows[SampleId(0, 0)]))
    samples = [sample for batch in mixed.train_dataloader().batch_sampler for sample in batch]
    assert Counter(sample.clip >= 2 for sample in samples) == {True: 6, False: 2}
    if cache:
        assert all(batch.features.isfinite().all() for batch in mixed.train_dataloader())


# ---- the configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", MIXTURES, ids=lambda p: p.name)
def test_the_papers_mixtures_train(
    config: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = [
        f"--data_dir={sets}", "--model.init_args.body=free", "--model.init_args.init_from=null",
        "--model.init_args.net.vit_depth=4", "--data.init_args.workers=0", "--data.init_args.batch_size=8",
        "--data.init_args.clips_per_epoch=24", "--data.init_args.val_frames=4", "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1", "--data.init_args.weights.bedlam=0.2",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, "datamodules.clips"):
        result = fit(["-c", str(config), *TINY_NET, *QUICK, *keys, "--run_dir=run"])["fit"]
    assert result.metrics["val/mpjpe_mm"] > 0
    assert "a mixture; an epoch is 3 steps" in caplog.text
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["init_args"]
    assert saved["weights"]["bedlam"] == 0.2 and saved["train"]["bedlam"] == str(sets / "bedlam")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for part in ("root", "rotations", "betas", "joints3d", "joints2d", "total"):
        values = [event.value for event in events.Scalars(f"train/loss_{part}")]
        assert len(values) == 2 and np.isfinite(values).all() and min(values) > 0, part


@pytest.mark.parametrize(("name", "protocol"), [("3dpw", "3dpw-14"), ("emdb", "emdb-24")])
def test_evaluation_configs_are_as_the_paper_evaluates(name: str, protocol: str) -> None:
    resolved = yaml.safe_load(EvaluationStage(["-c", str(ROOT / f"conf/evaluate_{name}.yaml")]).resolved)
    assert resolved["protocol"] == protocol and resolved["boxes"] == "truth" and resolved["frames_per_clip"] is None
    assert {resolved[key] for key in ("body", "body_male", "body_female")} == {
        f"SMPL_{gender}.pkl" for gender in ("NEUTRAL", "MALE", "FEMALE")
    }
