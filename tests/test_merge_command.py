"""`python -m fasthmr.merge`: from a checkpoint and shards to a cheaper checkpoint and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_progressive import NET

from fasthmr.body import load_body
from fasthmr.calibration import CalibrationSet, PlanErrors, RememberedErrors
from fasthmr.checkpoint import load_encoder, read_header, save_encoder
from fasthmr.data.schema import Clip
from fasthmr.data.shards import ClipStore, write_shards
from fasthmr.merge import main
from fasthmr.merging import LayerMergePlan, TokenMerging
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.models.hmr import HMR
from fasthmr.report import draw_merge_report, readable

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Relabelled:
    """The clips of a set, over and over, of which only some have a label."""

    folder: Path
    label: str
    labelled: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.labelled)

    def make(self, index: int) -> Clip:
        store = ClipStore(self.folder)
        clip = replace(store[index % len(store)], key=f"clip{index:03d}")
        if self.labelled[index]:
            return clip
        values = {} if self.label == "masks" else {self.label: np.zeros_like(getattr(clip, self.label))}
        return replace(clip, status={**clip.status, self.label: "missing"}, **values)

    def describe(self) -> dict[str, object]:
        return {"name": "relabelled", "label": self.label, "labelled": self.labelled, "body": load_body().id}


def relabelled(folder: Path, shards: Path, label: str, *labelled: bool) -> Path:
    write_shards(Relabelled(shards, label, labelled), folder, clips_per_shard=8, workers=1, progress=False)
    return folder


def merging(encoder: HMR, tokens: TokenMerging | None) -> HMR:
    """The same encoder with token merging."""
    hmr = HMR(replace(encoder.config, token_merging=None)).eval()
    hmr.load_state_dict(encoder.state_dict())
    hmr.set_token_merging(tokens)
    return hmr


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

    def test_the_truth_of_a_gendered_body_is_its_joints(self, encoder, frames):
        """Our body in another body's pose and shape is not what that looked like."""

        def error(**changes: object) -> float:
            clip = replace(frames.clips[0], **changes)
            return PlanErrors(encoder, load_body(), replace(frames, clips=(clip,)))(LayerMergePlan(6))

        crooked = frames.clips[0].joints3d.clone()
        crooked[..., 15, 0] += 1.0  # the head
        assert error(joints3d=crooked) == error()
        assert error(genders=["female"]) == pytest.approx(error(), abs=0.1)  # joints of the same body, moved
        assert error(genders=["female"], joints3d=crooked) > error() + 10

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

    def test_without_labels(self, tiny_shards, tmp_path):
        none = relabelled(tmp_path / "none", tiny_shards, "pose", False, False)
        with pytest.raises(ValueError, match="has no pose labels"):
            CalibrationSet.read(none, load_body().id)

    def test_labels_may_begin_late_in_the_set(self, tiny_shards, tmp_path):
        late = relabelled(tmp_path / "late", tiny_shards, "pose", *[False] * 17, True)
        assert CalibrationSet.read(late, load_body().id, frames_per_clip=1).frames == 18

    def test_a_clip_without_masks_is_refused_where_they_are_needed(self, encoder, tiny_shards, tmp_path):
        folder = relabelled(tmp_path / "some", tiny_shards, "masks", True, False)
        some, body = CalibrationSet.read(folder, load_body().id, frames_per_clip=1), load_body()
        with pytest.raises(ValueError, match="these clips have no masks: clip001"):
            PlanErrors(merging(encoder, TokenMerging()), body, some)
        for tokens in (None, TokenMerging(mask="none")):
            assert PlanErrors(merging(encoder, tokens), body, some)(LayerMergePlan(6)) > 0

    def test_whose_tokens_are_protected_changes_the_answer(self, encoder, frames):
        hmr, body = merging(encoder, TokenMerging()), load_body()
        for clip in frames.clips:
            clip.masks[..., :128][clip.masks[..., :128] == 0] = 2  # a crowd on the left
        subject, everybody = (
            PlanErrors(hmr, body, frames, precision="32", mask_people=people)(LayerMergePlan(6))
            for people in ("subject", "all")
        )
        for clip in frames.clips:
            clip.masks[clip.masks == 2] = 0
        assert abs(subject - everybody) > 1e-3

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"protocol": "nonsense"}, "protocol must be one of body-24, "),
            ({"mask_people": "none"}, "mask_people must be 'subject' or 'all'"),
            ({"cache_gb": float("nan")}, "cache_gb must be 0 or more"),
            ({"cache_gb": float("inf")}, "cache_gb must be 0 or more"),
        ],
    )
    def test_settings_that_cannot_be(self, encoder, frames, settings, message):
        with pytest.raises(ValueError, match=message):
            PlanErrors(encoder, load_body(), frames, **settings)

    def test_features_are_of_the_same_tokens_whichever_clips_come_first(self, encoder, frames):
        backwards = replace(frames, clips=frames.clips[::-1])
        one, two = (PlanErrors(encoder, load_body(), clips).token_features(96) for clips in (frames, backwards))
        assert [layer.shape for layer in one] == [(96, 32)] * 6
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        other = PlanErrors(encoder, load_body(), frames).token_features(96, seed=1)
        assert not torch.equal(one[0], other[0])

    def test_features_are_gathered_from_all_ranks_also_from_one_without_clips(self, encoder, tiny_shards, tmp_path):
        # Forked, since what takes the time otherwise is importing torch again.
        processes: Any = torch.multiprocessing.start_processes
        processes(_features_on_rank, args=(encoder, tiny_shards, str(tmp_path)), nprocs=2, start_method="fork")
        for clips in (3, 1):
            alone = _features(encoder, tiny_shards, clips)
            for rank in range(2):
                for ours, theirs in zip(alone, torch.load(tmp_path / f"{clips}-{rank}.pt"), strict=True):
                    assert torch.equal(ours, theirs)

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

    @pytest.mark.parametrize(
        "text", ["", "{", "[1]", '{"fingerprint": "a"}', '{"fingerprint": "a", "errors_mm": {"p": []}}']
    )
    def test_a_damaged_record_is_named(self, tmp_path, text):
        (tmp_path / "search.json").write_text(text)
        with pytest.raises(ValueError, match=r"search\.json is no record of a search, or damaged"):
            RememberedErrors(lambda plan: 1.0, tmp_path / "search.json", "a")

    def test_what_was_remembered_is_not_counted(self, tmp_path):
        plans = [LayerMergePlan(3), LayerMergePlan(3).merged(0, 1)]
        first = RememberedErrors(lambda plan: 1.5, tmp_path / "search.json", "a")
        first(plans[0])
        second = RememberedErrors(lambda plan: 1.5, tmp_path / "search.json", "a")
        for plan in plans:
            second(plan)
        assert (first.evaluations, second.evaluations) == (1, 1)
        assert second.seconds > 0


def _features(encoder: HMR, shards: Path, clips: int, **ranks: int) -> list[torch.Tensor]:
    frames = CalibrationSet.read(shards, load_body().id, 2, max_clips=clips, **ranks)
    return PlanErrors(encoder, load_body(), frames).token_features(64)


def _features_on_rank(rank: int, encoder: HMR, shards: Path, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for clips in (3, 1):
        torch.save(_features(encoder, shards, clips, rank=rank, world_size=2), Path(folder) / f"{clips}-{rank}.pt")
    dist.destroy_process_group()


class TestCommand:
    def test_a_merged_checkpoint_and_a_report(self, checkpoint, tiny_shards, capsys):
        assert main([str(checkpoint), "--data", str(tiny_shards), "--tau", "5", "--keep_tokens", "90"]) == 0
        out = checkpoint.with_name("encoder-merged")
        report = json.loads(out.with_suffix(".json").read_text())
        merged = load_encoder(out.with_suffix(".ckpt"))
        assert list(merged.merge_plan.group_sizes) == report["group_sizes"]
        assert merged.config.token_merging.keep_tokens == 90
        assert len(report["steps"]) == 5 and np.array(report["cka"]).shape == (6, 6)
        for commit in report["commits"]:
            assert commit["after_mm"] < report["base_mpjpe_mm"] + 5
        assert report["cost"]["after"]["layers"] == len(merged.backbone.blocks)
        assert cv2.imread(str(out.with_suffix(".png"))).std() > 10
        assert not list(checkpoint.parent.glob("*.search.json"))
        printed = capsys.readouterr()
        assert "multiply-adds" in printed.out
        assert sum(f"mm    +0.000  base      {LayerMergePlan(6)}" in line for line in printed.out.splitlines()) == 1
        search = report["search"]
        assert (search["plans"], search["evaluations"]) == (5, 5)  # the sixth would leave too few layers
        assert search["evaluations_per_s"] > 0 and search["evaluations_per_s_without_cache"] > 0
        assert "evaluations/s with none kept" in printed.out

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
        # six plans, the third of them twice; the merged encoder at the end, and two to see how slow it is uncached
        assert len(calls) == 3 + 4 + 1 + 2
        search = json.loads(checkpoint.with_name("encoder-merged.json").read_text())["search"]
        assert (search["plans"], search["evaluations"]) == (6, 4)

    def test_the_plan_is_shown_before_it_is_evaluated_and_its_verdict_after(self, checkpoint, tiny_shards, monkeypatch):
        import fasthmr.merge as command

        told: list[str] = []

        class Bar(command.tqdm):
            def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
                told.append(f"tries {s}")

            @classmethod
            def write(cls, s: str, *args: Any, **keys: Any) -> None:
                told.append("tells " + s.split("  ")[-1])

        class Told(PlanErrors):
            def __call__(self, plan: LayerMergePlan) -> float:
                told.append(f"evaluates {plan}")
                return super().__call__(plan)

        monkeypatch.setattr(command, "tqdm", Bar)
        monkeypatch.setattr(command, "PlanErrors", Told)
        assert main([str(checkpoint), "--data", str(tiny_shards), "--frames_per_clip", "1"]) == 0
        for verb in ("tries 0 1 2 3 4 5", "tries 0 1 2 3 4+5"):
            plan, at = verb.removeprefix("tries "), told.index(verb)
            assert told[at : at + 3] == [f"tries {plan}", f"evaluates {plan}", f"tells {plan}"]

    @pytest.mark.parametrize("already", [False, True], ids=["merges tokens now", "merged tokens before"])
    def test_as_many_layers_stay_as_token_merging_needs(self, encoder, checkpoint, tiny_shards, already):
        more = [] if already else ["--keep_tokens=90"]
        save_encoder(checkpoint, merging(encoder, TokenMerging() if already else None), load_body().id)
        generous = ["--data", str(tiny_shards), "--tau", "1e6", "--frames_per_clip", "1"]
        assert main([str(checkpoint), *generous, *more]) == 0
        assert read_header(checkpoint.with_name("encoder-merged.ckpt")).merge_plan.group_sizes == (1, 1, 4)

    def test_all_settings_of_token_merging_are_flags_and_the_others_are_the_checkpoints(
        self, encoder, checkpoint, tiny_shards
    ):
        own = TokenMerging(keep_tokens=120, per_layer=36)
        save_encoder(checkpoint, merging(encoder, own), load_body().id)
        flags = ["--mask=none", "--person_share=0.3", "--metric=tokens", "--average=size"]
        flags += ["--proportional_attention=true", "--mask_people=all", "--frames_per_clip=1"]
        assert main([str(checkpoint), "--data", str(tiny_shards), *flags]) == 0
        merged = load_encoder(checkpoint.with_name("encoder-merged.ckpt"))
        assert merged.config.token_merging == TokenMerging(
            keep_tokens=120, per_layer=36, mask="none", person_share=0.3, metric="tokens", average="size",
            proportional_attention=True,
        )  # fmt: skip
        report = json.loads(checkpoint.with_name("encoder-merged.json").read_text())
        assert report["mask_people"] == "all"

    def test_writes_into_a_new_folder(self, checkpoint, tiny_shards, tmp_path):
        out = tmp_path / "new" / "folder" / "x"
        assert main([str(checkpoint), "--data", str(tiny_shards), "--frames_per_clip=1", "--out", str(out)]) == 0
        assert sorted(path.name for path in out.parent.iterdir()) == ["x.ckpt", "x.json", "x.png"]

    def test_clips_without_masks(self, checkpoint, tiny_shards, tmp_path, capsys):
        folder = relabelled(tmp_path / "some", tiny_shards, "masks", True, False)
        arguments = [str(checkpoint), "--data", str(folder), "--frames_per_clip=1", "--keep_tokens=90"]
        assert main(arguments) == 2
        assert "these clips have no masks: clip001" in capsys.readouterr().err
        assert main([*arguments, "--mask=none"]) == 0

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
            (["--protocol=nonsense"], "--protocol must be one of body-24, "),
            (["--mask_people=none"], "--mask_people must be one of subject, all, got 'none'"),
            (["--device=nonsense"], "--device must be cpu, cuda or cuda:N, got 'nonsense'"),
            (["--device=cuda:99"], "--device cuda:99: GPU 99 is not there"),
            (["--batch=0"], "--batch must be 1 or more, got 0"),
            (["--metric=tokens"], "--metric needs --keep_tokens"),
            (["--keep_tokens=90", "--average=median"], "average must be one of"),
            (["--out=."], "--out must end in a file's name"),
        ],
    )
    def test_mistakes_end_in_one_line_and_nothing_is_written(self, checkpoint, tiny_shards, capsys, more, message):
        assert main([str(checkpoint), "--data", str(tiny_shards), *more]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
        assert [path.name for path in checkpoint.parent.iterdir()] == ["encoder.ckpt"]

    def test_what_is_read_is_never_overwritten(self, checkpoint, tiny_shards, tmp_path, capsys):
        before = checkpoint.read_bytes()
        assert main([str(checkpoint), "--data", str(tiny_shards), "--out", str(checkpoint.with_suffix(""))]) == 2
        assert f"would overwrite {checkpoint}" in capsys.readouterr().err
        (tmp_path / "mine.json").write_text(LayerMergePlan(6).merged(2, 4).as_json())
        flags = ["--plan", str(tmp_path / "mine.json"), "--out", str(tmp_path / "mine")]
        assert main([str(checkpoint), "--data", str(tiny_shards), *flags]) == 2
        assert "mine.json, which is read" in capsys.readouterr().err
        assert checkpoint.read_bytes() == before

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"depth": 6}'])
    def test_a_damaged_plan_or_record_is_named(self, checkpoint, tiny_shards, tmp_path, capsys, text):
        (tmp_path / "plan.json").write_text(text)
        assert main([str(checkpoint), "--data", str(tiny_shards), "--plan", str(tmp_path / "plan.json")]) == 2
        assert f"{tmp_path / 'plan.json'} is no merge plan" in capsys.readouterr().err
        (tmp_path / "encoder-merged.search.json").write_text(text)
        assert main([str(checkpoint), "--data", str(tiny_shards), "--frames_per_clip=1"]) == 2
        assert "encoder-merged.search.json is no record" in capsys.readouterr().err

    def test_a_plan_that_leaves_too_few_layers_for_merging_tokens(self, checkpoint, tiny_shards, tmp_path, capsys):
        (tmp_path / "plan.json").write_text(LayerMergePlan(6).merged(0, 4).as_json())
        flags = ["--plan", str(tmp_path / "plan.json"), "--keep_tokens=90"]
        assert main([str(checkpoint), "--data", str(tiny_shards), *flags]) == 2
        assert "leaves 2 layers, but merging tokens takes 3" in capsys.readouterr().err

    def test_a_plan_for_another_depth_and_a_checkpoint_of_another_body(
        self, encoder, checkpoint, tiny_shards, tmp_path, capsys
    ):
        (tmp_path / "plan.json").write_text(LayerMergePlan(5).as_json())
        assert main([str(checkpoint), "--data", str(tiny_shards), "--plan", str(tmp_path / "plan.json")]) == 2
        assert "the second plan is for 5 layers" in capsys.readouterr().err
        save_encoder(checkpoint, encoder, "other@0123")
        assert main([str(checkpoint), "--data", str(tiny_shards)]) == 2
        assert "other@0123" in capsys.readouterr().err

    def test_two_processes_go_on_with_what_one_began(self, checkpoint, tiny_shards, tmp_path, monkeypatch):
        """Only the first keeps a record, so neither a missing nor another one beside it makes them disagree."""
        import fasthmr.merge as command

        arguments = [str(checkpoint), "--data", str(tiny_shards), "--tau", "3"]
        assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
        with monkeypatch.context() as patch:
            patch.setattr(command.RememberedErrors, "forget", lambda self: None)
            assert main([*arguments, "--out", str(tmp_path / "two")]) == 0
        record = json.loads((tmp_path / "two.search.json").read_text())
        begun = dict(list(record["errors_mm"].items())[:3])
        (tmp_path / "two.search.json").write_text(json.dumps({**record, "errors_mm": begun}))
        uneven = {plan: 0.0 for plan in list(record["errors_mm"])[:4]}
        (tmp_path / "two.search1.json").write_text(json.dumps({**record, "errors_mm": uneven}))
        printed = _on_two_processes([*arguments, "--out", str(tmp_path / "two")])
        one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
        assert one["plan"] == two["plan"]
        assert [step["groups"] for step in one["steps"]] == [step["groups"] for step in two["steps"]]
        for ours, theirs in zip(one["steps"], two["steps"], strict=True):
            assert ours["mpjpe_mm"] == pytest.approx(theirs["mpjpe_mm"], abs=1e-6)
        assert one["final_mpjpe_mm"] == pytest.approx(two["final_mpjpe_mm"], abs=1e-6)
        assert one["cka"] == two["cka"]
        assert two["search"]["evaluations"] == 3
        assert len([line for line in printed.splitlines() if " base " in line]) == 1


def _on_two_processes(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533"]
    done = subprocess.run(
        [*command, "-m", "fasthmr.merge", *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


REPORT: dict[str, Any] = {
    "protocol": "body-24",
    "tau_mm": 0.5,
    "plan": LayerMergePlan(4).merged(2, 3).as_dict(),
    "base_mpjpe_mm": 70.0,
    "final_mpjpe_mm": 70.3,
    "steps": [{"mpjpe_mm": 70.0, "accepted": True}, {"mpjpe_mm": 70.3, "accepted": True}],
    "commits": [{"keep": 2, "drop": [3], "before_mm": 70.0, "after_mm": 70.3}],
    "cka": [[1.0, 0.97], [0.97, 1.0]],
    "cost": {
        "before": {"layers": 4, "tokens": 192, "params": 48_000, "macs_thop": 9_600_000, "macs_all": 10_000_000},
        "after": {"layers": 3, "tokens": 192, "params": 36_000, "macs_thop": 7_200_000, "macs_all": 7_500_000},
    },
    "frames_per_s": {"batch": 8, "device": "cpu", "before": 100.0, "after": 130.0},
}


class TestPicture:
    def drawn(self, monkeypatch, tmp_path, **changes: Any) -> Any:
        """The figure that is drawn of the report."""
        import fasthmr.report as module

        figures: list[Any] = []
        monkeypatch.setattr(module, "save_figure", lambda figure, file: figures.append(figure))
        draw_merge_report({**REPORT, **changes}, tmp_path / "x.png")
        return figures[0]

    def test_shows_the_error_before_and_after_each_commit(self, monkeypatch, tmp_path):
        figure = self.drawn(monkeypatch, tmp_path)
        (commits,) = (axes for axes in figure.axes if "each commit" in axes.get_title())
        assert "70.00 -> 70.30" in [text.get_text() for text in commits.texts]
        assert [label.get_text() for label in commits.get_yticklabels()] == ["2 to 3"]

    def test_colours_are_from_the_data(self, monkeypatch, tmp_path):
        figure = self.drawn(monkeypatch, tmp_path)
        (image,) = (axes.images[0] for axes in figure.axes if "similarity" in axes.get_title())
        assert image.get_clim() == (0.97, 1.0)
        assert any("0.970" in axes.get_ylabel() for axes in figure.axes)

    def test_a_given_plan_is_not_called_a_search(self, monkeypatch, tmp_path):
        titles = [axes.get_title() for axes in self.drawn(monkeypatch, tmp_path, tau_mm=None).axes]
        assert not any("search" in title or "tau" in title for title in titles)
        assert any("search, tau = 0.5 mm" in axes.get_title() for axes in self.drawn(monkeypatch, tmp_path).axes)

    def test_without_a_commit(self, monkeypatch, tmp_path):
        titles = [axes.get_title() for axes in self.drawn(monkeypatch, tmp_path, commits=[]).axes]
        assert "nothing was merged" in titles

    @pytest.mark.parametrize(
        ("value", "text"), [(670.211, "670.21"), (7.8, "7.80"), (0.5, "0.500"), (0.01234, "0.0123"), (0.0, "0.00")]
    )
    def test_small_numbers_have_digits_too(self, value, text):
        assert readable(value) == text
