"""The body model: shapes, poses, mirror symmetry, agreement with smplx, and what keeps bodies apart."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch

from fasthmr.body import BodyMismatchError, load_body, require_same_body
from fasthmr.body.files import FREE_BODY, read_body_file
from fasthmr.conventions import JOINT_INDEX, LEAVES, PARENTS24, PARENTS29, SWAP24, SWAP29

PELVIS, LEFT_SHOULDER = JOINT_INDEX["pelvis"], JOINT_INDEX["left_shoulder"]
FLIP_X = torch.tensor([-1.0, 1.0, 1.0])


def standing(batch: int = 1) -> torch.Tensor:
    return torch.eye(3).expand(batch, 24, 3, 3).clone()


def about(axis: str, degrees: float) -> torch.Tensor:
    """The rotation about one of the axes x, y, z."""
    vector = torch.zeros(3)
    vector["xyz".index(axis)] = np.radians(degrees)
    x, y, z = vector.tolist()
    return torch.linalg.matrix_exp(torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]]))


def random_rotations(batch: int, seed: int = 0, size: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = size * torch.randn(batch, 24, 3, 3, generator=generator)
    return torch.linalg.matrix_exp(numbers - numbers.mT)


def random_betas(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 10, generator=torch.Generator().manual_seed(seed))


# ---- the free body ---------------------------------------------------------------------------------------------------


def test_free_body_is_small_and_cannot_be_taken_for_smpl(free_body):
    assert FREE_BODY.stat().st_size < 1_000_000
    # smplx's table of SMPL vertices goes up to 6,787: it must fail on this body, not pick wrong points
    assert 6000 < free_body.num_vertices < 6788
    # this id is written into shards and checkpoints: changing the body makes them useless, so do it knowingly
    assert free_body.id == "free@59e15d9e96311350"


def test_rest_pose_is_a_t_pose_facing_forward(free_body):
    out = free_body(standing(), torch.zeros(1, 10))
    joint = {name: out.joints29[0, i] for name, i in JOINT_INDEX.items()}
    x, y, _ = out.vertices[0].T

    assert torch.allclose(out.vertices, free_body.rest_vertices(torch.zeros(1, 10)), atol=1e-6)
    assert 1.65 < y.max() - y.min() < 1.75  # metres, y up: the mean adult's height
    assert joint["head_top"][1] > joint["head"][1] > joint["neck"][1] > joint["pelvis"][1] > joint["left_knee"][1]
    assert y.max() - joint["head_top"][1] < 0.005
    assert joint["left_hip"][0] > 0.05  # left is +x
    assert joint["left_big_toe"][2] > joint["left_ankle"][2] + 0.1  # facing +z
    arm = torch.stack([joint[f"left_{part}"] for part in ("shoulder", "elbow", "wrist", "hand")])
    assert (arm[:, 1:] - arm[0, 1:]).abs().max() < 0.01  # the arm is straight along x
    assert (x.max() - joint["left_middle_tip"][0]) < 0.001


def test_faces_look_outward_and_the_surface_is_closed(free_body):
    a, b, c = free_body.rest_vertices(torch.zeros(1, 10))[0][free_body.faces].double().unbind(1)
    volume = (a * torch.cross(b, c, dim=-1)).sum() / 6  # signed: negative if the faces looked inward
    assert 0.05 < volume < 0.1  # cubic metres
    edges = np.sort(free_body.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2).numpy(), axis=1)
    _, count = np.unique(edges, axis=0, return_counts=True)
    assert (count == 2).all()


def test_skinning_weights_are_shares(free_body):
    assert (free_body.lbs_weights >= 0).all()
    assert torch.allclose(free_body.lbs_weights.sum(1), torch.ones(free_body.num_vertices), atol=1e-5)
    assert set(free_body.lbs_weights.argmax(1).tolist()) == set(range(24))  # every joint moves something


def test_betas_are_standard_deviations_of_people(free_body):
    vertices = free_body.rest_vertices(random_betas(300))
    height = vertices[..., 1].amax(1) - vertices[..., 1].amin(1)
    assert abs(height.mean() - 1.69) < 0.03
    assert 0.08 < height.std() < 0.12


# ---- posing ----------------------------------------------------------------------------------------------------------


def test_turning_the_left_shoulder_raises_the_left_hand_only(free_body):
    rotations = standing()
    rotations[0, LEFT_SHOULDER] = about("z", 90)  # the arm points to +x: it goes up
    joints = free_body(rotations, torch.zeros(1, 10)).joints29[0]
    rest = free_body.rest_joints(torch.zeros(1, 10))[0]

    arm_length = (rest[JOINT_INDEX["left_wrist"]] - rest[LEFT_SHOULDER]).norm()
    expected = rest[LEFT_SHOULDER] + torch.tensor([0.0, arm_length, 0.0])
    assert torch.allclose(joints[JOINT_INDEX["left_wrist"]], expected, atol=0.01)
    moved = (joints - rest).norm(dim=-1) > 1e-6
    names = {name for name, i in JOINT_INDEX.items() if moved[i]}
    assert names == {"left_elbow", "left_wrist", "left_hand", "left_middle_tip"}


def test_root_rotation_turns_everything_about_the_pelvis(free_body):
    betas = random_betas(1)
    rotations = random_rotations(1)
    rotations[0, 0] = torch.eye(3)
    before = free_body(rotations, betas).vertices
    rotations[0, 0] = about("y", 70)
    after = free_body(rotations, betas)

    pelvis = free_body.rest_joints(betas)[:, PELVIS]
    assert torch.allclose(after.joints[:, PELVIS], pelvis, atol=1e-6)
    assert torch.allclose(after.vertices, (before - pelvis) @ about("y", 70).T + pelvis, atol=1e-5)


def test_translation_moves_everything(free_body):
    rotations, betas, translation = random_rotations(2), random_betas(2), torch.tensor([[1.0, 2.0, 3.0], [0, 0, -1]])
    here, there = free_body(rotations, betas), free_body(rotations, betas, translation)
    for part in ("vertices", "joints", "joints29"):
        assert torch.allclose(getattr(here, part) + translation[:, None], getattr(there, part), atol=1e-5)
    assert torch.allclose(there.joints[:, 0], free_body.rest_joints(betas)[:, 0] + translation, atol=1e-5)


def test_mirrored_pose_gives_the_mirrored_body(free_body):
    rotations, betas = random_rotations(3, size=0.3), random_betas(3)
    mirrored = rotations[:, SWAP24] * FLIP_X[:, None] * FLIP_X  # M R M with M = diag(-1, 1, 1)
    # The pelvis lies on the plane x = 0, so that mirroring needs no shift.
    out, twin = free_body(rotations, betas), free_body(mirrored, betas)
    assert (twin.vertices - out.vertices[:, free_body.mirror_index] * FLIP_X).abs().max() < 1e-4
    assert (twin.joints29 - out.joints29[:, SWAP29] * FLIP_X).abs().max() < 1e-4


def test_joints29_needs_no_vertices_and_agrees_with_forward(free_body):
    rotations, betas, translation = random_rotations(4), random_betas(4), torch.randn(4, 3)
    out = free_body(rotations, betas, translation)
    assert torch.allclose(free_body.joints29(rotations, betas, translation), out.joints29, atol=1e-5)
    assert torch.equal(out.joints, out.joints29[:, :24])


def test_leaves_are_rigid_points_of_their_parents(free_body):
    rotations, betas = random_rotations(2), random_betas(2)
    joints, rest = free_body(rotations, betas).joints29, free_body.rest_joints(betas)
    shaped = free_body.rest_vertices(betas)
    for name, vertex in zip(LEAVES, read_body_file(FREE_BODY).leaf_vertices, strict=True):
        leaf = JOINT_INDEX[name]
        parent = PARENTS29[leaf]
        assert torch.allclose(rest[:, leaf], shaped[:, vertex], atol=1e-6)
        bone, posed_bone = rest[:, leaf] - rest[:, parent], joints[:, leaf] - joints[:, parent]
        world_rotation = torch.eye(3)
        while parent >= 0:
            world_rotation = rotations[:, parent] @ world_rotation
            parent = PARENTS24[parent]
        assert torch.allclose(posed_bone, (world_rotation @ bone[..., None])[..., 0], atol=1e-5)


def test_agrees_with_smplx(free_body):
    import smplx

    arrays = read_body_file(FREE_BODY)
    data = smplx.utils.Struct(
        v_template=arrays.template, shapedirs=arrays.shape_dirs, posedirs=np.zeros((free_body.num_vertices, 3, 207)),
        J_regressor=arrays.joint_regressor, weights=arrays.weights, f=arrays.faces,
        kintree_table=np.array([PARENTS24, range(24)]),
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # smplx may print
        reference = smplx.SMPLLayer(
            "", data_struct=data, vertex_ids=dict.fromkeys(smplx.vertex_ids.vertex_ids["smplh"], 0)
        )
    rotations, betas, translation = random_rotations(3), random_betas(3), torch.randn(3, 3)
    expected = reference(betas=betas, global_orient=rotations[:, :1], body_pose=rotations[:, 1:], transl=translation)
    got = free_body(rotations, betas, translation)
    assert torch.allclose(got.vertices, expected.vertices, atol=1e-5)
    assert torch.allclose(got.joints, expected.joints[:, :24], atol=1e-5)


def test_gradients_reach_pose_shape_and_translation(free_body):
    inputs = [t.requires_grad_() for t in (random_rotations(2), random_betas(2), torch.zeros(2, 3))]
    out = free_body(*inputs)
    (out.vertices.square().mean() + out.joints29.square().mean()).backward()
    for tensor in inputs:
        assert tensor.grad is not None and tensor.grad.isfinite().all()
        assert tensor.grad.flatten(1).norm(dim=1).min() > 0


def test_autocast_does_not_make_it_coarse(free_body):
    rotations, betas = random_rotations(2), random_betas(2)
    exact = free_body(rotations, betas)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = free_body(rotations, betas)
        assert torch.equal(free_body.rest_joints(betas), free_body.rest_joints(betas).float())
        assert torch.equal(free_body.rest_vertices(betas), free_body.rest_vertices(betas).float())
    assert torch.equal(out.vertices, exact.vertices) and torch.equal(out.joints29, exact.joints29)


@pytest.mark.parametrize(
    ("rotations", "betas", "translation"),
    [((2, 23, 3, 3), (2, 10), None), ((2, 24, 3, 3), (1, 10), None), ((2, 24, 3, 3), (2, 10), (3,))],
)
def test_wrong_shapes_are_named(free_body, rotations, betas, translation):
    arguments = [torch.zeros(rotations), torch.zeros(betas), None if translation is None else torch.zeros(translation)]
    for pose in (free_body, free_body.joints29):
        with pytest.raises(ValueError, match="must be") as error:
            pose(*arguments)
        assert str(translation or betas).strip(",()") in str(error.value)


# ---- identity --------------------------------------------------------------------------------------------------------


def test_checkpoints_never_contain_a_body(free_body):
    assert free_body.state_dict() == {}
    assert list(free_body.parameters()) == []


def test_same_numbers_same_id_whatever_the_file_is_called(free_body, tmp_path):
    copy = tmp_path / "copy.npz"
    copy.write_bytes(FREE_BODY.read_bytes())
    renamed = load_body(copy)
    assert renamed.id == free_body.id.replace("free", "copy")
    require_same_body(free_body.id, renamed.id, "a checkpoint")


def test_one_moved_vertex_is_another_body(free_body, tmp_path):
    arrays = dict(np.load(FREE_BODY))
    arrays["v_template"][0, 0] += 1e-4
    np.savez(tmp_path / "other.npz", **arrays)
    other = load_body(tmp_path / "other.npz")
    with pytest.raises(BodyMismatchError) as error:
        require_same_body(free_body.id, other.id, "shards/train")
    for part in (free_body.id, other.id, "shards/train"):
        assert part in str(error.value)


def test_data_without_a_body_is_refused_where_one_is_needed(free_body):
    with pytest.raises(BodyMismatchError, match="no body"):
        require_same_body(free_body.id, None, "shards/train")
