"""Checkpoints: what is saved comes back, and what is not a good checkpoint is refused by name."""

from pathlib import Path

import pytest
import torch

from fasthmr.checkpoint import CheckpointError, encoder_header, load_encoder, read_header, save_encoder
from fasthmr.merging import LayerMergePlan
from fasthmr.models.hmr import HMR, HMRConfig

MICRO = HMRConfig(
    vit_dim=32, vit_depth=3, vit_heads=2, head_dim=24, head_depth=2, head_heads=2, head_dim_head=8, head_mlp_dim=16
)
BODY = "free@0123456789abcdef"


@pytest.fixture(scope="module")
def hmr() -> HMR:
    torch.manual_seed(0)
    return HMR(MICRO)


@pytest.fixture
def saved(hmr, tmp_path) -> Path:
    path = tmp_path / "encoder.pt"
    save_encoder(path, hmr, BODY)
    return path


def edit(path: Path, change) -> Path:
    """Rewrite a checkpoint after `change(content)`."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def lightning_like(hmr: HMR, averaged: HMR, prefix: str) -> dict:
    """What the training loop writes: two networks, an optimiser, loops, and our header."""
    optimizer = torch.optim.AdamW(hmr.parameters())
    sum(p.sum() for p in hmr.parameters()).backward()
    optimizer.step()
    state_dict = {f"net.{k}": v for k, v in hmr.state_dict().items()}
    state_dict |= {f"ema.module.{k}": v for k, v in averaged.state_dict().items()} | {"ema.n_averaged": torch.tensor(7)}
    return {
        "epoch": 3,
        "global_step": 70,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state_dict,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 70}],
        "loops": {"fit_loop": {"state_dict": {}}},
        "fasthmr": encoder_header(MICRO, BODY, LayerMergePlan(MICRO.vit_depth), prefix),
    }


def test_round_trip(hmr, saved):
    loaded = load_encoder(saved)
    assert loaded.config == MICRO and not loaded.training
    assert loaded.state_dict().keys() == hmr.state_dict().keys()
    for name, tensor in hmr.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    image = torch.randn(1, 3, 256, 256)
    torch.testing.assert_close(loaded(image), hmr.eval()(image), rtol=0, atol=0)


def test_header(saved):
    header = read_header(saved)
    assert (header.format_version, header.config, header.body, header.merge_plan) == (
        2,
        MICRO,
        BODY,
        LayerMergePlan(MICRO.vit_depth),
    )


def test_the_file_is_plain_data(saved):
    content = torch.load(saved, weights_only=True)
    assert content.keys() == {"fasthmr", "state_dict"}
    assert content["fasthmr"]["kind"] == "encoder"


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load_encoder(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loaded_network_does_not_depend_on_the_file(hmr, saved):
    loaded = load_encoder(saved)
    saved.write_bytes(b"")
    name, tensor = next(iter(hmr.state_dict().items()))
    torch.testing.assert_close(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("prefix, uses_average", [("net.", False), ("ema.module.", True)])
def test_a_training_checkpoint_loads_the_weights_its_header_names(tmp_path, prefix, uses_average):
    current, averaged = HMR(MICRO), HMR(MICRO)
    torch.save(lightning_like(current, averaged, prefix), tmp_path / "last.ckpt")
    loaded = load_encoder(tmp_path / "last.ckpt").state_dict()
    expected = (averaged if uses_average else current).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_saving_is_atomic(hmr, saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_encoder(saved, hmr, BODY)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_a_view_saves_only_the_view(hmr, tmp_path):
    save_encoder(tmp_path / "plain.pt", hmr, BODY)
    views = HMR(MICRO)
    for parameter in views.parameters():
        parameter.data = torch.zeros(100_000)[: parameter.numel()].view_as(parameter)
    save_encoder(tmp_path / "views.pt", views, BODY)
    sizes = [(tmp_path / name).stat().st_size for name in ("plain.pt", "views.pt")]
    assert sizes[1] < 1.1 * sizes[0]


class TestRefused:
    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing\.ckpt"):
            load_encoder(tmp_path / "missing.ckpt")

    def test_a_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="is not a file"):
            load_encoder(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00."])
    def test_other_files(self, tmp_path, content):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.ckpt is damaged, incomplete, or no checkpoint"):
            load_encoder(tmp_path / "x.ckpt")

    @pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
    def test_truncated(self, saved, kept):
        whole = saved.read_bytes()
        saved.write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(CheckpointError, match=r"encoder\.pt is damaged"):
            load_encoder(saved)

    def test_one_flipped_bit_in_a_weight(self, hmr, saved):
        content = bytearray(saved.read_bytes())
        where = content.find(hmr.state_dict()["backbone.pos_embed"].numpy().tobytes())
        assert where > 0
        content[where] ^= 1
        saved.write_bytes(content)
        with pytest.raises(CheckpointError, match="Bad CRC-32"):
            load_encoder(saved)

    def test_a_zip_of_something_else(self, tmp_path):
        import zipfile

        with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            load_encoder(tmp_path / "x.ckpt")

    def test_objects_other_than_plain_data(self, saved):
        content = torch.load(saved, weights_only=True)
        torch.save(content | {"hyper_parameters": Path("x")}, saved)
        with pytest.raises(CheckpointError, match="holds objects other than tensors and plain data"):
            load_encoder(saved)

    def test_a_foreign_checkpoint(self, tmp_path):
        torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, tmp_path / "foreign.ckpt")
        with pytest.raises(CheckpointError, match=r"foreign\.ckpt is not a fasthmr checkpoint: it has no 'fasthmr'"):
            read_header(tmp_path / "foreign.ckpt")

    def test_not_a_dict(self, tmp_path):
        torch.save(torch.zeros(3), tmp_path / "tensor.pt")
        with pytest.raises(CheckpointError, match="holds a Tensor, not a dict"):
            read_header(tmp_path / "tensor.pt")

    @pytest.mark.parametrize("version, advice", [(3, "use a newer fasthmr"), (0, "use the fasthmr that wrote it")])
    def test_another_format_version(self, saved, version, advice):
        edit(saved, lambda content: content["fasthmr"].update(format_version=version))
        with pytest.raises(CheckpointError, match=f"format {version}, this version of fasthmr reads 1 to 2: {advice}"):
            load_encoder(saved)

    def test_another_kind(self, saved):
        edit(saved, lambda content: content["fasthmr"].update(kind="motion_prior"))
        with pytest.raises(CheckpointError, match="of kind 'motion_prior', not 'encoder'"):
            load_encoder(saved)

    @pytest.mark.parametrize("field", ["config", "merge_plan", "body", "weights_prefix"])
    def test_a_header_without_a_field(self, saved, field):
        edit(saved, lambda content: content["fasthmr"].pop(field))
        with pytest.raises(CheckpointError, match=f"header field '{field}' must be a .*, got None"):
            read_header(saved)

    def test_an_unknown_config_key(self, saved):
        edit(saved, lambda content: content["fasthmr"]["config"].update(vit_width=3))
        with pytest.raises(CheckpointError, match="header field 'config': unknown key 'vit_width'"):
            read_header(saved)

    def test_merged_layers(self, saved):
        edit(saved, lambda content: content["fasthmr"].update(merge_plan=[{"first": 1, "last": 2}]))
        with pytest.raises(
            CheckpointError, match="header field 'merge_plan': a merge event has the keys keep and drop"
        ):
            load_encoder(saved)

    def test_missing_unexpected_and_misshapen_weights(self, saved):
        def spoil(content: dict) -> None:
            weights = content["state_dict"]
            weights["backbone.extra"] = weights.pop("backbone.last_norm.weight")
            weights["smpl_head.deccam.bias"] = torch.zeros(4)

        with pytest.raises(CheckpointError) as error:
            load_encoder(edit(saved, spoil))
        assert "missing backbone.last_norm.weight" in str(error.value)
        assert "unexpected backbone.extra" in str(error.value)
        assert "wrong shape smpl_head.deccam.bias (4,) instead of (3,)" in str(error.value)

    def test_a_long_list_of_names_is_cut(self, saved):
        def drop_head(content: dict) -> None:
            for name in [n for n in content["state_dict"] if n.startswith("smpl_head.")]:
                del content["state_dict"][name]

        with pytest.raises(CheckpointError, match=r"missing smpl_head\.token_pos, .* and \d+ more"):
            load_encoder(edit(saved, drop_head))

    def test_a_prefix_without_weights(self, saved):
        edit(saved, lambda content: content["fasthmr"].update(weights_prefix="ema.module."))
        with pytest.raises(CheckpointError, match=r"no weights whose names start with 'ema\.module\.'"):
            load_encoder(saved)

    def test_no_state_dict(self, saved):
        with pytest.raises(CheckpointError, match="has no 'state_dict'"):
            load_encoder(edit(saved, lambda content: content.pop("state_dict")))
