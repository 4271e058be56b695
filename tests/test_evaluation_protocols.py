"""The benchmarks' protocols on a miniature 3DPW: truth by gendered bodies, the user's regressors, detected boxes."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_sets as foreign
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_decoder import make_encoder

import fasthmr.evaluation.measuring as measuring
from datamodules.encoding import EncodedFrames
from fasthmr.body import load_body
from fasthmr.body.files import FREE_BODY
from fasthmr.checkpoint import human_fov_header
from fasthmr.data.batch import ClipBatch
from fasthmr.data.crops import normalised
from fasthmr.data.letterbox import letterboxed
from fasthmr.data.shards import ClipStore
from fasthmr.evaluate import main
from fasthmr.metrics.protocols import H36M_TO_14
from fasthmr.models.human_fov import HumanFoV
from fasthmr.safetensors_io import write_safetensors
from fasthmr.shard import main as shard

EVALUATE_MD = (Path(__file__).parents[1] / "docs/evaluate.md").read_text()
QUICK = ["--precision=32", "--speed=false", "--workers=0", "--bootstrap=10"]
#: the shape of the neutral body that is the rest shape of each gendered one
SHAPES = {"neutral": [0.0] * 10, "male": [1.5, 1, -1, 0.5, 0, 0, 0, 0, 0, 0], "female": [-1.0, 1.5, 1] + [0.0] * 7}
#: the clips
MAN, WOMAN = "3dpw-downtown_test_00_0", "3dpw-downtown_test_00_1"
FRAMES = 6
#: a frame of the second clip whose label does not count
INVALID = 2


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bodies and the regressor as SPIN has them, a man and a woman of a converted 3DPW, and an encoder."""
    folder = tmp_path_factory.mktemp("lab")
    models = folder / "models/smpl"
    models.mkdir(parents=True)
    with np.load(FREE_BODY) as file:
        members = dict(file)
    for gender, shape in SHAPES.items():
        template = members["v_template"] + members["shapedirs"][..., :10].astype(np.float64) @ np.array(shape)
        np.savez(models / f"SMPL_{gender.upper()}.npz", **{**members, "v_template": template.astype(np.float32)})
    weights = np.random.default_rng(0).random((17, len(members["v_template"]))) ** 40
    np.save(folder / "models/J_regressor_h36m.npy", weights / weights.sum(1, keepdims=True))
    valid = np.ones((2, FRAMES))
    valid[1, INVALID] = 0
    foreign.write_threedpw(folder, people(folder), ["m", "f"], valid)
    given = [f"--body_{gender}={models}/SMPL_{gender.upper()}.npz" for gender in ("male", "female")]
    assert shard(["convert", "threedpw", f"--root={folder}", f"--out={folder}/set", "--workers=1", *given]) == 0
    make_encoder(folder / "encoder.ckpt")
    return folder


def people(lab: Path) -> list[foreign.Take]:
    man, woman = (
        foreign.take(load_body(lab / f"models/smpl/SMPL_{gender}.npz"), frames=FRAMES, seed=seed)
        for seed, gender in enumerate(("MALE", "FEMALE"))
    )
    woman.trans[:] += [0.9, 0, 0]
    return [man, woman]


class Oracle:
    """In place of an encoder: knows the labels, and the neutral body's shape of each gendered body, but for `unknown`
    ones; in frames that do not count it knows nothing."""

    def __init__(self, unknown: bool = False) -> None:
        self.unknown = unknown
        self.boxes: list[np.ndarray] = []
        self.focal_px: list[float] = []

    def __call__(self, chunks: list[ClipBatch], device: torch.device) -> EncodedFrames:
        (chunk,) = chunks
        self.boxes.append(torch.cat([chunk.box_center[0], chunk.box_size[0, :, None]], 1).numpy())
        self.focal_px.append(float(chunk.intrinsics[0, 0, 0]))
        shape = torch.zeros(10) if self.unknown else torch.tensor(SHAPES[chunk.genders[0]])
        betas = (chunk.betas + shape).expand(chunk.frames_per_clip, -1).clone()
        betas[~chunk.valid[0]] = 50.0
        frames = len(betas)
        return EncodedFrames(torch.zeros(frames, 32), chunk.rotations[0], betas, torch.ones(frames, 3))


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    made = Oracle()
    monkeypatch.setattr(measuring, "FrameEncoder", lambda *_: made)
    return made


def arguments(lab: Path, out: Path, *more: str, genders: tuple[str, ...] = ("male", "female")) -> list[str]:
    models = lab / "models/smpl"
    bodies = [f"--body_{gender}={models}/SMPL_{gender.upper()}.npz" for gender in genders]
    own = [f"{lab}/encoder.ckpt", f"--data={lab}/set", f"--out={out}", f"--body={models}/SMPL_NEUTRAL.npz"]
    return [*own, *bodies, *QUICK, *more]


def evaluated(lab: Path, out: Path, *more: str) -> dict[str, Any]:
    """What is in results.json after the command."""
    assert main(arguments(lab, out, *more)) == 0
    return json.loads((out / "results.json").read_text())


def values(results: dict[str, Any]) -> dict[str, float]:
    return {name: estimate["value"] for name, estimate in results["systems"][0]["errors"].items()}


# ---- gendered truth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["3dpw-14", "emdb-24"])
def test_who_knows_the_gendered_mesh_makes_no_error(lab, tmp_path, oracle, protocol):
    errors = values(evaluated(lab, tmp_path, f"--protocol={protocol}"))
    for name in ("pa_mpjpe_mm", "mpjpe_mm", "pve_mm"):
        assert errors[name] < 0.01, name
    assert errors["accel_m_s2"] < 0.05


def test_the_shape_of_a_gendered_body_is_wrong_for_the_neutral_one(lab, tmp_path, oracle):
    oracle.unknown = True
    errors = values(evaluated(lab, tmp_path, "--protocol=3dpw-14"))

    regressor = np.load(lab / "models/J_regressor_h36m.npy")
    neutral = load_body(lab / "models/smpl/SMPL_NEUTRAL.npz")
    per_joint, per_vertex = [], []
    for made in people(lab):
        guess = replace(made, body=neutral)
        for frame in range(len(made)):
            if made.body.name == "SMPL_FEMALE" and frame == INVALID:
                continue
            meshes = [taken.vertices[frame] for taken in (guess, made)]
            joints = [regressor @ mesh for mesh in meshes]
            roots = [(own[1] + own[4]) / 2 for own in joints]  # the hips
            one, other = (own[list(H36M_TO_14)] - root for own, root in zip(joints, roots, strict=True))
            per_joint.append(1000 * np.linalg.norm(one - other, axis=1).mean())
            one, other = (mesh - root for mesh, root in zip(meshes, roots, strict=True))
            per_vertex.append(1000 * np.linalg.norm(one - other, axis=1).mean())
    assert len(per_joint) == 2 * FRAMES - 1
    assert errors["mpjpe_mm"] == pytest.approx(np.mean(per_joint), abs=0.01)
    assert errors["pve_mm"] == pytest.approx(np.mean(per_vertex), abs=0.01)
    assert errors["pve_mm"] > 10  # the truth of the neutral body would show


def test_protocols_bodies_boxes_and_regressor_stand_on_top_of_the_table(lab, tmp_path, oracle):
    results = evaluated(lab, tmp_path, "--protocol=3dpw-14")
    man, woman = (made.body.id for made in people(lab))
    top = (tmp_path / "table.md").read_text().split("\n\n")[0]
    assert f"ground truth {man} (1 clip), {woman} (1 clip)." in top and "predictions SMPL_NEUTRAL@" in top
    assert "Boxes: ground truth, as stored with the clips. Flip test: none." in top
    assert "Training sets: not recorded in the checkpoints, so 3DPW's training split may be among them" in top
    assert "predicted shape: averaged over each clip's labelled frames" in top
    assert f"Regressor: {lab}/models/J_regressor_h36m.npy." in top
    assert results["truth"]["female"] == {"body": woman, "clips": 1}


def test_what_was_trained_on_can_be_said(lab, tmp_path, oracle):
    evaluated(lab, tmp_path, "--protocol=emdb-24", "--trained_on=BEDLAM and 3DPW's training split")
    assert "\nTraining sets: BEDLAM and 3DPW's training split.\n" in (tmp_path / "table.md").read_text()


def test_the_regressor_of_hmr2_is_a_pickle(lab, tmp_path, oracle):
    weights = np.load(lab / "models/J_regressor_h36m.npy")
    (lab / "models/smpl/SMPL_to_J19.pkl").write_bytes(pickle.dumps(np.concatenate([weights, weights[:2]])))
    results = evaluated(lab, tmp_path, "--protocol=3dpw-14-hmr2", "--max_clips=1", "--video=0")
    assert results["regressor"] == f"{lab}/models/smpl/SMPL_to_J19.pkl"
    assert values(results)["mpjpe_mm"] < 0.01 and "accel_m_s2" not in values(results)
    assert (tmp_path / "side_by_side.mp4").stat().st_size > 1000


def test_a_body_that_is_not_given_or_another_one(lab, tmp_path, capsys):
    man, _ = people(lab)
    assert main(arguments(lab, tmp_path / "out", genders=("female",))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"clip {MAN} has labels of the male body {man.body.id}: give that body with" in line
    assert "--body_male FILE (SMPL_MALE.pkl" in line
    woman = f"--body_male={lab}/models/smpl/SMPL_FEMALE.npz"
    assert main(arguments(lab, tmp_path / "out", woman)) == 2
    assert f"with labels of --body_male, belongs to body '{man.body.id}', but" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_meshes_of_other_vertices_are_not_compared(lab, tmp_path, capsys):
    with np.load(FREE_BODY) as file:
        members = dict(file)
    vertices = len(members["v_template"])
    more = {name: np.concatenate([members[name], members[name][:1]]) for name in ("v_template", "shapedirs", "weights")}
    del members["mirror_index"]
    np.savez(tmp_path / "more.npz", **{**members, **more})
    assert main(arguments(lab, tmp_path / "out", f"--body_male={tmp_path}/more.npz")) == 2
    assert f"body_male has {vertices + 1} vertices and body has {vertices}" in capsys.readouterr().err


# ---- boxes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(lab: Path) -> dict[str, np.ndarray]:
    """The clips' own boxes as corners (T, 4), by key."""
    boxes = {}
    for clip in ClipStore(lab / "set"):
        half = clip.box_size[:, None] / 2
        boxes[clip.key] = np.concatenate([clip.box_center - half, clip.box_center + half], 1).astype(np.float64)
    return boxes


def test_detected_boxes_are_where_the_network_looks(lab, tmp_path, oracle, stored):
    evaluated(lab, tmp_path / "truth", "--protocol=3dpw-14")
    true_boxes, oracle.boxes = oracle.boxes, []
    man, woman = stored.values()
    size = man[:, 2] - man[:, 0]
    man += np.stack([0.1 * size, -0.1 * size, 0.1 * size, -0.1 * size], 1)  # the network's crop still lies inside
    woman[1] = np.nan  # between its neighbours
    woman[3] += [-40, -40, 40, 40]  # larger than what is stored
    np.savez(tmp_path / "boxes.npz", **stored)
    results = evaluated(lab, tmp_path / "out", "--protocol=3dpw-14", f"--boxes={tmp_path}/boxes.npz")

    seen_man, seen_woman = oracle.boxes
    true_man, true_woman = true_boxes
    shift = np.stack([0.1 * size, -0.1 * size, 0 * size], 1)
    np.testing.assert_allclose(seen_man, true_man + shift, atol=0.01)
    np.testing.assert_allclose(seen_woman[[0, 2]], true_woman[[0, 2]], atol=0.01)
    np.testing.assert_allclose(seen_woman[1], (true_woman[0] + true_woman[2]) / 2, atol=2)
    assert seen_woman[3, 2] == pytest.approx(1.25 * true_woman[3, 2], rel=1e-4)  # all of the stored crop
    boxes = {key: results["boxes"][key] for key in ("source", "missing", "fitted")}
    assert boxes == {"source": f"{tmp_path}/boxes.npz", "missing": 1, "fitted": 1}
    table = (tmp_path / "out/table.md").read_text()
    assert f"Boxes: detections of {tmp_path}/boxes.npz (sha256 {results['boxes']['sha256'][:16]}); 1 frame" in table


def test_a_box_at_the_edge_is_moved_into_the_stored_crop(lab, tmp_path, oracle, stored):
    man, _ = stored.values()
    size = (man[0, 2] - man[0, 0]).copy()
    man[0] += 0.5 * size * np.array([1, 0, 1, 0])
    np.savez(tmp_path / "boxes.npz", **stored)
    results = evaluated(lab, tmp_path / "out", f"--boxes={tmp_path}/boxes.npz", "--max_clips=1", "--protocol=emdb-24")
    clip = ClipStore(lab / "set")[0]
    # the stored crop is 1.5 boxes wide and the network's 1.2, so it can move by 0.15
    assert oracle.boxes[0][0, 0] == pytest.approx(clip.box_center[0, 0] + 0.15 * size, abs=0.05)
    assert results["boxes"]["fitted"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda boxes: boxes.pop(WOMAN), f"has none of clip {WOMAN}"),
        (lambda boxes: boxes.update({MAN: np.zeros((3, 4))}), f"{MAN} must have shape (6, 4), got (3, 4)"),
        (lambda boxes: boxes[MAN].fill(np.nan), f"nobody was found in clip {MAN}"),
        (lambda boxes: boxes[MAN][1].fill(7), f"clip {MAN}, frame 1, must have x0 < x1 and y0 < y1, got [7.0,"),
        (lambda boxes: np.add(boxes[MAN], 900, boxes[MAN]), f"clip {MAN}, frame 0, "),
    ],
)
def test_boxes_that_cannot_be(lab, tmp_path, capsys, stored, change, message):
    change(stored)
    np.savez(tmp_path / "boxes.npz", **stored)
    assert main(arguments(lab, tmp_path / "out", f"--boxes={tmp_path}/boxes.npz")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "boxes.npz" in line


def test_a_file_that_holds_no_boxes(lab, tmp_path, capsys):
    np.save(tmp_path / "boxes.npy", np.zeros((4, 4)))
    (tmp_path / "boxes.npz").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive, archive.open(f"{MAN}.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 4)})
    for name in ("boxes.npy", "boxes.npz", "bomb.npz"):
        assert main(arguments(lab, tmp_path / "out", f"--boxes={tmp_path}/{name}")) == 2
        assert f"{name} is no .npz file of boxes" in capsys.readouterr().err


# ---- intrinsics ------------------------------------------------------------------------------------------------------


def test_camerahmr_is_told_the_focal_length_of_the_set_of_the_diagonal_or_of_a_file(lab, tmp_path, oracle):
    focal = {MAN: 400.0, WOMAN: 500.0}
    np.savez(tmp_path / "focal.npz", **focal)
    clips = {clip.key: clip for clip in ClipStore(lab / "set")}
    diagonal = float(np.hypot(*clips[MAN].image_size))
    told = {
        "truth": ([float(clips[key].intrinsics[0, 0]) for key in focal], "ground truth, as stored with the clips."),
        "diagonal": ([diagonal, diagonal], "the images' diagonals."),
        f"{tmp_path}/focal.npz": ([400.0, 500.0], f"of {tmp_path}/focal.npz (sha256 "),
    }
    for source, (lengths, words) in told.items():
        oracle.focal_px.clear()
        results = evaluated(lab, tmp_path / "out", "--protocol=emdb-24", f"--intrinsics={source}")
        assert oracle.focal_px == pytest.approx(lengths), source
        assert results["intrinsics"]["source"] == source
        assert f"Focal lengths, which CameraHMR is told: {words}" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({MAN: 400.0}, f"has no focal length of clip {WOMAN}"),
        ({MAN: 400.0, WOMAN: 0.0}, f"{WOMAN} must be one positive number, px, got 0.0"),
        ({MAN: np.nan, WOMAN: 400.0}, f"{MAN} must be one positive number, px, got nan"),
        ({MAN: np.ones(3), WOMAN: 400.0}, f"{MAN} must be one positive number, px, got [1.0, 1.0, 1.0]"),
    ],
)
def test_focal_lengths_that_cannot_be(lab, tmp_path, capsys, lengths, message):
    np.savez(tmp_path / "focal.npz", **lengths)
    assert main(arguments(lab, tmp_path / "out", f"--intrinsics={tmp_path}/focal.npz")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


THREEDPW = 'SETS["threedpw"](Path("raw/3DPW"), "test")'


def run_the_lines_of_the_docs(monkeypatch: pytest.MonkeyPatch, raw: str = THREEDPW) -> list[torch.Tensor]:
    """docs/evaluate.md's lines that ask HumanFoV, of another set too; returns what it was shown."""
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", EVALUATE_MD, flags=re.S) if "load_human" in block)
    assert THREEDPW in lines
    torch.manual_seed(0)
    fov = HumanFoV(width=4).eval()  # its random weights make little of a field of view of 1 radian
    with torch.no_grad():
        fov.fc3.weight.mul_(0.01)
        fov.fc3.bias.fill_(1.0)
    write_safetensors(Path("human_fov.safetensors"), human_fov_header(fov), fov.state_dict())
    seen = []
    monkeypatch.setattr(HumanFoV, "forward", lambda self, x, real=HumanFoV.forward: seen.append(x) or real(self, x))
    exec(lines.replace(THREEDPW, raw), {})
    return seen


def test_humanfov_gives_such_a_file(lab, tmp_path, oracle, monkeypatch):
    """docs/evaluate.md's own lines, on phone pictures: the file says to turn them, which a converter does not do."""
    made = foreign.take(load_body(lab / "models/smpl/SMPL_MALE.npz"), frames=20, size=(64, 48))
    foreign.write_threedpw(tmp_path / "raw/3DPW", [made], ["m"], np.ones((1, 20)))
    for picture in (tmp_path / "raw/3DPW/imageFiles").rglob("*.jpg"):
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.open(picture).save(picture, exif=turned)
    monkeypatch.chdir(tmp_path)
    seen = run_the_lines_of_the_docs(monkeypatch)
    assert len(seen) == 16
    with np.load("focal.npz") as file:
        focal_px = file[MAN]
    assert float(focal_px) == pytest.approx(48 / (2 * np.tan(0.5)), rel=0.05)
    evaluated(lab, tmp_path / "out", "--protocol=emdb-24", "--intrinsics=focal.npz", "--max_clips=1")
    assert oracle.focal_px == pytest.approx([float(focal_px)])


def test_humanfov_sees_pictures_that_lie_on_their_side_upright(tmp_path, monkeypatch, free_body):
    """As the converter turns those of BEDLAM's closeups; 3DPW and EMDB have none."""
    made = foreign.take(free_body, frames=2, size=(48, 64))
    foreign.write_bedlam(tmp_path / "raw/BEDLAM", "scene_closeup", made)
    monkeypatch.chdir(tmp_path)
    seen = run_the_lines_of_the_docs(monkeypatch, 'SETS["bedlam"](Path("raw/BEDLAM"), "all")')
    for shown, image in ((seen[0], made.images[0]), (seen[-1], made.images[1])):
        assert torch.equal(shown[0], normalised(torch.from_numpy(letterboxed(image)).permute(2, 0, 1)[None])[0])
    with np.load("focal.npz") as file:
        (focal_px,) = file.values()
    assert float(focal_px) == pytest.approx(64 / (2 * np.tan(0.5)), rel=0.05)
