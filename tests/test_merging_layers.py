"""Merging layers: plans, Eq. 4, and the ECLM search, against numbers worked out elsewhere."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fasthmr.merging import LayerMergePlan, MergeEvent, collapse, merge_blocks, search_layer_merges
from fasthmr.models.adapters import hmr_state_dict
from fasthmr.models.hmr import HMR, HMRConfig, middle_columns

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = HMRConfig(
    vit_dim=64, vit_depth=4, vit_heads=4, head_dim=128, head_depth=2, head_heads=8, head_dim_head=16, head_mlp_dim=96
)


def plan_of_groups(*sizes: int) -> LayerMergePlan:
    """The plan whose groups have these sizes, each merged at once, from the last to the first."""
    plan, end = LayerMergePlan(sum(sizes)), sum(sizes)
    for size in reversed(sizes):
        end -= size
        plan = plan.merged(end, end + size - 1) if size > 1 else plan
    return plan


class TestPlan:
    def test_structure(self):
        plan = LayerMergePlan(6).merged(2, 4)
        assert plan.layers == (0, 1, 2, 5)
        assert plan.group_sizes == (1, 1, 3, 1)
        assert str(plan) == "0 1 2+3+4 5"
        assert plan.picture() == "0  1  2  3  4  5\n|  |  [=====]  |"

    def test_merging_what_was_merged_skips_the_layers_that_are_gone(self):
        plan = LayerMergePlan(6).merged(2, 4).merged(1, 5)
        assert plan.events == (MergeEvent(2, (3, 4)), MergeEvent(1, (2, 5)))
        assert plan.group_sizes == (1, 5)

    def test_a_plan_for_what_remains_is_translated(self):
        first = LayerMergePlan(6).merged(2, 4)  # leaves 0, 1, 2, 5
        assert first.then(LayerMergePlan(4).merged(2, 3)).events[1] == MergeEvent(2, (5,))

    def test_round_trip(self):
        plan = LayerMergePlan(12).merged(8, 11).merged(0, 1)
        assert LayerMergePlan.from_json(plan.as_json()) == plan
        assert json.loads(plan.as_json())["events"][0] == {"keep": 8, "drop": [9, 10, 11]}

    def test_what_is_still_to_come(self):
        first = LayerMergePlan(6).merged(2, 4)
        assert first.merged(0, 1).after(first) == (MergeEvent(0, (1,)),)
        with pytest.raises(ValueError, match="no beginning"):
            LayerMergePlan(6).merged(0, 1).after(first)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"depth": 0, "events": []}, "at least 1 layer"),
            ({"depth": 4, "events": [{"keep": 1, "drop": []}]}, "drops no layer"),
            ({"depth": 4, "events": [{"keep": 1, "drop": [3]}]}, "must drop the layers that follow 1"),
            ({"depth": 4, "events": [{"keep": 3, "drop": [4]}]}, "must drop the layers that follow 3"),
            ({"depth": 4, "events": [{"keep": 0, "drop": [1]}, {"keep": 1, "drop": [2]}]}, "layer 1 is not among"),
            ({"depth": 4, "events": [{"keep": "0", "drop": [1]}]}, "whole numbers"),
            ({"depth": "4", "events": []}, "whole number"),
            ({"events": []}, "keys depth and events"),
        ],
    )
    def test_what_is_no_plan(self, values, message):
        with pytest.raises(ValueError, match=message):
            LayerMergePlan.from_dict(values)

    def test_below_one_layer(self):
        one = LayerMergePlan(3).merged(0, 2)
        with pytest.raises(ValueError, match="two or more of the layers left"):
            one.merged(0, 1)


@pytest.fixture(scope="module")
def hmr2_small() -> HMR:
    hmr = HMR(SMALL).eval()
    hmr.load_state_dict(hmr_state_dict(torch.load(FIXTURES / "hmr2_small.ckpt", weights_only=True)["state_dict"]))
    return hmr


@pytest.fixture(scope="module")
def crop() -> torch.Tensor:
    image = torch.zeros(1, 3, 256, 256)
    with np.load(FIXTURES / "hmr2_small_io.npz", allow_pickle=False) as arrays:
        middle_columns(image).copy_(torch.from_numpy(arrays["img"]))
    return image


def assert_same(ours: torch.Tensor, original: np.ndarray) -> None:
    expected = torch.from_numpy(original).reshape(ours.shape)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class TestMergeBlocks:
    @torch.no_grad()
    @pytest.mark.parametrize("groups", [(1, 3), (2, 2), (4,), (1, 2, 1)])
    def test_parity_with_merged_blocks_of_the_original(self, hmr2_small, crop, groups):
        expected = np.load(FIXTURES / "eclm_merged_small.npz", allow_pickle=False)
        case = "g_" + "_".join(map(str, groups))
        hmr = copy.deepcopy(hmr2_small)
        hmr.merge_layers(plan_of_groups(*groups))
        last = hmr.backbone.blocks[str(hmr.merge_plan.layers[-1 if groups[-1] > 1 else 1])]
        for name in ("norm1.weight", "attn.qkv.bias", "mlp.fc2.weight"):
            assert_same(last.get_parameter(name), expected[f"{case}/theta/{name}"])
        output = hmr(crop)
        assert_same(output.tokens, expected[f"{case}/features"])
        assert_same(output.rotations[:, 1:], expected[f"{case}/body_pose"])
        assert_same(output.betas, expected[f"{case}/betas"])
        assert_same(output.camera, expected[f"{case}/cam"])

    @torch.no_grad()
    def test_the_empty_plan_is_bit_identical(self, hmr2_small, crop):
        blocks = merge_blocks(hmr2_small.backbone.blocks, LayerMergePlan(4))
        assert list(blocks) == list(hmr2_small.backbone.blocks.values())  # the very same objects
        hmr = copy.deepcopy(hmr2_small)
        hmr.merge_layers(LayerMergePlan(4))
        assert torch.equal(hmr(crop).rotations, hmr2_small(crop).rotations)

    def test_two_layers_leave_the_later_one(self, hmr2_small):
        merged = merge_blocks(hmr2_small.backbone.blocks, LayerMergePlan(4).merged(1, 2))
        for name, parameter in merged[1].named_parameters():
            assert torch.equal(parameter, hmr2_small.backbone.blocks["2"].get_parameter(name))

    def test_the_rule_is_not_associative_so_the_order_of_events_counts(self, hmr2_small):
        blocks = hmr2_small.backbone.blocks
        at_once = merge_blocks(blocks, LayerMergePlan(4).merged(0, 2))
        step_by_step = merge_blocks(blocks, LayerMergePlan(4).merged(1, 2).merged(0, 1))
        assert not torch.allclose(at_once[0].mlp.fc1.weight, step_by_step[0].mlp.fc1.weight)

    def test_the_originals_stay_as_they_are(self, hmr2_small):
        before = copy.deepcopy(hmr2_small.state_dict())
        merge_blocks(hmr2_small.backbone.blocks, LayerMergePlan(4).merged(2, 3).merged(0, 2))
        assert all(torch.equal(before[k], v) for k, v in hmr2_small.state_dict().items())

    def test_in_place_survivors_keep_names_and_identity(self, hmr2_small):
        hmr = copy.deepcopy(hmr2_small)
        survivor = hmr.backbone.blocks["1"].mlp.fc1.weight
        expected = merge_blocks(hmr.backbone.blocks, LayerMergePlan(4).merged(1, 3))[1].mlp.fc1.weight.clone()
        collapse(hmr.backbone.blocks, MergeEvent(1, (2, 3)))
        assert list(hmr.backbone.blocks) == ["0", "1"]
        assert hmr.backbone.blocks["1"].mlp.fc1.weight is survivor
        assert torch.equal(survivor, expected)

    def test_another_depth(self, hmr2_small):
        with pytest.raises(ValueError, match="the plan is for 5 layers, got 4 blocks"):
            merge_blocks(hmr2_small.backbone.blocks, LayerMergePlan(5))

    def test_blocks_of_another_structure_are_refused_before_anything_changes(self):
        blocks = nn.ModuleDict({"0": nn.Linear(3, 3), "1": nn.Linear(3, 4)})
        before = blocks["0"].weight.clone()
        with pytest.raises(ValueError, match=r"differ in .*bias"):
            collapse(blocks, MergeEvent(0, (1,)))
        assert torch.equal(blocks["0"].weight, before) and list(blocks) == ["0", "1"]


class TestSearch:
    @pytest.mark.parametrize("commit_last_window", [False, True])
    @pytest.mark.parametrize("case", json.loads((FIXTURES / "eclm.json").read_text()), ids=lambda case: case["name"])
    def test_hand_worked_cases(self, case, commit_last_window):
        evaluated = []

        def error(plan: LayerMergePlan) -> float:
            evaluated.append(list(plan.group_sizes))
            return case["table"][",".join(map(str, plan.group_sizes))]

        plan = search_layer_merges(case["L"], error, case["tau"], commit_last_window)
        key = "final_groups_if_open_group_is_flushed" if commit_last_window else "final_groups"
        assert list(plan.group_sizes) == case[key]
        assert evaluated == case["evaluated"]
        assert len(evaluated) == case["L"]

    def test_steps_are_reported_with_their_verdict(self):
        steps = []
        search_layer_merges(3, lambda plan: 70.0 + 5 * (plan.layers == (0, 1)), 0.1, on_step=steps.append)
        assert [(str(s.plan), s.accepted) for s in steps] == [("0 1 2", True), ("0 1+2", False), ("0+1 2", True)]

    def test_the_comparison_is_strict(self):
        assert search_layer_merges(2, lambda plan: 70.0 + (len(plan.layers) == 1), tau=1.0).events == ()

    @pytest.mark.parametrize("case", json.loads((FIXTURES / "eclm.json").read_text()), ids=lambda case: case["name"])
    @pytest.mark.parametrize("min_layers", [1, 2, 3])
    def test_at_least_so_many_layers_stay(self, case, min_layers):
        """As if every plan below had been tried and refused; all others are tried in the same order."""
        tried, expected = [], []

        def error(plan: LayerMergePlan) -> float:
            tried.append(list(plan.group_sizes))
            return case["table"][",".join(map(str, plan.group_sizes))]

        def refusing(plan: LayerMergePlan) -> float:
            if len(plan.layers) < min_layers:
                return 1e6
            expected.append(list(plan.group_sizes))
            return case["table"].get(",".join(map(str, plan.group_sizes)), 1e6)

        plan = search_layer_merges(case["L"], error, case["tau"], min_layers=min_layers)
        assert plan == search_layer_merges(case["L"], refusing, case["tau"])
        assert tried == expected and len(plan.layers) >= min_layers

    def test_a_window_that_may_not_grow_is_committed(self):
        evaluated = []
        plan = search_layer_merges(6, lambda plan: evaluated.append(str(plan)) or 1.0, 5.0, min_layers=3)
        assert str(plan) == "0 1 2+3+4+5"
        assert evaluated == ["0 1 2 3 4 5", "0 1 2 3 4+5", "0 1 2 3+4+5", "0 1 2+3+4+5"]
        assert search_layer_merges(3, lambda plan: 1.0, 5.0, min_layers=3).events == ()

    @pytest.mark.parametrize("min_layers", [0, 4])
    def test_more_layers_than_there_are_cannot_stay(self, min_layers):
        with pytest.raises(ValueError, match=r"min_layers must be in \[1, 3\]"):
            search_layer_merges(3, lambda plan: 1.0, 0.1, min_layers=min_layers)

    def test_a_single_layer_has_nothing_to_merge(self):
        assert search_layer_merges(1, lambda plan: 1.0, tau=5.0).events == ()

    @pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf")])
    def test_tau_must_be_a_budget(self, tau):
        with pytest.raises(ValueError, match="tau must be 0 mm or more"):
            search_layer_merges(3, lambda plan: 1.0, tau)

    def test_an_error_that_is_no_number(self):
        with pytest.raises(ValueError, match="has the calibration set labels"):
            search_layer_merges(3, lambda plan: float("nan"), 0.1)
