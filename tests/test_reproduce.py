"""docs/reproduce.md, command by command, on miniature files of the formats that it names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import foreign_sets as foreign
import numpy as np
import pytest

import fasthmr.evaluate
import fasthmr.export
import fasthmr.merge
import fasthmr.shard
from fasthmr.body import load_body
from fasthmr.body.files import FREE_BODY
from fasthmr.checkpoint import encoder_id, load_decoder, load_encoder
from fasthmr.data.shards import ClipStore
from fasthmr.fit import fit

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
GUIDE = (ROOT / "docs/reproduce.md").read_text()
MODELS = ("hmr2", "camerahmr")
#: of the pictures, px
SIZE = (160, 120)

# ---- the guide's commands ------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.S)


def commands() -> list[str]:
    """As a shell would run them, those with $MODEL once for each."""
    variables: dict[str, str] = {}
    found = []
    for line in "\n".join(blocks("bash")).replace("\\\n", " ").splitlines():
        name, equals, value = line.partition("=")
        if equals and name.isupper():
            variables[name] = string.Template(shlex.split(value)[0]).substitute(variables)
        elif "MODEL" in line:
            found += [string.Template(line).substitute(variables | {"MODEL": model}) for model in MODELS]
        elif line:
            found.append(string.Template(line).substitute(variables))
    return found


def run_fit(arguments: list[str]) -> int:
    fit(arguments)
    return 0


MAINS: dict[str, Callable[[list[str]], int]] = {
    "shard": fasthmr.shard.main,
    "export": fasthmr.export.main,
    "merge": fasthmr.merge.main,
    "evaluate": fasthmr.evaluate.main,
    "fit": run_fit,
}


@dataclass(frozen=True)
class Miniature:
    """What is put in the place of words of the commands that begin so, and what is added to them."""

    start: str
    replaced: dict[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()


def keys(prefix: str, **values: object) -> tuple[str, ...]:
    return tuple(f"--{prefix}{name}={value}" for name, value in values.items())


QUICK = (
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false",
    "--trainer.check_val_every_n_epoch=1", "--trainer.precision=32",
)  # fmt: skip
WINDOW = 12
MINIATURES = (
    Miniature("export", added=("--vit_heads=4",)),
    Miniature("shard convert", added=("--workers=1",)),
    Miniature("shard masks", {"yolo": "folder", "yolo11n-seg.pt": "masks", "yolo11x-seg.pt": "masks"}),
    Miniature("shard verify"),
    Miniature("merge", added=("--frames_per_clip=2", "--batch=1")),
    Miniature("evaluate", added=("--rounds=1", "--batch=2", "--workers=0", "--bootstrap=10")),
    Miniature("fit -c conf/prior.yaml", added=(*QUICK,
        *keys("model.init_args.vae.", window=WINDOW, latents=3, dim=32, depth=3, heads=2, mlp_dim=32),
        *keys("data.init_args.", window=WINDOW, windows_per_epoch=4, val_windows=2, batch_size=2, workers=0))),
    Miniature("fit -c conf/decoder.yaml", added=(*QUICK,
        *keys("model.init_args.denoiser.", depth=3, heads=2, mlp_dim=32),
        *keys("data.init_args.", window=WINDOW, batch_size=1, workers=0))),
    Miniature("fit -c conf/train_hmr2.yaml", added=(*QUICK,
        *keys("model.init_args.net.", vit_dim=64, vit_depth=4, vit_heads=4, head_dim=128, head_depth=2, head_heads=8,
              head_dim_head=16, head_mlp_dim=96),
        *keys("data.init_args.", clips_per_epoch=12, batch_size=4, val_frames=3, workers=0),
        # due at once, and always inside the budget
        *keys("trainer.callbacks.", every_n_steps=1, budget_mm=10_000, target_layers=3))),
)  # fmt: skip


def miniature_of(command: str) -> Miniature:
    return next(m for m in MINIATURES if command.startswith(f"python -m fasthmr.{m.start}"))


def run(command: str) -> None:
    miniature = miniature_of(command)
    python, _, module, *rest = shlex.split(command)
    assert python == "python"
    words = [miniature.replaced.get(word, word) for word in rest] + list(miniature.added)
    if words[0] == "masks":
        write_masks(Path(words[1]), Path("masks"))
    assert MAINS[module.removeprefix("fasthmr.")](words) == 0, shlex.join(words)


# ---- the downloads ---------------------------------------------------------------------------------------------------


def write_downloads(folder: Path) -> None:
    """All that the guide's first table asks for, in little."""
    with np.load(FREE_BODY) as file:
        members = dict(file)
    for gender, scale in (("NEUTRAL", 1.0), ("MALE", 1.05), ("FEMALE", 0.95)):
        foreign.write_pickle(
            folder / f"SMPL_{gender}.pkl", members | {"v_template": scale * members["v_template"]}, protocol=2
        )
    rng = np.random.default_rng(0)
    regressor = rng.random((17, len(members["v_template"]))) ** 40
    np.save(folder / "J_regressor_h36m.npy", regressor / regressor.sum(1, keepdims=True))
    neutral, male, female = (load_body(folder / f"SMPL_{g}.pkl") for g in ("NEUTRAL", "MALE", "FEMALE"))
    raw = folder / "raw"
    raw.mkdir()
    for model in MODELS:
        shutil.copy(FIXTURES / f"{model}_small.ckpt", raw / f"{model}.ckpt")
    foreign.write_threedpw(raw / "3DPW", [foreign.take(male, 8, seed=1, size=SIZE)], ["m"], np.ones((1, 8)))
    foreign.write_emdb(raw / "EMDB", foreign.take(female, 8, seed=2, size=SIZE))
    foreign.write_emdb(raw / "EMDB", foreign.take(female, 8, seed=3, size=SIZE), "10_indoor")
    for split, seed in (("train", 4), ("test", 5)):
        made = foreign.take(neutral, frames=16, seed=seed, size=SIZE, still=True)
        foreign.write_h36m_hybrik(raw / "H36M", made, split=split)
    foreign.write_3dhp_neural_annot(raw / "3DHP", foreign.take(neutral, frames=4, seed=6, size=SIZE, still=True))
    foreign.write_bedlam(raw / "BEDLAM", "scene", foreign.take(neutral, seed=7, size=SIZE), with_masks=True)
    made = foreign.take(neutral, frames=2, seed=8, size=SIZE)
    members = foreign.hmr2_members("one", made, 0, [foreign.hmr2_person(made)])
    members |= foreign.hmr2_members("two", made, 1, [foreign.hmr2_person(made, 1)], with_masks=False)
    foreign.write_tar(raw / "4DHumans/coco/000000.tar", members)
    for part, seed in (("AMASS", 9), ("AMASS_val", 10)):
        foreign.write_amass(raw / part / "CMU/01/01_01_poses.npz", foreign.take(neutral, 120, seed, up="z", still=True))


def write_masks(data: Path, folder: Path) -> None:
    """White where the box is, for every clip of a set, of the size of the stored crops."""
    for clip in ClipStore(data):
        for frame in range(len(clip)):
            mask = np.zeros((384, 384), np.uint8)
            mask[64:320, 64:320] = 255
            (folder / clip.key).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(folder / clip.key / f"{frame:05d}.png"), mask)


# ---- the walk --------------------------------------------------------------------------------------------------------


def test_every_command_has_its_miniature_and_every_miniature_a_command() -> None:
    used = {miniature_of(command).start for command in commands()}
    assert used == {miniature.start for miniature in MINIATURES}


def test_the_commands_lead_from_downloads_to_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    write_downloads(tmp_path)
    (callback,) = blocks("yaml")
    (tmp_path / "progressive.yaml").write_text(callback)
    monkeypatch.chdir(tmp_path)
    for command in commands():
        run(command)

    for data, protocol in (("3dpw", "3dpw-14"), ("emdb", "emdb-24")):
        assert rows(f"baselines_{data}", protocol) == ["HMR2.0", "CameraHMR"]
        for model in MODELS:
            assert rows(f"{model}_{data}", protocol) == ["baseline", "+ ECLM", "+ Mask-ToMe", "+ decoder"]
    for model in MODELS:
        report = json.loads(Path(f"{model}-merged.json").read_text())
        assert report["calibration_frames"] == 2 * 2 and report["tau_mm"] == 0.1  # clips of EMDB, frames of each
        merged = load_encoder(f"{model}-merged.ckpt")
        assert merged.config.architecture == model and merged.config.token_merging.keep_tokens == 90
        decoder, _ = load_decoder(f"runs/decoder_{model}/checkpoints/best.ckpt")
        assert decoder.encoder == encoder_id(merged)
    assert len(load_encoder("runs/train_hmr2/checkpoints/best.ckpt").backbone.blocks) == 3


def rows(name: str, protocol: str) -> list[str]:
    """The systems of a table of `protocol`, of which all errors are known."""
    results = json.loads(Path(f"results/{name}/results.json").read_text())
    assert protocol in Path(f"results/{name}/table.md").read_text().splitlines()[0]
    for system in results["systems"]:
        assert all(np.isfinite(error["value"]) for error in system["errors"].values())
    return [system["name"] for system in results["systems"]]
