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
import torch

import fasthmr.evaluate
import fasthmr.export
import fasthmr.merge
import fasthmr.shard
from fasthmr.body import BodyModel, load_body
from fasthmr.body.files import FREE_BODY
from fasthmr.checkpoint import encoder_id, load_decoder, load_encoder, load_human_fov
from fasthmr.data.shards import ClipStore
from fasthmr.fit import fit
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.models.human_fov import HumanFoV

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
    Miniature("fit -c conf/train_", added=(*QUICK,
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


def write_bodies(folder: Path) -> tuple[BodyModel, BodyModel, BodyModel]:
    """The neutral body, and ones 5 % larger and smaller."""
    with np.load(FREE_BODY) as file:
        members = dict(file)
    for gender, scale in (("NEUTRAL", 1.0), ("MALE", 1.05), ("FEMALE", 0.95)):
        foreign.write_pickle(
            folder / f"SMPL_{gender}.pkl", members | {"v_template": scale * members["v_template"]}, protocol=2
        )
    neutral, male, female = (load_body(folder / f"SMPL_{g}.pkl") for g in ("NEUTRAL", "MALE", "FEMALE"))
    return neutral, male, female


def write_regressor(folder: Path) -> np.ndarray:
    """(17, V), of no body in particular."""
    regressor = np.random.default_rng(0).random((17, load_body("free").num_vertices)) ** 40
    regressor /= regressor.sum(1, keepdims=True)
    np.save(folder / "J_regressor_h36m.npy", regressor)
    return regressor


def write_human_fov(file: Path) -> None:
    """HumanFoV, small, with a part that it never calls, as the original has one."""
    file.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": HumanFoV(width=4).state_dict() | {"fc2.bias": torch.zeros(1)}}, file)


def write_downloads(folder: Path) -> None:
    """All that the guide's first table asks for, in little."""
    write_regressor(folder)
    neutral, male, female = write_bodies(folder)
    raw = folder / "raw"
    write_human_fov(raw / "cam_model.ckpt")
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
    foreign.write_camerahmr(raw / "CameraHMR", foreign.take(neutral, frames=2, seed=11, size=SIZE))
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

    assert load_human_fov("human_fov.safetensors").width == 4
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
        tuned = load_encoder(f"runs/train_{model}/checkpoints/best.ckpt")
        assert tuned.config.architecture == model and len(tuned.backbone.blocks) == 3


# ---- the numbers -----------------------------------------------------------------------------------------------------


def write_constant(model: str, path: Path, pose: np.ndarray, betas: np.ndarray) -> None:
    """A checkpoint of `model` whose network says the same of every picture: `pose` (24, 3) and `betas` (10,)."""
    checkpoint = torch.load(FIXTURES / f"{model}_small.ckpt", weights_only=True)
    weights = checkpoint["state_dict"]
    for name in ("decpose", "decshape"):
        for part in ("weight", "bias"):
            weights[f"smpl_head.{name}.{part}"].zero_()
    first_two_columns = axis_angle_to_matrix(torch.from_numpy(pose))[..., :2].mT
    weights["smpl_head.init_body_pose"].copy_(first_two_columns.reshape(1, 144))
    weights["smpl_head.init_betas"].copy_(torch.from_numpy(betas)[None])
    torch.save(checkpoint, path)


Points = tuple[np.ndarray, np.ndarray]  # joints (..., J, 3) and vertices (..., V, 3), metres


def expected(truths: list[Points], said: Points, root: list[int]) -> dict[str, float]:
    """The errors, in mm and m/s², of what stands still, the long way and by none of our code.

    Args:
        truths: of each sequence, in the frames that count.
        said: of every frame.
        root: joints whose mean is the origin.
    """

    def rooted(joints: np.ndarray, vertices: np.ndarray) -> Points:
        return joints - joints[root].mean(0), vertices - joints[root].mean(0)

    errors: dict[str, list[float]] = {"pa_mpjpe_mm": [], "mpjpe_mm": [], "pve_mm": [], "accel_m_s2": []}
    joints, mesh = rooted(*said)
    for truth in truths:
        moving = []
        for true_joints, true_mesh in (rooted(*frame) for frame in zip(*truth, strict=True)):
            aligned = best_similarity(joints, true_joints)
            for name, apart in (
                ("pa_mpjpe_mm", aligned - true_joints), ("mpjpe_mm", joints - true_joints), ("pve_mm", mesh - true_mesh)
            ):  # fmt: skip
                errors[name].append(np.linalg.norm(apart, axis=1).mean())
            moving.append(true_joints)
        second = np.diff(moving, 2, axis=0)[1:-1] * 30**2
        errors["accel_m_s2"] += np.linalg.norm(second, axis=2).mean(1).tolist()
    return {name: np.mean(each) * (1000 if name.endswith("mm") else 1) for name, each in errors.items()}


def best_similarity(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`points` (N, 3) turned, scaled and moved onto `target` (Umeyama 1991)."""
    a, b = points - points.mean(0), target - target.mean(0)
    u, sizes, vt = np.linalg.svd(a.T @ b)
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    return (sizes * sign).sum() / (a**2).sum() * a @ (u * sign) @ vt + target.mean(0)


def errors_of(results: str) -> dict[str, dict[str, float]]:
    """Of every system, what a table says, jitter apart."""
    systems = json.loads(Path(f"{results}/results.json").read_text())["systems"]
    return {s["name"]: {n: e["value"] for n, e in s["errors"].items() if "jitter" not in n} for s in systems}


def test_what_is_predicted_gets_the_error_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the raw files of 3DPW and EMDB to the baselines' tables: protocol, joints, root, bodies and frames."""
    regressor = write_regressor(tmp_path)
    neutral, male, female = write_bodies(tmp_path)
    male_take, female_take = (foreign.take(body, 12, seed=s, size=SIZE) for body, s in ((male, 1), (female, 2)))
    valid = np.ones((2, 12), bool)
    valid[0, 5] = valid[1, :3] = False
    write_human_fov(tmp_path / "raw/cam_model.ckpt")
    foreign.write_threedpw(tmp_path / "raw/3DPW", [male_take, female_take], ["m", "f"], valid.astype(int))
    for made, gender, good in ((male_take, "male", valid[0]), (female_take, "female", valid[1])):
        foreign.write_emdb(tmp_path / "raw/EMDB", made, gender, gender=gender, good_frames_mask=good)
    foreign.write_emdb(tmp_path / "raw/EMDB", male_take, "not_in_emdb1", gender="male", emdb1=False)
    said = {"hmr2": (male_take.pose_in_camera[4], male_take.betas), "camerahmr": (np.full((24, 3), 0.1), np.ones(10))}
    for model, (pose, betas) in said.items():
        write_constant(model, tmp_path / f"raw/{model}.ckpt", pose, betas)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    filmed = {}
    monkeypatch.setattr(
        fasthmr.evaluation.writing, "write_side_by_side", lambda path, *shown: filmed.update({path: shown})
    )
    for command in commands():
        if re.match(r"python -m fasthmr\.(export raw|shard \w+ (threedpw|emdb|data/3dpw|data/emdb))", command):
            run(command)
        elif command.startswith("python -m fasthmr.evaluate HMR2"):
            run(f"{command} --video 0")
    for clip, systems, *bodies in filmed.values():
        assert [body.id for body in bodies] == [neutral.id, {"male": male, "female": female}[clip.gender].id]
        assert {name: motion.full_image for name, motion in systems.items()} == {"HMR2.0": False, "CameraHMR": True}
    assert len(filmed) == 2
    takes = [(male_take, valid[0]), (female_take, valid[1])]
    of_h36m = regressor[[6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10]]
    truths = {
        "3dpw": [(of_h36m @ made.vertices[good], made.vertices[good]) for made, good in takes],
        "emdb": [(made.joints[good, :24], made.vertices[good]) for made, good in takes],
    }
    for data, root in (("3dpw", [2, 3]), ("emdb", [1, 2])):
        config = f"python -m fasthmr.evaluate -c conf/evaluate_{data}.yaml --speed false"
        run(f"{config} --systems.baseline.encoder hmr2.safetensors --run_dir results/config_{data}")
        found = errors_of(f"results/baselines_{data}") | errors_of(f"results/config_{data}")
        for name, model in (("HMR2.0", "hmr2"), ("baseline", "hmr2"), ("CameraHMR", "camerahmr")):
            joints, mesh = posed(neutral, *said[model])
            want = expected(truths[data], (of_h36m @ mesh if data == "3dpw" else joints, mesh), root)
            assert found[name] == pytest.approx(want, abs=0.02), (data, name)
        results = json.loads(Path(f"results/config_{data}/results.json").read_text())
        assert (results["data"]["sequences"], results["data"]["frames"], results["data"]["labelled"]) == (2, 24, 20)
        assert {gender: one["clips"] for gender, one in results["truth"].items()} == {"male": 1, "female": 1}
        assert results["truth"]["male"]["body"] == male.id and results["body"] == neutral.id
        assert (results["regressor"] is None) == (data == "emdb")


def posed(body: BodyModel, pose: np.ndarray, betas: np.ndarray) -> Points:
    """A body's 24 joints and vertices."""
    rotations = axis_angle_to_matrix(torch.from_numpy(pose)).float()[None]
    mesh = body(rotations, torch.from_numpy(betas).float()[None])
    return mesh.joints[0].double().numpy(), mesh.vertices[0].double().numpy()


def rows(name: str, protocol: str) -> list[str]:
    """The systems of a table of `protocol`, of which all errors are known."""
    results = json.loads(Path(f"results/{name}/results.json").read_text())
    assert protocol in Path(f"results/{name}/table.md").read_text().splitlines()[0]
    for system in results["systems"]:
        assert all(np.isfinite(error["value"]) for error in system["errors"].values())
    return [system["name"] for system in results["systems"]]
