"""Foreign checkpoints: every name and shape of the originals fits, nothing in a file is run, and bad ones are named."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fasthmr import checkpoint_files
from fasthmr.checkpoint_files import CheckpointError
from fasthmr.foreign import load_backbone, load_foreign_human_fov, load_hmr, read_foreign, what_is
from fasthmr.merging import LayerMergePlan
from fasthmr.models.adapters import foreign_names, hmr_config, hmr_state_dict, human_fov_state_dict, recognised
from fasthmr.models.hmr import HMR, HMRConfig
from fasthmr.models.human_fov import HumanFoV
from fasthmr.speed.loading import write_both_formats

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = {"hmr2": FIXTURES / "hmr2_small.ckpt", "camerahmr": FIXTURES / "camerahmr_small.ckpt"}


@pytest.fixture(scope="module")
def full() -> dict[str, nn.Module]:
    """Our networks of the originals' sizes, without memory."""
    with torch.device("meta"):
        return {
            "hmr2": HMR(HMRConfig.hmr2()), "camerahmr": HMR(HMRConfig.camerahmr()), "flnet": HumanFoV()
        }  # fmt: skip


@pytest.fixture(scope="module")
def contract() -> dict[str, dict[str, torch.Tensor]]:
    """Names and shapes of the originals' full-size checkpoints, as tensors without memory."""
    shapes = json.loads(gzip.decompress((FIXTURES / "full_keys.json.gz").read_bytes()))
    return {
        which: {name: torch.empty(shape, device="meta") for name, shape in names.items()}
        for which, names in shapes.items()
    }


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def save(path: Path, **content) -> Path:
    torch.save(content, path)
    return path


class TestKeyContract:
    @pytest.mark.parametrize(
        "architecture, ignored",
        [("hmr2", {"discriminator", "smpl", "initialized"}), ("camerahmr", set())],
    )
    def test_encoders(self, contract, full, architecture, ignored):
        foreign = contract[architecture]
        assert recognised(foreign) == architecture
        ours = hmr_state_dict(foreign, architecture)
        assert hmr_config(ours, architecture, None) == HMRConfig(architecture=architecture)
        expected = full[architecture].state_dict()
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in expected.items()}
        kept = {id(tensor) for tensor in ours.values()}
        assert {name.partition(".")[0] for name, tensor in foreign.items() if id(tensor) not in kept} == ignored

    def test_our_names_in_theirs(self, contract):
        ours = hmr_state_dict(contract["camerahmr"], "camerahmr")
        assert set(foreign_names(ours).values()) == contract["camerahmr"].keys()

    def test_human_fov(self, contract, full):
        foreign = contract["flnet"]
        assert recognised(foreign) == "human_fov" and len(foreign) == 1874
        ours = human_fov_state_dict(foreign)
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in full["flnet"].state_dict().items()}
        assert foreign.keys() - ours.keys() == {
            "fc2.weight", "fc2.bias", "backbone.final_layer.weight", "backbone.final_layer.bias",
        }  # fmt: skip

    def test_parameter_counts(self, contract, full):
        def count(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        hmr, fov = full["camerahmr"], full["flnet"]
        ours = fov.state_dict().keys()
        never_called = sum(tensor.numel() for name, tensor in contract["flnet"].items() if name not in ours)
        assert count(hmr.smpl_head) == 39_800_053
        assert count(fov) + never_called == 67_677_178
        assert count(hmr) + count(fov) + never_called == 738_389_231

    def test_a_training_checkpoint_of_camerahmr_has_more_and_it_is_left_out_by_name(self, contract):
        more = {f"cam_model.{name}": tensor for name, tensor in contract["flnet"].items()}
        more |= {f"{body}.shapedirs": torch.zeros(1) for body in ("smpl", "smpl_layer", "smpl_gt", "smpl_gt_female")}
        foreign = contract["camerahmr"] | more | {"initialized": torch.tensor(True)}
        assert hmr_state_dict(foreign, "camerahmr").keys() == hmr_state_dict(contract["camerahmr"], "camerahmr").keys()
        assert human_fov_state_dict(foreign).keys() == human_fov_state_dict(contract["flnet"]).keys()


class TestLoading:
    @pytest.mark.parametrize("architecture", ["hmr2", "camerahmr"])
    def test_sizes_are_read_from_the_shapes(self, architecture):
        assert what_is(SMALL[architecture]) == architecture
        hmr = load_hmr(SMALL[architecture], architecture, vit_heads=4)
        assert (hmr.config.vit_dim, hmr.config.vit_depth, hmr.config.head_dim_head) == (64, 4, 16)
        expected = hmr_state_dict(state_dict(SMALL[architecture]), architecture)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in hmr.state_dict().items())
        assert not hmr.training

    def test_heads_that_weights_do_not_tell_are_asked_for(self):
        with pytest.raises(CheckpointError, match=r"how many attention heads has a ViT of width 64.*pass vit_heads"):
            load_hmr(SMALL["hmr2"], "hmr2")

    def test_in_several_portions(self, monkeypatch):
        whole = load_hmr(SMALL["hmr2"], "hmr2", vit_heads=4).state_dict()
        monkeypatch.setattr(checkpoint_files, "_PORTION_BYTES", 100_000)
        parts = load_hmr(SMALL["hmr2"], "hmr2", vit_heads=4).state_dict()
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())

    def test_another_head_is_refused_with_the_names_and_what_is_possible(self, tmp_path):
        weights = state_dict(SMALL["hmr2"])
        weights["smpl_head.tokenizer.codebook"] = torch.zeros(3)
        path = save(tmp_path / "tokenhmr.ckpt", state_dict=weights)
        with pytest.raises(CheckpointError, match=r"unexpected smpl_head\.tokenizer\.codebook; .* --from backbone"):
            load_hmr(path, "hmr2", vit_heads=4)

    def test_hmr2_is_not_camerahmr(self):
        with pytest.raises(CheckpointError, match=r"missing smpl_head\.deckp\.weight"):
            load_hmr(SMALL["hmr2"], "camerahmr", vit_heads=4)

    def test_human_fov(self, tmp_path):
        fov = HumanFoV(width=4)
        weights = fov.state_dict() | {"fc2.weight": torch.zeros(2), "backbone.final_layer.bias": torch.zeros(2)}
        for names in (weights, {f"cam_model.{name}": tensor for name, tensor in weights.items()}):
            loaded = load_foreign_human_fov(save(tmp_path / "fov.ckpt", state_dict=names)).state_dict()
            assert all(torch.equal(tensor, loaded[name]) for name, tensor in fov.state_dict().items())

    def test_what_is_nothing_that_is_known(self, tmp_path):
        path = save(tmp_path / "x.ckpt", state_dict={"resnet.conv1.weight": torch.zeros(1)})
        with pytest.raises(CheckpointError, match="holds none of hmr2, camerahmr, human_fov, backbone"):
            what_is(path)


MEASURE = """
import sys
from pathlib import Path
from fasthmr import checkpoint_files
from fasthmr.speed.memory import peak_memory
from fasthmr.checkpoint import load_encoder
from fasthmr.foreign import load_hmr

theirs, ours = map(Path, sys.argv[1:])
checkpoint_files._PORTION_BYTES = ours.stat().st_size // 20
load_encoder("shipped:encoder_tiny")
before = peak_memory()
load_hmr(theirs, "hmr2", 4)
print((peak_memory() - before) / ours.stat().st_size)
"""


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    theirs, ours = tmp_path / "theirs.ckpt", tmp_path / "ours.safetensors"
    write_both_formats(HMRConfig(vit_dim=512, vit_depth=12, vit_heads=4), theirs, ours)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(theirs), str(ours)], capture_output=True, text=True, check=True
    )
    assert 0.8 < float(done.stdout) < 1.3


class TestBackbone:
    @pytest.mark.parametrize("prefix", ["backbone.", "", "module.backbone."], ids=["HMR2.0 and HaMeR", "bare", "DDP"])
    def test_of_any_network_that_has_one(self, tmp_path, prefix, caplog):
        backbone = {n: t for n, t in state_dict(SMALL["hmr2"]).items() if n.startswith("backbone.")}
        foreign = {prefix + name.removeprefix("backbone."): tensor for name, tensor in backbone.items()}
        path = save(tmp_path / "x.ckpt", state_dict=foreign | {"mano_head.decpose.weight": torch.zeros(96, 8)})
        assert what_is(path) == "backbone"
        head = HMRConfig(architecture="camerahmr", head_dim=24, head_depth=1, head_heads=2, head_dim_head=8)
        with caplog.at_level("INFO"):
            hmr = load_backbone(path, head, vit_heads=4)
        assert "mano_head (1 tensors)" in caplog.text
        assert all(torch.equal(tensor, hmr.state_dict()[name]) for name, tensor in backbone.items())
        assert (hmr.config.head_dim, hmr.config.architecture) == (24, "camerahmr")

    def test_it_can_be_merged(self):
        hmr = load_backbone(SMALL["hmr2"], HMRConfig(head_dim=24, head_depth=1), vit_heads=4)
        hmr.merge_layers(LayerMergePlan(4).merged(2, 3))
        assert hmr(torch.zeros(1, 3, 256, 256)).feature.isfinite().all()

    def test_the_head_is_drawn_from_the_seed_alone(self):
        def head(seed: int) -> torch.Tensor:
            config = HMRConfig(head_dim=24, head_depth=1)
            return load_backbone(SMALL["hmr2"], config, vit_heads=4, seed=seed).smpl_head.layers[0].mlp.fc1.weight

        before = torch.get_rng_state()
        assert torch.equal(head(0), head(0)) and not torch.equal(head(0), head(1))
        assert torch.equal(torch.get_rng_state(), before)

    def test_positions_of_another_picture_size_are_refused(self, tmp_path):
        weights = state_dict(SMALL["hmr2"])
        weights["backbone.pos_embed"] = torch.zeros(1, 197, 64)
        with pytest.raises(CheckpointError, match=r"backbone\.pos_embed \(1, 197, 64\) instead of \(1, 193, 64\)"):
            load_backbone(save(tmp_path / "mae.pth", model=weights), vit_heads=4)

    def test_a_file_without_one(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"it has no ViT as HMR2\.0's"):
            load_backbone(save(tmp_path / "x.pth", state_dict={"conv.weight": torch.zeros(1)}))


@pytest.fixture
def vanishing(monkeypatch):
    """Makes classes of packages that exist only while a file is written, as those of an old training do."""

    def make(full_name: str, base: type = object) -> type:
        package, module, name = full_name.split(".")
        for part in (package, f"{package}.{module}"):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        cls = type(name, (base,), {"__module__": f"{package}.{module}"})
        setattr(sys.modules[f"{package}.{module}"], name, cls)
        return cls

    return make


class Evil:
    """Copies a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return shutil.copyfile, (__file__, str(self.marker))


class TestNothingIsRun:
    def test_configs_of_old_trainings_are_passed_over(self, tmp_path, vanishing, monkeypatch):
        node, container = vanishing("yacs.config.CfgNode", dict), vanishing("easydict.main.EasyDict")
        config, other = node(A=1), container()
        config.__dict__["__immutable__"] = True
        config["MODEL"] = node(DEPTH=3)
        other.__dict__["_content"] = {"lr": 1e-4}
        path = save(
            tmp_path / "old.ckpt",
            state_dict=state_dict(SMALL["hmr2"]),
            hyper_parameters={"cfg": config, "other": other, "where": Path("x")},
        )
        monkeypatch.setitem(sys.modules, "yacs", None)  # as where it is not installed
        assert load_hmr(path, "hmr2", vit_heads=4).config.vit_dim == 64

    def test_a_command_is_not_run_and_its_name_is_told(self, tmp_path):
        path = save(tmp_path / "x.ckpt", state_dict={"a": torch.zeros(1)}, extra=Evil(tmp_path / "was_run"))
        with pytest.raises(CheckpointError, match=r"asks for shutil\.copyfile, .*; nothing was run"):
            read_foreign(path)
        assert not (tmp_path / "was_run").exists()

    def test_not_even_under_a_harmless_package(self, tmp_path, vanishing):
        class Disguised(vanishing("yacs.config.CfgNode")):  # type: ignore[misc]
            def __reduce__(self):
                return sys.modules["yacs.config"].CfgNode, (str(tmp_path / "was_run"),)

        path = save(tmp_path / "x.ckpt", state_dict={"a": torch.zeros(1)}, extra=Disguised())
        assert read_foreign(path).keys() == {"a"}

    @pytest.mark.parametrize("kept", [0.2, 0.7, 0.999])
    def test_truncated(self, tmp_path, kept):
        whole = SMALL["hmr2"].read_bytes()
        (tmp_path / "cut.ckpt").write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt is damaged"):
            load_hmr(tmp_path / "cut.ckpt", "hmr2")

    @pytest.mark.parametrize(
        "program",
        [
            b"",
            b"garbage",
            b"\x80\x02]q\x00(K\x01K\x02",  # ends in the middle of a list
            b"\x80\x02X\xff\xff\xff\xff",  # a string of 4 GB
            b"\x80\x02K\x01K\x02s.",  # sets an item of a number
            b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",  # a protocol torch does not write
            pickle.dumps({"state_dict": "none"}, 2),
            pickle.dumps({"state_dict": {"a": 1}}, 2),
        ],
    )
    def test_damaged_pickles(self, tmp_path, program):
        with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
        with pytest.raises(CheckpointError, match=r"x\.ckpt"):
            read_foreign(tmp_path / "x.ckpt")

    def test_a_zip_bomb(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 2**24)
        with pytest.raises(CheckpointError, match=r"data\.pkl in it is compressed"):
            read_foreign(tmp_path / "x.ckpt")

    def test_a_tensor_that_says_it_is_larger_than_its_file(self, tmp_path):
        weights = state_dict(SMALL["hmr2"])
        weights["backbone.blocks.0.attn.proj.weight"] = torch.zeros(1).expand(2**20, 2**20)
        with pytest.raises(CheckpointError, match=r"\(1048576, 1048576\) is larger than what is stored of it"):
            load_hmr(save(tmp_path / "x.ckpt", state_dict=weights), "hmr2")

    def test_a_file_that_is_replaced_while_it_is_read(self, tmp_path, monkeypatch):
        path = tmp_path / "x.ckpt"
        path.write_bytes(SMALL["hmr2"].read_bytes())
        identities = iter([(1, 1, 1), (2, 2, 2)])
        monkeypatch.setattr(checkpoint_files, "_identity", lambda _: next(identities))
        with pytest.raises(CheckpointError, match="was replaced while it was read"):
            load_hmr(path, "hmr2", vit_heads=4)
