"""Body files: ours, SMPL's pickles with and without chumpy, hostile and broken ones."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from fasthmr.body import BodyFileError, load_body
from fasthmr.body.files import FREE_BODY, SMPL_LEAF_VERTICES, read_body_file
from fasthmr.conventions import PARENTS24

V = 6890


@pytest.fixture(scope="module")
def smpl_like() -> dict[str, object]:
    """Random numbers in the layout of SMPL's own files: 6,890 vertices, 12 shapes, float64, unsigned tree."""
    rng = np.random.default_rng(0)
    parents = np.array([2**32 - 1, *PARENTS24[1:]], np.uint32)
    regressor = scipy.sparse.random(24, V, density=0.01, format="csc", rng=rng)
    return {
        "v_template": rng.normal(size=(V, 3)),
        "shapedirs": rng.normal(size=(V, 3, 12)),
        "posedirs": 0.01 * rng.normal(size=(V, 3, 207)),
        "J_regressor": regressor,
        "weights": rng.dirichlet(np.ones(24), V),
        "f": rng.integers(0, V, (13776, 3)).astype(np.uint32),
        "kintree_table": np.stack([parents, np.arange(24, dtype=np.uint32)]),
        "bs_type": "lrotmin",
    }


@pytest.fixture
def chumpy():
    """A module that pickles its objects like chumpy did; gone again when the file is read."""
    names = ("chumpy", "chumpy.ch", "chumpy.reordering")
    modules = {name: types.ModuleType(name) for name in names}
    base = type("Ch", (), {"__module__": "chumpy.ch", "__init__": lambda self, **state: vars(self).update(state)})
    select = type("Select", (base,), {"__module__": "chumpy.reordering"})
    modules["chumpy.ch"].Ch, modules["chumpy.reordering"].Select = base, select
    sys.modules.update(modules)
    yield types.SimpleNamespace(Ch=base, Select=select, forget=lambda: [sys.modules.pop(name, None) for name in names])
    for name in names:
        sys.modules.pop(name, None)


def write_pickle(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=2))  # as Python 2 wrote SMPL's
    return path


def assert_is(arrays, expected: dict) -> None:
    assert np.allclose(arrays.template, expected["v_template"], atol=1e-6)
    assert np.allclose(arrays.shape_dirs, expected["shapedirs"][..., :10], atol=1e-6)  # further shapes are cut
    assert np.allclose(arrays.pose_dirs, expected["posedirs"], atol=1e-6)
    assert np.allclose(arrays.joint_regressor, expected["J_regressor"].toarray(), atol=1e-6)
    assert np.array_equal(arrays.faces, expected["f"])
    assert tuple(arrays.leaf_vertices) == SMPL_LEAF_VERTICES == (411, 2445, 5905, 3216, 6617)


def test_reads_an_official_style_pickle_without_chumpy(smpl_like, chumpy, tmp_path):
    full = np.asarray(smpl_like["shapedirs"])
    first_ten = np.arange(full.size).reshape(full.shape)[..., :10]
    content = smpl_like | {
        "v_template": chumpy.Ch(x=smpl_like["v_template"], _dirty_vars=set(), dterms=["x"]),
        "posedirs": chumpy.Ch(x=chumpy.Ch(x=smpl_like["posedirs"])),
        "shapedirs": chumpy.Select(a=chumpy.Ch(x=full), idxs=first_ten.ravel(), preferred_shape=(V, 3, 10)),
        "vert_sym_idxs": np.arange(V)[::-1],
    }
    path = write_pickle(tmp_path / "SMPL_NEUTRAL.pkl", content)
    chumpy.forget()

    arrays = read_body_file(path)
    assert_is(arrays, smpl_like)
    assert arrays.mirror_index[0] == V - 1
    body = load_body(path)
    assert body.id.startswith("SMPL_NEUTRAL@")


def test_reads_a_plain_pickle_and_poses_it_with_pose_dependent_shapes(smpl_like, tmp_path):
    path = write_pickle(tmp_path / "SMPL_MALE.pkl", smpl_like)
    assert_is(read_body_file(path), smpl_like)
    body = load_body(path)
    assert body.mirror_index is None
    # turning one joint adds posedirs . (R - 1) before skinning
    without = write_pickle(tmp_path / "plain.pkl", {k: v for k, v in smpl_like.items() if k != "posedirs"})
    rotations, betas = torch.eye(3).repeat(1, 24, 1, 1), torch.zeros(1, 10)
    plain = load_body(without)
    assert torch.allclose(body(rotations, betas).vertices, plain(rotations, betas).vertices, atol=1e-5)
    rotations[0, 23] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    feature = np.zeros(207)
    feature[22 * 9 :] = (rotations[0, 23] - torch.eye(3)).numpy().ravel()
    offset = torch.from_numpy(np.asarray(smpl_like["posedirs"]) @ feature).float()
    still = body.lbs_weights[:, :23].sum(1)  # what does not follow joint 23 keeps its direction
    turned = still[:, None] * offset + body.lbs_weights[:, 23:] * (offset @ rotations[0, 23].T)
    got = body(rotations, betas).vertices - plain(rotations, betas).vertices
    assert torch.allclose(got[0], turned, atol=1e-5)


def test_reads_an_npz_with_a_sparse_matrix_inside(smpl_like, tmp_path):
    content = {k: v for k, v in smpl_like.items() if k != "bs_type"}
    content["J_regressor"] = np.array(smpl_like["J_regressor"], dtype=object)
    np.savez(tmp_path / "SMPL_FEMALE.npz", **content, part2num=np.array({"not": "read"}, dtype=object))
    assert_is(read_body_file(tmp_path / "SMPL_FEMALE.npz"), smpl_like)


# ---- hostile files ---------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled by pickle.load, it would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", [".pkl", ".npz"])
def test_a_hostile_file_is_refused_and_not_executed(smpl_like, tmp_path, suffix):
    marker, path = tmp_path / "executed", tmp_path / f"evil{suffix}"
    if suffix == ".pkl":
        write_pickle(path, {**smpl_like, "bs_style": Payload(marker)})
    else:
        np.savez(path, J_regressor=np.array(Payload(marker), dtype=object))
    with pytest.raises(BodyFileError, match=r"system.*not on the list") as error:
        read_body_file(path)
    assert str(path) in str(error.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload does work
    assert marker.exists()


@pytest.mark.parametrize("name", ["builtins\neval", "builtins\ngetattr", "numpy\nload", "scipy.sparse\nload_npz"])
def test_only_listed_names_are_found(tmp_path, name):
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(BodyFileError, match="not on the list"):
        read_body_file(path)


# ---- missing and broken files ----------------------------------------------------------------------------------------


def test_a_missing_file_says_where_to_get_one_and_where_to_put_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_body(tmp_path / "SMPL_NEUTRAL.pkl")
    for part in (str(tmp_path), "smpl.is.tue.mpg.de", "free", "data/body_models/smpl/SMPL_NEUTRAL.pkl"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["cut.npz", "cut.pkl", "text.pkl", "text.npz", "empty.pkl", "list.pkl", "body.obj"])
def test_a_file_that_is_no_body_is_named(tmp_path, smpl_like, name):
    content = {
        "cut.npz": FREE_BODY.read_bytes()[:100_000],
        "cut.pkl": pickle.dumps(smpl_like)[:100_000],
        "text.pkl": b"version https://git-lfs.github.com/spec/v1\n",
        "text.npz": b"version https://git-lfs.github.com/spec/v1\n",
        "empty.pkl": b"",
        "list.pkl": pickle.dumps([1, 2]),
        "body.obj": b"v 0 0 0",
    }
    (tmp_path / name).write_bytes(content[name])
    with pytest.raises(BodyFileError, match=name):
        load_body(tmp_path / name)


def nan_in(array: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1)) == 0, np.nan, array)


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        ("weights", lambda a: a[:, :23], r"weights must have shape \(6600, 24\), got \(6600, 23\)"),
        ("v_template", lambda a: a[:10], r"shapedirs must have shape \(10, 3, any\), got \(6600, 3, 10\)"),
        ("v_template", nan_in, "v_template holds NaN"),
        ("v_template", lambda a: a.astype(str), "v_template must hold numbers, got <U"),
        ("shapedirs", lambda a: a[..., :8], "at least 10 shapes, got 8"),
        ("f", lambda a: a + 6000, r"f must lie in \[0, 6600\)"),
        ("f", lambda a: a.astype(float), "f must hold integers, got float64"),
        ("f", lambda a: a[:0], "f must have shape"),
        ("J_reg_cols", lambda a: a[:5], "J_reg_cols must have shape"),
        ("J_reg_rows", lambda a: a + 20, r"J_reg_rows must lie in \[0, 24\)"),
        ("kintree_table", lambda a: a[:, ::-1], "kintree_table is not SMPL's"),
        ("leaf_vertices", None, "must name in `leaf_vertices` the five at head_top"),
        ("leaf_vertices", lambda a: a[:4], r"leaf_vertices must have shape \(5\), got \(4,\)"),
        ("weights", None, "has no 'weights', only"),
    ],
)
def test_a_wrong_array_is_named(tmp_path, member, change, message):
    arrays = dict(np.load(FREE_BODY))
    array = arrays.pop(member)
    if change is not None:
        arrays[member] = change(array)
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    with pytest.raises(BodyFileError, match=message) as error:
        read_body_file(path)
    assert str(path) in str(error.value)


def test_importing_the_body_is_silent():
    import subprocess

    command = [sys.executable, "-W", "error::UserWarning", "-c", "import fasthmr.body; fasthmr.body.load_body()"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
