"""`python -m fasthmr.evaluate`: the numbers of several systems on the same clips, and what is written about them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_decoder import DENOISER, ENCODER, LENGTHS, PRIOR, WINDOW, make_clips, make_encoder
from tiny_training import make_set

import fasthmr.evaluation.measuring as measuring
from fasthmr.benchmark import main as benchmark
from fasthmr.body import BodyModel
from fasthmr.checkpoint import encoder_id, load_decoder, load_encoder, save_decoder, save_encoder, save_pipeline
from fasthmr.comparison import Bootstrap, SequenceErrors, compare, pooled, tables
from fasthmr.data.batch import collate
from fasthmr.data.shards import ClipStore
from fasthmr.data.transforms import Augmentation, make_sample
from fasthmr.evaluate import main
from fasthmr.evaluation import EvaluationConfig, SystemConfig, evaluate, parse_systems
from fasthmr.merging import TokenMerging
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.models.denoiser import DenoiserConfig
from fasthmr.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig
from fasthmr.models.sampler import DiffusionConfig
from fasthmr.sequence import refine

EXACT = EvaluationConfig(precision="32", speed=False, workers=0, bootstrap=50)
QUICK = ["--precision=32", "--speed=false", "--workers=0", "--bootstrap=50"]


def make_decoder(path: Path, encoder: str, body: str, residual: bool = False) -> str:
    torch.manual_seed(1)
    read = ENCODER.head_dim + (PRIOR.pose_dim if residual else 0)
    sizes = {"feature_dim": read, "window": WINDOW, "latents": PRIOR.latents, "dim": PRIOR.dim}
    denoiser = DenoiserConfig(**sizes, depth=DENOISER.depth, heads=DENOISER.heads, mlp_dim=DENOISER.mlp_dim)
    number = encoder_id(load_encoder(encoder))
    config = DiffusionDecoderConfig(PRIOR, denoiser, DiffusionConfig(residual=residual))
    save_decoder(path, DiffusionDecoder(config, number), body, number)
    return str(path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, free_body) -> Path:
    """Clips of 5, 12, 35, 20, 13 and 1 frames, encoders with and without token merging, and a decoder."""
    folder = tmp_path_factory.mktemp("lab")
    make_clips(folder / "val")
    make_encoder(folder / "encoder.ckpt")
    make_decoder(folder / "decoder.ckpt", str(folder / "encoder.ckpt"), free_body.id)
    make_decoder(folder / "correcting.ckpt", str(folder / "encoder.ckpt"), free_body.id, residual=True)
    merging = load_encoder(folder / "encoder.ckpt")
    merging.set_token_merging(TokenMerging(keep_tokens=120, per_layer=60))
    save_encoder(folder / "merging.ckpt", merging, free_body.id)
    return folder


@pytest.fixture(scope="module")
def out(lab, tmp_path_factory) -> Path:
    """What the command writes of an encoder alone and with the decoder."""
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    run(lab, out, systems=["alone={lab}/encoder.ckpt", "decoded={lab}/encoder.ckpt+{lab}/decoder.ckpt"])
    return out


def run(lab: Path, out: Path, *arguments: str, systems: Sequence[str] = ("{lab}/encoder.ckpt",)) -> dict[str, Any]:
    """What is in results.json after the command."""
    given = [text.format(lab=lab) for text in (*systems, *QUICK, "--data={lab}/val", *arguments)]
    assert main([*given, f"--out={out}"]) == 0
    return json.loads((out / "results.json").read_text())


def values(system: dict[str, Any]) -> dict[str, float]:
    return {metric: estimate["value"] for metric, estimate in system["errors"].items()}


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "sequences.csv").open()))


@torch.no_grad()
def by_hand(lab: Path, body: BodyModel, with_decoder: bool) -> dict[str, torch.Tensor]:
    """The errors, from the network's own functions."""
    hmr, (decoder, _) = load_encoder(lab / "encoder.ckpt"), load_decoder(lab / "decoder.ckpt")
    errors = PoseErrors(PROTOCOLS["body-24"])
    for clip in ClipStore(lab / "val"):
        index = np.arange(len(clip))
        batch = collate([make_sample(clip, index, np.random.default_rng(0), Augmentation.off())])
        output = hmr(batch.network_input())
        betas = output.betas.mean(0, keepdim=True).expand(len(clip), -1)
        rotations = refine(decoder, body, output.feature, betas) if with_decoder else output.rotations
        mesh, truth = body(rotations, betas), body(batch.rotations[0], batch.betas.expand(len(clip), -1))
        errors.update(
            mesh.joints[None], truth.joints[None], mesh.vertices[None], truth.vertices[None], batch.valid, batch.fps
        )
    return errors.compute()


class TestNumbers:
    def test_are_the_metrics_of_all_frames_of_all_clips(self, lab, out, free_body):
        alone, decoded = json.loads((out / "results.json").read_text())["systems"]
        for system, with_decoder in ((alone, False), (decoded, True)):
            for metric, expected in by_hand(lab, free_body, with_decoder).items():
                assert values(system)[metric] == pytest.approx(float(expected), rel=1e-3), metric
        assert abs(values(alone)["mpjpe_mm"] - values(decoded)["mpjpe_mm"]) > 1

    def test_each_sequence_has_a_row_and_rows_pool_to_the_table(self, out):
        results = json.loads((out / "results.json").read_text())
        for system in results["systems"]:
            own = [row for row in rows(out) if row["system"] == system["name"]]
            assert [int(row["frames"]) for row in own] == list(LENGTHS)
            frames = np.array([int(row["labelled"]) for row in own])
            mean = np.average([float(row["pve_mm"]) for row in own], weights=frames)
            assert values(system)["pve_mm"] == pytest.approx(mean, rel=1e-12)
            accelerations = np.array([int(row["accelerations"]) for row in own])
            assert accelerations.tolist() == [max(0, n - 4) for n in LENGTHS]
            jitter = [float(row["jitter_m_s2"] or 0) for row in own]
            assert values(system)["jitter_m_s2"] == pytest.approx(np.average(jitter, weights=accelerations), rel=1e-12)
            assert values(system)["mpjpe_mm"] == pytest.approx(np.mean(system["joints_mm"]), rel=1e-6)

    def test_a_clip_of_one_frame_has_no_acceleration(self, out):
        (row,) = (row for row in rows(out) if row["sequence"] == "clip005" and row["system"] == "alone")
        assert row["accel_m_s2"] == row["jitter_m_s2"] == "" and float(row["mpjpe_mm"]) > 0

    def test_jitter_is_the_acceleration_and_the_truths_is_the_same_for_all(self, out, lab, free_body):
        results = json.loads((out / "results.json").read_text())
        (truth,) = {values(system)["true_jitter_m_s2"] for system in results["systems"]}
        sums = count = 0.0
        for clip in ClipStore(lab / "val"):
            batch = collate([make_sample(clip, np.arange(len(clip)), np.random.default_rng(0), Augmentation.off())])
            joints = free_body(batch.rotations[0], batch.betas.expand(len(clip), -1)).joints.double()
            joints = joints - joints[:, [1, 2]].mean(1, keepdim=True)
            second = (joints[2:] - 2 * joints[1:-1] + joints[:-2])[1:-1] * clip.fps**2
            sums, count = sums + float(second.norm(dim=-1).mean(-1).sum()), count + len(second)
        assert truth == pytest.approx(sums / count, rel=1e-3)

    def test_what_it_was_made_of_is_written_down(self, out, lab):
        results = json.loads((out / "results.json").read_text())
        alone, decoded = results["systems"]
        assert alone["encoder"] == decoded["encoder"] == encoder_id(load_encoder(lab / "encoder.ckpt"))
        assert alone["decoder"] is None and len(decoded["decoder"]) == 16
        assert results["data"]["sequences"] == 6 and results["data"]["frames"] == sum(LENGTHS)
        assert results["data"]["manifest"]["shards"] and results["config"]["precision"] == "32"
        assert results["machine"]["threads"] >= 1 and results["processes"] == 1
        assert (
            decoded["cost"]["macs_thop"]
            > alone["cost"]["macs_thop"]
            == decoded["cost"]["macs_thop"] - (decoded["cost"]["decoder_macs_thop"] / decoded["cost"]["stride"])
        )

    def test_the_protocol_stands_on_top_of_the_table(self, out):
        text = (out / "table.md").read_text()
        assert text.startswith(f"Protocol {PROTOCOLS['body-24'].describe()}")
        assert "Encoders in float32 on cpu" in text and "Difference to alone" in text
        line = next(line for line in text.splitlines() if line.startswith("| decoded"))
        shown = values(json.loads((out / "results.json").read_text())["systems"][1])
        assert f" {shown['mpjpe_mm']:.2f} " in line

    def test_pictures(self, out):
        for name in ("joints.png", "error_over_time.png", "jitter_over_time.png"):
            assert cv2.imread(str(out / name)).std() > 10
        assert not (out / "accuracy_and_speed.png").exists()  # no speed was measured

    def test_a_pipeline_in_one_file_gives_the_numbers_of_the_pair(self, out, lab, tmp_path, free_body):
        hmr, (decoder, _) = load_encoder(lab / "encoder.ckpt"), load_decoder(lab / "decoder.ckpt")
        save_pipeline(tmp_path / "pipeline.ckpt", hmr, decoder, free_body.id)
        (system,) = run(lab, tmp_path / "out", systems=[f"{tmp_path}/pipeline.ckpt"])["systems"]
        assert values(system) == values(json.loads((out / "results.json").read_text())["systems"][1])


class TestWhatIsEvaluated:
    def test_an_encoder_that_systems_share_sees_its_frames_once(self, lab, tmp_path, monkeypatch):
        calls = []

        class Counted(measuring.FrameEncoder):
            def __call__(self, *arguments: Any) -> Any:
                calls.append(self.id)
                return super().__call__(*arguments)

        monkeypatch.setattr(measuring, "FrameEncoder", Counted)
        pair = "{lab}/encoder.ckpt+{lab}/decoder.ckpt"
        run(lab, tmp_path / "o", "--max_clips=2", systems=["a={lab}/encoder.ckpt", f"b={pair}", "c={lab}/merging.ckpt"])
        assert len(calls) == 2 * 2 and len(set(calls)) == 2

    def test_all_tokens(self, lab, tmp_path):
        systems = ["{lab}/encoder.ckpt", "{lab}/merging.ckpt", "{lab}/merging.ckpt@all_tokens"]
        encoder, merging, unmerged = run(lab, tmp_path / "o", "--max_clips=2", systems=systems)["systems"]
        assert unmerged["name"] == "merging, all tokens"
        assert values(unmerged) == values(encoder) and unmerged["encoder"] == encoder["encoder"]
        assert values(merging) != values(encoder)

    def test_some_frames_of_some_clips(self, lab, tmp_path):
        run(lab, tmp_path / "all")
        results = run(lab, tmp_path / "some", "--frames_per_clip=8", "--max_clips=3", "--show=clip002")
        assert [(row["sequence"], row["frames"]) for row in rows(tmp_path / "some")] == [
            ("clip000", "5"), ("clip002", "8"), ("clip005", "1"),
        ]  # fmt: skip
        assert results["data"]["frames"] == 14
        assert rows(tmp_path / "some")[0] == rows(tmp_path / "all")[0]

    def test_only_clips_of_one_frame(self, lab, tmp_path):
        make_set(tmp_path / "val", 2, frames=1)
        (system,) = run(lab, tmp_path / "o", f"--data={tmp_path}/val")["systems"]
        assert values(system)["mpjpe_mm"] > 0 and system["errors"]["accel_m_s2"]["value"] is None
        (line, *_) = (line for line in (tmp_path / "o/table.md").read_text().splitlines() if "| encoder |" in line)
        assert [cell.strip() for cell in line.split("|")[5:7]] == ["-", "-"]

    def test_two_processes_find_the_same_numbers(self, lab, tmp_path):
        systems = {
            "alone": SystemConfig(f"{lab}/encoder.ckpt"),
            "decoded": SystemConfig(f"{lab}/encoder.ckpt", f"{lab}/decoder.ckpt"),
        }
        one = evaluate(systems, f"{lab}/val", EXACT, tmp_path / "one")
        # Forked, since what takes the time otherwise is importing torch again.
        processes: Any = torch.multiprocessing.start_processes
        processes(_evaluate_on_rank, args=(systems, lab, str(tmp_path)), nprocs=2, start_method="fork")
        two = json.loads((tmp_path / "two/results.json").read_text())
        assert (one["processes"], two["processes"]) == (1, 2)
        assert two["systems"] == json.loads(json.dumps(one["systems"]))
        assert (tmp_path / "two/sequences.csv").read_bytes() == (tmp_path / "one/sequences.csv").read_bytes()
        assert json.loads((tmp_path / "rank1.json").read_text()) == two

    def test_a_decoder_of_corrections(self, lab, tmp_path):
        few = ["--speed=true", "--batch=2", "--rounds=1", "--max_clips=2"]
        systems = ["{lab}/encoder.ckpt+{lab}/decoder.ckpt", "{lab}/encoder.ckpt+{lab}/correcting.ckpt"]
        other, correcting = run(lab, tmp_path / "o", *few, systems=systems)["systems"]
        assert correcting["speed"]["decoder_s_per_frame"] > 0
        # it also encodes the encoder's poses, and reads them
        assert correcting["cost"]["macs_thop"] > other["cost"]["macs_thop"]
        assert correcting["cost"]["params"] > other["cost"]["params"]

    def test_speed_of_the_metrics_alone(self, capsys):
        assert benchmark(["metrics", "--frames=9", "--rounds=1"]) == 0
        printed = capsys.readouterr().out
        for name in PROTOCOLS:
            (line,) = (line for line in printed.splitlines() if f" {name} " in line)
            assert float(line.split("│")[2]) > 0
        assert benchmark(["metrics", "--frames=0"]) == 2
        assert "frames must be 1 or more, got 0" in capsys.readouterr().err

    def test_speed_is_of_encoder_and_decoder(self, lab, tmp_path):
        systems = ["alone={lab}/encoder.ckpt", "decoded={lab}/encoder.ckpt+{lab}/decoder.ckpt"]
        few = ["--speed=true", "--batch=2", "--rounds=3", "--max_clips=1"]
        alone, decoded = run(lab, tmp_path / "o", *few, systems=systems)["systems"]
        assert decoded["speed"]["encoder_s_per_frame"] == alone["speed"]["encoder_s_per_frame"]
        both = decoded["speed"]["encoder_s_per_frame"] + decoded["speed"]["decoder_s_per_frame"]
        assert decoded["frames_per_s"] == pytest.approx(1 / both) and alone["frames_per_s"] > decoded["frames_per_s"]
        text = (tmp_path / "o/table.md").read_text()
        assert f"{alone['frames_per_s']:.1f} |   1.00 x |" in text and "medians of 3 rounds" in text
        assert cv2.imread(str(tmp_path / "o/accuracy_and_speed.png")).std() > 10


def _evaluate_on_rank(rank: int, systems: dict[str, SystemConfig], lab: Path, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = evaluate(systems, f"{lab}/val", EXACT, Path(folder) / "two")
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


class TestCommand:
    def test_names(self):
        texts = ["runs/a/best.ckpt", "runs/b/best.ckpt", "mine=c.ckpt@all_tokens", "runs/epoch=3.ckpt", "e.ckpt+d.ckpt"]
        assert parse_systems(texts) == {
            "a/best": SystemConfig("runs/a/best.ckpt"),
            "b/best": SystemConfig("runs/b/best.ckpt"),
            "mine": SystemConfig("c.ckpt", tokens="all"),
            "runs/epoch=3": SystemConfig("runs/epoch=3.ckpt"),
            "e.ckpt+d": SystemConfig("e.ckpt+d.ckpt"),
        }

    def test_an_equals_sign_in_a_files_name_is_no_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "epoch=3.ckpt").touch()
        (system,) = parse_systems(["epoch=3.ckpt+decoder.ckpt"]).values()
        assert system == SystemConfig("epoch=3.ckpt+decoder.ckpt")

    def test_others_files_in_the_folder_stay_and_its_own_of_another_evaluation_do_not(self, lab, tmp_path):
        for name in ("notes.md", "table.md", "accuracy_and_speed.png", "side_by_side.mp4"):
            (tmp_path / name).write_text("old")
        run(lab, tmp_path, "--max_clips=1")
        assert (tmp_path / "notes.md").read_text() == "old"
        assert {file.name for file in tmp_path.iterdir()} == {
            "notes.md", "table.md", "results.json", "sequences.csv",
            "joints.png", "error_over_time.png", "jitter_over_time.png",
        }  # fmt: skip
        assert (tmp_path / "table.md").read_text().startswith("Protocol")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{lab}/encoder.ckpt", "{lab}/encoder.ckpt"], "two systems are called 'encoder'"),
            (["a={lab}/encoder.ckpt", "a={lab}/merging.ckpt"], "two systems are called 'a'"),
            (["{lab}/decoder.ckpt"], "of kind 'decoder', not 'pipeline' or 'encoder'"),
            (["{lab}/merging.ckpt+{lab}/decoder.ckpt"], "decoder.ckpt belongs to encoder"),
            (["{lab}/encoder.ckpt+{lab}/decoder.ckpt@all_tokens"], "a decoder takes the features that it was trained"),
            (["{lab}/nothing.ckpt"], "no checkpoint at {lab}/nothing.ckpt"),
            (["{lab}/encoder.ckpt", "--protocol=3dpw-14"], "3dpw-14 needs J_regressor_h36m (17, 6890), got none"),
            (["{lab}/encoder.ckpt", "--protocol=nonsense"], "protocol must be one of body-24, "),
            (["{lab}/encoder.ckpt", "--protocol=3dpw-14", "--regressor={lab}/decoder.ckpt"], "is no .npy or .pkl file"),
            (["{lab}/encoder.ckpt", "--regressor={lab}/r.npy"], "takes the body's own joints and no regressor"),
            (["{lab}/encoder.ckpt", "--data={lab}"], "there is no set of shards in {lab}"),
            (["{lab}/encoder.ckpt", "--max_clips=0"], "max_clips must be 1 or more, got 0"),
            (["{lab}/encoder.ckpt", "--show=clip9"], "show must be the key of a clip that is evaluated, or a number"),
            (["{lab}/encoder.ckpt", "--video=6"], "video must be the key of a clip that is evaluated, or a number"),
            (["{lab}/encoder.ckpt", "--device=nonsense"], "--device must be cpu, cuda or cuda:N"),
            (["{lab}/encoder.ckpt", "--out={lab}/encoder.ckpt"], "encoder.ckpt is a file"),
        ],
    )
    def test_mistakes_end_in_one_line_and_nothing_is_written(self, lab, tmp_path, capsys, arguments, message):
        np.save(lab / "r.npy", np.zeros((17, 6890), np.float32))
        given = [argument.format(lab=lab) for argument in arguments]
        assert main([f"--data={lab}/val", f"--out={tmp_path}/out", *QUICK, *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message.format(lab=lab) in line
        assert not (tmp_path / "out").exists()

    def test_other_bodies_and_sets_without_labels(self, lab, tmp_path, capsys):
        make_clips(tmp_path / "stick", (3,), body="stick@0")
        make_encoder(tmp_path / "stick.ckpt", body="stick@0")
        out = f"--out={tmp_path}/out"
        assert main([f"{lab}/encoder.ckpt", f"--data={tmp_path}/stick", out, *QUICK]) == 2
        assert main([f"{tmp_path}/stick.ckpt", f"--data={lab}/val", out, *QUICK]) == 2
        for line in capsys.readouterr().err.splitlines():
            assert "belongs to body 'stick@0', but this run uses body 'free@" in line

    def test_a_set_without_labels(self, lab, tmp_path, capsys, monkeypatch):
        load = ClipStore.__getitem__

        def unlabelled(store: ClipStore, index: int) -> Any:
            clip = load(store, index)
            return replace(clip, status={**clip.status, "pose": "missing"})

        monkeypatch.setattr(ClipStore, "__getitem__", unlabelled)
        assert main([f"{lab}/encoder.ckpt", f"--data={lab}/val", f"--out={tmp_path}/out", *QUICK]) == 2
        assert "has no pose labels" in capsys.readouterr().err


# ---- confidence intervals, on made up numbers ------------------------------------------------------------------------


def sequences(errors_mm: Sequence[float], frames: Sequence[int]) -> list[SequenceErrors]:
    return [
        SequenceErrors(
            f"clip{i}", count, count, {"mpjpe_mm": error * count}, {"mpjpe_mm": float(count)}, [error * count] * 2
        )
        for i, (error, count) in enumerate(zip(errors_mm, frames, strict=True))
    ]


class TestIntervals:
    def test_long_sequences_weigh_more(self):
        assert pooled(sequences([10, 40], [300, 100]), "mpjpe_mm") == 17.5

    def test_an_interval_holds_the_number_and_follows_how_much_sequences_differ(self):
        frames, bootstrap = [50] * 20, Bootstrap(20, seed=3)
        errors = np.random.default_rng(0).normal(80, 10, 20)
        wide = bootstrap.estimate(sequences(errors, frames), "mpjpe_mm")
        # The mean of 20 numbers that deviate by about 10: 2 x 1.96 x 10 / sqrt(20) = 8.8
        assert wide.low < wide.value < wide.high and wide.high - wide.low == pytest.approx(
            2 * 1.96 * errors.std() / math.sqrt(20), rel=0.15
        )
        narrow = bootstrap.estimate(sequences([80] * 20, frames), "mpjpe_mm")
        assert (narrow.low, narrow.value, narrow.high) == pytest.approx((80, 80, 80))

    def test_a_difference_leaves_out_what_systems_have_in_common(self):
        errors = np.random.default_rng(0).normal(80, 10, 20)
        systems = {"one": sequences(errors, [50] * 20), "other": sequences(errors - 2, [50] * 20)}
        difference = compare(systems)["other"]["difference"]["mpjpe_mm"]
        assert list(difference.values()) == pytest.approx([-2, -2, -2])
        assert compare(systems)["one"]["difference"] is None

    def test_draws_depend_on_the_seed_alone(self):
        some = sequences([50, 60, 90], [10, 20, 30])
        assert Bootstrap(3, 100, 1).estimate(some, "mpjpe_mm") == Bootstrap(3, 100, 1).estimate(some, "mpjpe_mm")
        assert Bootstrap(3, 100, 1).estimate(some, "mpjpe_mm") != Bootstrap(3, 100, 2).estimate(some, "mpjpe_mm")

    def test_one_sequence_has_no_interval(self):
        estimate = Bootstrap(1).estimate(sequences([50], [10]), "mpjpe_mm")
        assert estimate.value == 50 and math.isnan(estimate.low) and math.isnan(estimate.high)
        (system,) = ({"name": "a|b", **values} for values in compare({"a|b": sequences([50], [10])}).values())
        text = tables([system], parameters=False)
        assert "| a\\|b   |    50.00 |" in text and "| a\\|b   |        - |" in text
