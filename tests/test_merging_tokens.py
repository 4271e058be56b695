"""Mask-ToMe: equal to ToMe and to the paper where these are defined, and never a person while background is left."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_merging_layers import SMALL, assert_same, crop, hmr2_small  # noqa: F401  (fixtures)

from fasthmr.merging import LayerMergePlan, TokenMerging, merge_tokens
from fasthmr.models.hmr import HMR, token_mask

FIXTURES = Path(__file__).parent / "fixtures"


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


class TestParity:
    @pytest.mark.parametrize("case", ["r40_192", "r22_112", "r1_7_odd", "r_clip_half", "r0"])
    def test_tome(self, case):
        numbers = {key.split("/")[1]: value for key, value in arrays("tome").items() if key.startswith(case + "/")}
        merged = min(int(numbers["r"]), numbers["x"].shape[1] // 2)  # ToMe merges half at most; we refuse more
        plain = merge_tokens(numbers["x"], numbers["metric"], None, merged)
        torch.testing.assert_close(plain.tokens, numbers["out_mean"])
        sizes = numbers["size"][..., 0]
        weighted = merge_tokens(numbers["x"], numbers["metric"], None, merged, sizes, average="size")
        torch.testing.assert_close(weighted.tokens, numbers["out_wavg"])
        torch.testing.assert_close(weighted.sizes, numbers["out_size"][..., 0])

    def test_three_merges_with_a_mask(self):
        numbers = arrays("mask_tome_reference")
        tokens, person, sizes = numbers["x"], numbers["person"], None
        for layer in range(3):
            result = merge_tokens(tokens, numbers[f"l{layer}/metric"], person, int(numbers[f"l{layer}/r"]), sizes)
            tokens = numbers[f"l{layer}/out_mean"]
            person, sizes = numbers[f"l{layer}/person_out"], numbers[f"l{layer}/size_out"]
            # Scores of -inf leave the order of person tokens in A open: compare after bringing ours into theirs.
            order = torch.cdist(tokens, result.tokens).argmin(-1)
            assert order[0].sort().values.tolist() == list(range(tokens.shape[1]))
            torch.testing.assert_close(result.tokens[:, order[0]], tokens)
            assert torch.equal(result.is_person[:, order[0]], person)
            torch.testing.assert_close(result.sizes[:, order[0]], sizes)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("case", "settings"),
        [
            ("plain_k", TokenMerging()),
            ("size_prop_k", TokenMerging(average="size", proportional_attention=True)),
            ("plain_x", TokenMerging(metric="tokens")),
        ],
    )
    def test_whole_network(self, hmr2_small, crop, case, settings):  # noqa: F811
        numbers = arrays("mask_tome_small_hmr2")
        hmr = copy.deepcopy(hmr2_small)
        hmr.backbone.token_merging = settings
        output = hmr.read_out(hmr.backbone(crop[..., 32:-32], numbers["person"]))
        tokens = numbers[f"{case}/features"]
        order = torch.cdist(tokens, output.tokens).argmin(-1)[0]  # that of unmerged person tokens is open, see above
        assert order.sort().values.tolist() == list(range(90))
        assert_same(output.tokens[:, order], tokens.numpy())
        assert_same(output.rotations[:, 1:], numbers[f"{case}/body_pose"].numpy())
        assert_same(output.betas, numbers[f"{case}/betas"].numpy())
        assert_same(output.camera, numbers[f"{case}/cam"].numpy())


def grid_masks() -> dict[str, torch.Tensor]:
    """Person masks over the 16 x 12 grid of tokens, (192,) bool."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(12), indexing="ij")
    masks = {
        "none": torch.zeros(16, 12, dtype=torch.bool),
        "all": torch.ones(16, 12, dtype=torch.bool),
        "one person token": (rows == 7) & (columns == 5),
        "one background token": ~((rows == 7) & (columns == 4)),
        "two background tokens of set A": ~((rows == 7) & (columns % 6 == 4)),
        "rows": rows % 2 == 0,
        "even columns": columns % 2 == 0,
        "odd columns": columns % 2 == 1,
        "few even background columns": (columns % 2 == 1) | (rows > 2),
        "few odd background columns": (columns % 2 == 0) | (rows > 2),
    }
    for percent in (3, 20, 40, 50, 60, 80, 97):
        masks[f"random {percent} %"] = torch.rand(16, 12, generator=generator) < percent / 100
    return {name: mask.flatten() for name, mask in masks.items()}


class TestPersonsAreProtected:
    @pytest.mark.parametrize("num_merged", [1, 40, 96])
    @pytest.mark.parametrize("name", list(grid_masks()))
    def test_no_person_token_is_merged_while_a_pair_of_background_is_left(self, name, num_merged):
        person = grid_masks()[name].expand(3, -1)
        generator = torch.Generator().manual_seed(1)
        metric = torch.randn(3, 192, 8, generator=generator)
        originals = torch.eye(192).expand(3, -1, -1)  # so that the output says which tokens went where
        result = merge_tokens(originals, metric, person, num_merged)
        members = result.tokens > 0  # (3, 192 - num_merged, 192)
        assert result.tokens.shape == (3, 192 - num_merged, 192) and result.tokens.isfinite().all()
        assert (members.sum(1) == 1).all(), "every original is in exactly one token"
        torch.testing.assert_close(result.sizes, members.sum(-1).float())
        assert torch.equal(members.int().argmax(1), result.slots)
        assert torch.equal((members & person[:, None]).any(-1), result.is_person)
        for groups, mask in zip(members, person, strict=True):
            mixed_or_merged = [group for group in groups if group.sum() > 1 and (group & mask).any()]
            background_left = sum(1 for group in groups if not (group & mask).any())
            assert not mixed_or_merged or background_left <= 1
            # and not more persons than must
            persons_gone = num_merged - (int((~mask).sum()) - (groups & ~mask).any(-1).sum())
            assert persons_gone == max(0, num_merged - max(0, int((~mask).sum()) - 1))

    def test_forced_merges_go_to_their_own_most_similar_partner(self):
        # Persons in two clusters: forced to merge, each goes into its own cluster.
        metric = torch.zeros(1, 8, 2)
        metric[0, :4, 0] = metric[0, 4:, 1] = 1.0
        result = merge_tokens(metric, metric, torch.ones(1, 8, dtype=torch.bool), 4)
        assert result.tokens[0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]

    def test_the_paper_rule_on_a_schedule(self):
        person = grid_masks()["random 40 %"][None]
        state = merge_tokens(torch.randn(1, 192, 4), torch.randn(1, 192, 4), person, 40)
        for merged in (40, 22):
            state = merge_tokens(
                state.tokens, torch.randn(1, state.tokens.shape[1], 4), state.is_person, merged, state.sizes,
                slots=state.slots,
            )  # fmt: skip
        assert state.tokens.shape == (1, 90, 4)
        assert state.slots.shape == (1, 192) and state.slots.max() == 89
        assert state.sizes.sum() == 192
        assert state.is_person.sum() == person.sum()  # 110 background tokens or more went into others


class TestSchedule:
    def test_the_paper(self):
        assert TokenMerging(keep_tokens=90, per_layer=40).schedule(192, 12) == (40, 40, 22)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"keep_tokens": 400}, "keep_tokens must be in .1, 192., got 400"),
            ({"keep_tokens": 60, "per_layer": 100}, "at most half of its 192 tokens, got 100"),
            ({"keep_tokens": 90, "per_layer": 5}, "takes 21 layers from 192 to 90 tokens, but there are 12"),
            ({"keep_tokens": 0}, "keep_tokens must be a whole number of 1 or more"),
            ({"mask": "maybe"}, "mask must be one of"),
            ({"person_share": 2.0}, "person_share must be in"),
        ],
    )
    def test_what_cannot_be(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TokenMerging(**settings).schedule(192, 12)

    @pytest.mark.parametrize("num_merged", [-1, 97])
    def test_num_merged_out_of_range(self, num_merged):
        with pytest.raises(ValueError, match=r"num_merged must be in \[0, 96\]"):
            merge_tokens(torch.randn(1, 192, 4), torch.randn(1, 192, 4), None, num_merged)

    def test_a_mask_of_another_size(self):
        with pytest.raises(ValueError, match="is_person must be"):
            merge_tokens(torch.randn(1, 192, 4), torch.randn(1, 192, 4), torch.zeros(1, 90, dtype=torch.bool), 4)


class TestInTheModel:
    def test_a_missing_mask_is_an_error_and_none_is_a_choice(self):
        with pytest.raises(ValueError, match="got none: pass person_mask"):
            with_mask().eval()(torch.zeros(1, 3, 256, 256))
        assert with_mask(mask="none").eval()(torch.zeros(1, 3, 256, 256)).tokens.shape[1] == 90

    def test_a_mask_of_another_size(self):
        with pytest.raises(ValueError, match="person_mask must be"):
            with_mask()(torch.zeros(1, 3, 256, 256), torch.zeros(1, 128, 128, dtype=torch.bool))

    def test_layers_cannot_be_merged_below_what_token_merging_needs(self):
        hmr = with_mask()
        with pytest.raises(ValueError, match="takes 3 layers"):
            hmr.merge_layers(LayerMergePlan(4).merged(0, 2))
        assert hmr.merge_plan == LayerMergePlan(4) and len(hmr.backbone.blocks) == 4

    def test_gradients_reach_merged_tokens(self):
        hmr = with_mask()
        images = torch.randn(2, 3, 256, 256, requires_grad=True)
        hmr(images, torch.rand(2, 256, 256) < 0.4).rotations.square().sum().backward()
        assert images.grad[..., 40:-40].abs().amin(dim=1).gt(0).float().mean() > 0.95

    def test_bf16(self):
        hmr = with_mask().eval()
        mask = torch.rand(2, 256, 256) < 0.4
        with torch.autocast("cpu", torch.bfloat16):
            assert hmr(torch.randn(2, 3, 256, 256), mask).rotations.isfinite().all()
        state = hmr.bfloat16().backbone(torch.randn(2, 3, 256, 192).bfloat16(), hmr.person_tokens(mask))
        assert state.tokens.dtype == torch.bfloat16 and state.tokens.shape[1] == 90

    @torch.no_grad()
    def test_compiles_without_graph_breaks(self):
        hmr = with_mask().eval()
        images, mask = torch.randn(2, 3, 256, 256), torch.rand(2, 256, 256) < 0.4
        compiled = torch.compile(hmr, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images, mask).rotations, hmr(images, mask).rotations)

    @torch.no_grad()
    def test_images_do_not_depend_on_their_neighbours(self):
        hmr = with_mask().eval()
        images, mask = (
            torch.randn(3, 3, 256, 256),
            torch.rand(3, 256, 256) < torch.tensor([0.0, 0.4, 1.0])[:, None, None],
        )
        together = hmr(images, mask).rotations
        for i in range(3):
            torch.testing.assert_close(hmr(images[i : i + 1], mask[i : i + 1]).rotations[0], together[i])


def with_mask(**settings) -> HMR:
    torch.manual_seed(0)
    from dataclasses import replace

    return HMR(replace(SMALL, token_merging=TokenMerging(**settings)))


class TestTokenMask:
    def test_where_tokens_lie(self):
        # Token (row 3, column 5) covers pixel rows 46 to 61 and columns 108 + ... of the crop: 30 + 80 = 110 to 125.
        mask = torch.zeros(1, 256, 256, dtype=torch.bool)
        mask[0, 46:62, 110:126] = True
        assert token_mask(mask, 1.0).nonzero().tolist() == [[0, 3 * 12 + 5]]

    def test_share(self):
        mask = torch.zeros(1, 256, 256, dtype=torch.bool)
        mask[0, 46:54, 110:126] = True  # half of that token
        assert token_mask(mask, 0.5).sum() == 1
        assert token_mask(mask, 0.51).sum() == 0
        mask[:] = False
        assert token_mask(mask, 0.0).sum() == 0
        mask[0, 100, 100] = True
        assert token_mask(mask, 0.0).sum() == 1


def test_other_people_are_background_unless_set_otherwise(tiny_shards):
    from datamodules.samples import ValidationSamples
    from fasthmr.conventions import MASK_OTHER, MASK_SUBJECT
    from fasthmr.data.batch import collate, person_mask
    from fasthmr.data.shards import ClipStore

    batch = collate([ValidationSamples(ClipStore(tiny_shards), window=2)[0]])
    batch.masks[:, :, :8] = MASK_OTHER
    assert torch.equal(person_mask(batch), (batch.masks == MASK_SUBJECT)[0])
    assert torch.equal(person_mask(batch, "all"), (batch.masks > 0)[0])
