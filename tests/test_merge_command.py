"""`python -m fasthmr.merge`: from a checkpoint and shards to a cheaper checkpoint and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_progressive import NET

from fasthmr.body import load_body
from fasthmr.calibration import CalibrationSet, PlanErrors, RememberedErrors
from fasthmr.checkpoint import load_encoder, read_header, save_encoder
from fasthmr.merge import main
from fasthmr.merging import LayerMergePlan
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.models.hmr import HMR

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def encoder() -> HMR:
    torch.manual_seed(0)
    hmr = HMR(NET).eval()
    hmr.set_token_merging(None)
    with torch.no_grad():
        hmr.smpl_head.decpose.weight.mul_(30)  # so that what the layers do is seen in the pose
    return hmr


@pytest.fixture
def checkpoint(encoder, tmp_path) -> Path:
    save_encoder(tmp_path / "encoder.ckpt", encoder, load_body().id)
    return tmp_path / "encoder.ckpt"


@pytest.fixture(scope="module")
def frames(tiny_shards) -> CalibrationSet:
    return CalibrationSet.read(tiny_shards, load_body().id, frames_per_clip=4)


class TestCalibration:
    def test_frames_are_spread_over_each_clip(self, frames):
        assert frames.frames == 6 * 4
        assert frames.clips[0].frame_index.tolist() == [[0, 5, 10, 15]]

    def test_clips_are_spread_over_the_set_and_shared_by_the_ranks(self, tiny_shards):
        body = load_body().id
        some = CalibrationSet.read(tiny_shards, body, 2, max_clips=3)
        every = CalibrationSet.read(tiny_shards, body, 2)
        assert [c.keys for c in some.clips] == [every.clips[i].keys for i in (0, 2, 5)]
        shares = [CalibrationSet.read(tiny_shards, body, 2, rank=rank, world_size=4) for rank in range(4)]
        assert [len(share.clips) for share in shares] == [2, 2, 1, 1]
        assert {share.id for share in shares} == {every.id}

    def test_the_error_is_that_of_the_merged_network(self, encoder, frames):
        plan = LayerMergePlan(6).merged(2, 4)
        merged = HMR(encoder.config).eval()
        merged.load_state_dict(encoder.state_dict())
        merged.merge_layers(plan)
        body, errors = load_body(), PoseErrors(PROTOCOLS["body-24"])
        with torch.no_grad():
            for clip in frames.clips:
                output = merged(clip.network_input())
                betas = output.betas.mean(0, keepdim=True).expand(4, -1)
                predicted = body(output.rotations, betas).joints
                target = body(clip.rotations[0], clip.betas.expand(4, -1)).joints
                errors.update(predicted[None], target[None], None, None, clip.valid, clip.fps)
        expected = float(errors.compute()["mpjpe_mm"])
        assert PlanErrors(encoder, body, frames, precision="32")(plan) == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("cache_gb", [1.0, 2.5 * 24 * 4 * 32 * 192 / 1e9, 0.0], ids=["all", "two layers", "none"])
    def test_cached_features_do_not_change_the_answer(self, encoder, frames, cache_gb):
        body, plan = load_body(), LayerMergePlan(6)
        errors = PlanErrors(encoder, body, frames, cache_gb=cache_gb)
        assert len(errors.kept) == {1.0: 6, 0.0: 0}.get(cache_gb, 2)
        for low in range(4, -1, -1):
            fresh = PlanErrors(encoder, body, frames, cache_gb=0.0)(plan.merged(low, 5))
            assert errors(plan.merged(low, 5)) == pytest.approx(fresh, abs=1e-6)

    def test_with_token_merging(self, encoder, frames):
        hmr = HMR(NET).eval()
        hmr.load_state_dict(encoder.state_dict())
        cached, fresh = (PlanErrors(hmr, load_body(), frames, cache_gb=gb) for gb in (1.0, 0.0))
        for plan in (LayerMergePlan(6), LayerMergePlan(6).merged(1, 2), LayerMergePlan(6).merged(0, 3)):
            assert cached(plan) == pytest.approx(fresh(plan), abs=1e-6)

    def test_without_labels(self, tiny_shards, monkeypatch):
        import fasthmr.calibration as calibration

        def unlabelled(*args):
            clip = original(*args)
            clip.has_pose[:] = False
            return clip

        original = calibration._spread
        monkeypatch.setattr(calibration, "_spread", unlabelled)
        with pytest.raises(ValueError, match="has no pose labels"):
            CalibrationSet.read(tiny_shards, load_body().id)

    def test_remembers_and_refuses_what_is_not_its_own(self, tmp_path):
        calls = []
        file = tmp_path / "search.json"

        def error(plan: LayerMergePlan) -> float:
            calls.append(plan)
            return 1.5

        plan = LayerMergePlan(3).merged(0, 1)
        assert RememberedErrors(error, file, "a")(plan) == RememberedErrors(error, file, "a")(plan) == 1.5
        assert len(calls) == 1
        with pytest.raises(ValueError, match="other weights, data or settings"):
            RememberedErrors(error, file, "b")


class TestCommand:
    def test_a_merged_checkpoint_and_a_report(self, checkpoint, tiny_shards, capsys):
        assert main([str(checkpoint), "--data", str(tiny_shards), "--tau", "5", "--keep_tokens", "90"]) == 0
        out = checkpoint.with_name("encoder-merged")
        report = json.loads(out.with_suffix(".json").read_text())
        merged = load_encoder(out.with_suffix(".ckpt"))
        assert list(merged.merge_plan.group_sizes) == report["group_sizes"]
        assert merged.config.token_merging.keep_tokens == 90
        assert len(report["steps"]) == 6 and np.array(report["cka"]).shape == (6, 6)
        for commit in report["commits"]:
            assert commit["after_mm"] < report["base_mpjpe_mm"] + 5
        assert report["cost"]["after"]["layers"] == len(merged.backbone.blocks)
        assert cv2.imread(str(out.with_suffix(".png"))).std() > 10
        assert not list(checkpoint.parent.glob("*.search.json"))
        assert "multiply-adds" in capsys.readouterr().out

    def test_goes_on_with_what_was_evaluated(self, checkpoint, tiny_shards, monkeypatch):
        import fasthmr.merge as command

        arguments = [str(checkpoint), "--data", str(tiny_shards), "--tau", "1000", "--frames_per_clip", "2"]
        calls = []

        class Counted(PlanErrors):
            def __call__(self, plan: LayerMergePlan) -> float:
                calls.append(plan)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return super().__call__(plan)

        monkeypatch.setattr(command, "PlanErrors", Counted)
        assert main(arguments) == 130
        assert not checkpoint.with_name("encoder-merged.ckpt").exists()
        assert main(arguments) == 0
        assert len(calls) == 3 + 4 + 1  # six plans, the third of them twice, and the merged encoder at the end

    def test_a_plan_of_ones_own_and_merging_once_more(self, checkpoint, tiny_shards, tmp_path):
        for number, plan in enumerate([LayerMergePlan(6).merged(2, 4), LayerMergePlan(4).merged(2, 3)]):
            (tmp_path / "plan.json").write_text(plan.as_json())
            source = checkpoint if number == 0 else tmp_path / "out0.ckpt"
            keys = [
                "--data",
                str(tiny_shards),
                "--plan",
                str(tmp_path / "plan.json"),
                "--out",
                str(tmp_path / f"out{number}"),
            ]
            assert main([str(source), *keys]) == 0
        assert str(read_header(tmp_path / "out1.ckpt").merge_plan) == "0 1 2+3+4+5"

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--tau=-1"], "--tau must be 0 mm or more, got -1"),
            (["--keep_tokens=400"], "keep_tokens must be in [1, 192], got 400"),
            (["--keep_tokens=90", "--per_layer=5"], "takes 21 layers"),
            (["--data=nowhere"], "nowhere"),
            (["--protocol=3dpw-14"], "3dpw-14 needs"),
            (["--precision=8"], "precision must be"),
        ],
    )
    def test_mistakes_end_in_one_line_and_nothing_is_written(self, checkpoint, tiny_shards, capsys, more, message):
        assert main([str(checkpoint), "--data", str(tiny_shards), *more]) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in checkpoint.parent.iterdir()] == ["encoder.ckpt"]

    def test_a_plan_for_another_depth_and_a_checkpoint_of_another_body(
        self, encoder, checkpoint, tiny_shards, tmp_path, capsys
    ):
        (tmp_path / "plan.json").write_text(LayerMergePlan(5).as_json())
        assert main([str(checkpoint), "--data", str(tiny_shards), "--plan", str(tmp_path / "plan.json")]) == 2
        assert "the second plan is for 5 layers" in capsys.readouterr().err
        save_encoder(checkpoint, encoder, "other@0123")
        assert main([str(checkpoint), "--data", str(tiny_shards)]) == 2
        assert "other@0123" in capsys.readouterr().err

    def test_two_processes_find_the_same(self, checkpoint, tiny_shards, tmp_path):
        main([str(checkpoint), "--data", str(tiny_shards), "--tau", "3", "--out", str(tmp_path / "one")])
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533"]
        command += ["-m", "fasthmr.merge", str(checkpoint), "--data", str(tiny_shards), "--tau", "3"]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "two")],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
        assert one["plan"] == two["plan"]
        assert one["base_mpjpe_mm"] == pytest.approx(two["base_mpjpe_mm"], abs=1e-6)
