"""The synthetic source: the same seed gives the same bytes, and every label is exactly what the pictures show."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from fasthmr.conventions import JOINT_INDEX, MASK_OTHER, MASK_SUBJECT
from fasthmr.data.codec import encode_clip
from fasthmr.data.schema import Clip
from fasthmr.data.synth.backgrounds import random_background
from fasthmr.data.synth.film import Figure, Film
from fasthmr.data.synth.occluders import random_things
from fasthmr.data.synth.people import paint_coordinates, random_appearance
from fasthmr.data.synth.scene import CameraPath, random_camera, random_light
from fasthmr.data.synth.source import CROP_OVER_BOX, SynthConfig, SynthSource, _height_over_ground
from fasthmr.geometry.boxes import apply_affine
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.render.raster import project_points, rasterize

#: nobody and nothing in front, no noise, a good JPEG
PLAIN = {"second_person_share": 0.0, "occluder_share": 0.0, "noise": 0.0, "jpeg_quality": 98}


@pytest.fixture(scope="module")
def plain_clips(free_body) -> list[Clip]:
    source = SynthSource(SynthConfig(clips=4, frames=6, seed=1, moving_camera_share=0.5, **PLAIN), free_body)
    return [source.make(i) for i in range(4)]


def posed(free_body, clip: Clip):
    """The body that the stored labels describe, in the camera's frame."""
    with torch.no_grad():
        return free_body(
            axis_angle_to_matrix(torch.from_numpy(clip.pose)),
            torch.from_numpy(clip.betas).expand(len(clip), -1),
            torch.from_numpy(clip.translation),
        )


def silhouette(free_body, clip: Clip, vertices: np.ndarray, t: int) -> np.ndarray:
    """Where a mesh would be seen in the stored crop, (H,W) bool."""
    side = clip.masks.decode(t).shape[0]
    points = project_points(vertices, float(clip.intrinsics[0, 0]), tuple(clip.intrinsics[:2, 2]))
    points[:, :2] = apply_affine(clip.crop_from_image[t], points[:, :2])
    seen = rasterize(points, free_body.faces.numpy().astype(np.int32), side, side).face >= 0
    corners = np.array([[0, 0], clip.image_size - 1])
    (x0, y0), (x1, y1) = apply_affine(clip.crop_from_image[t], corners)
    rows, columns = np.mgrid[:side, :side]
    return seen & (columns >= x0) & (columns <= x1) & (rows >= y0) & (rows <= y1)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


# ---- labels --------------------------------------------------------------------------------------------------------


def test_clips_keep_the_schema(plain_clips):
    for clip in plain_clips:
        clip.validate()
        clip.check_images()
        assert clip.valid.all() and set(clip.status.values()) == {"ground_truth"}


def test_the_labelled_body_projects_onto_the_labelled_joints(free_body, plain_clips):
    for clip in plain_clips:
        joints = posed(free_body, clip).joints29.numpy().astype(np.float64)
        homogeneous = joints @ clip.intrinsics.T
        pixels = homogeneous[..., :2] / homogeneous[..., 2:]
        assert np.abs(pixels - clip.joints2d[..., :2]).max() < 0.01
        assert np.abs(joints - clip.joints3d[..., :3]).max() < 1e-5
        inside = ((pixels >= 0) & (pixels <= clip.image_size - 1)).all(-1)
        assert np.array_equal(clip.joints2d[..., 2] == 1, inside) and (clip.joints3d[..., 3] == 1).all()


def test_masks_are_the_silhouettes_of_the_labelled_body(free_body, plain_clips):
    for clip in plain_clips:
        vertices = posed(free_body, clip).vertices.numpy()
        for t in range(len(clip)):
            mask = clip.masks.decode(t)
            assert set(np.unique(mask)) <= {0, MASK_SUBJECT}
            assert overlap(mask == MASK_SUBJECT, silhouette(free_body, clip, vertices[t], t)) > 0.95


def test_boxes_are_tight_around_what_is_seen(plain_clips):
    for clip in plain_clips:
        crop_px = clip.masks.decode(0).shape[0]
        for t in range(len(clip)):
            rows, columns = np.nonzero(clip.masks.decode(t) == MASK_SUBJECT)
            seen = max(np.ptp(rows), np.ptp(columns)) * CROP_OVER_BOX / crop_px
            assert 0.85 < seen < 1.15  # a tracker's box is a little late and shaky
            middle = apply_affine(clip.crop_from_image[t], clip.box_center[t][None])[0]
            assert np.abs(middle - crop_px / 2).max() < 1e-2
            assert clip.crop_from_image[t, 0, 0] == pytest.approx(
                crop_px / (CROP_OVER_BOX * clip.box_size[t]), rel=1e-5
            )


def test_crops_show_the_full_image_through_the_stored_affine(free_body):
    config = SynthConfig(clips=1, frames=1, seed=6, full_frames=True, **PLAIN)
    clip = SynthSource(config, free_body).make(0)
    clip.check_images()
    assert clip.full_frames is not None
    crop, whole = clip.frames.decode(0), clip.full_frames.decode(0)
    again = cv2.warpAffine(whole, clip.crop_from_image[0], crop.shape[:2][::-1], flags=cv2.INTER_LINEAR)
    blurred = [cv2.GaussianBlur(i, (0, 0), 3).astype(float) for i in (crop, again)]  # they are sampled differently
    shifted = np.roll(blurred[1], 8, axis=1)
    assert np.abs(blurred[0] - blurred[1]).mean() < 4
    assert np.abs(blurred[0] - blurred[1]).mean() < 0.5 * np.abs(blurred[0] - shifted).mean()


def test_people_stand_upright_on_the_ground(free_body, monkeypatch):
    cameras: list[CameraPath] = []

    def remembered(*args):
        cameras.append(random_camera(*args))
        return cameras[-1]

    monkeypatch.setattr("fasthmr.data.synth.source.random_camera", remembered)
    source = SynthSource(SynthConfig(clips=4, frames=8, seed=2, **PLAIN), free_body)
    for i in range(4):
        clip = source.make(i)
        vertices = posed(free_body, clip).vertices.numpy().astype(np.float64)
        in_world = np.einsum("tji,tnj->tni", cameras[i].rotation, vertices) + cameras[i].position[:, None]
        lowest = in_world[..., 1].min(1)
        assert lowest.min() == pytest.approx(0, abs=0.03) and lowest.max() < 0.6  # a jump at most
        y = clip.joints2d[..., 1]
        toes = np.maximum(y[:, JOINT_INDEX["left_big_toe"]], y[:, JOINT_INDEX["right_big_toe"]])
        assert np.median(y[:, JOINT_INDEX["head_top"]] - toes) < 0


def test_people_stay_in_view(free_body):
    source = SynthSource(SynthConfig(clips=10, frames=5, fps=2.0, seed=3), free_body)  # 2.5 s: they get somewhere
    shares = [source.make(i).joints2d[..., 2].mean() for i in range(10)]
    assert np.median(shares) > 0.9 and min(shares) > 0.5


def test_beside_the_full_image_crops_are_black_and_unlabelled(plain_clips):
    beside = 0
    for clip in plain_clips:
        crop, mask = clip.frames.decode(0), clip.masks.decode(0)
        rows, columns = np.mgrid[: crop.shape[0], : crop.shape[1]]
        (x0, y0), (x1, y1) = apply_affine(clip.crop_from_image[0], np.array([[0, 0], clip.image_size - 1]))
        outside = (columns < x0 - 16) | (columns > x1 + 16) | (rows < y0 - 16) | (rows > y1 + 16)  # JPEG's blocks
        beside += outside.sum()
        assert (crop[outside] < 12).all() and (mask[outside] == 0).all()
    assert beside > 1000


def test_a_drift_is_taken_away_and_a_jump_is_kept():
    seconds = np.arange(150) / 30
    drift = 0.02 * seconds
    jump = 0.4 * np.clip(1 - ((seconds - 2.5) / 0.25) ** 2, 0, None)
    height = drift + jump - _height_over_ground(drift + jump, 30.0)
    in_the_air = jump > 0
    assert np.abs(height[~in_the_air]).max() < 0.03 and height.max() > 0.37


# ---- in front of the subject ---------------------------------------------------------------------------------------


def still_camera(frames: int = 1) -> CameraPath:
    """At 1 m height, 4 m in front of the origin, looking at it: world +z comes towards the camera."""
    intrinsics = np.array([[400.0, 0, 192], [0, 400, 192], [0, 0, 1]])
    turn = np.diag([1.0, -1.0, -1.0])
    return CameraPath(
        np.array([384, 384]), intrinsics, np.repeat(turn[None], frames, 0), np.repeat([[0.0, 1.0, 4.0]], frames, 0)
    )


WHOLE_IMAGE = np.array([[1.0, 0, 0], [0, 1, 0]])


def filmed(free_body, places: list[tuple[float, float]], things=(), crop_from_image=WHOLE_IMAGE) -> np.ndarray:
    """Instances in one frame of T poses that stand at (x, z)."""
    rng = np.random.default_rng(0)
    rest = free_body.rest_vertices(torch.zeros(1, 10)).numpy()
    rest = rest - [0, rest[..., 1].min(), 0]
    film = Film(
        camera=still_camera(),
        light=random_light(rng),
        background=random_background(rng, ()),
        figures=[Figure((rest + np.array([x, 0, z])).astype(np.float32), random_appearance(rng)) for x, z in places],
        things=list(things),
        faces=free_body.faces.numpy().astype(np.int32),
        paint_on=paint_coordinates(free_body),
        rng=rng,
        noise=0.0,
        grain_px=1.0,
    )
    return film.frame(0, crop_from_image, 384, 384)[1]


def test_who_is_nearer_hides_who_is_behind(free_body):
    alone = filmed(free_body, [(0, 0)]) == MASK_SUBJECT
    behind, before = filmed(free_body, [(0, 0), (0.2, -0.8)]), filmed(free_body, [(0, 0), (0.2, 0.8)])
    assert np.array_equal(behind == MASK_SUBJECT, alone) and (behind == MASK_OTHER).sum() > 1000
    assert (before == MASK_SUBJECT).sum() < 0.8 * alone.sum() and (before == MASK_OTHER).sum() > 5000
    other_alone = filmed(free_body, [(0.2, 0.8)]) == MASK_SUBJECT
    assert overlap(before == MASK_OTHER, other_alone) > 0.97  # pixels shared by both are the subject's


def test_masks_end_where_the_image_ends(free_body):
    # so near that the image cuts arms, head and legs; the crop shows the image from pixel 96 to 287
    mask = filmed(free_body, [(0, 2.8)], crop_from_image=np.array([[0.5, 0, 96], [0, 0.5, 96]]))
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (96, 287, 96, 287)


def test_things_in_front_cut_the_mask(free_body):
    alone = filmed(free_body, [(0, 0)]) == MASK_SUBJECT
    subject = np.tile([0.0, 1.0, 0.0], (1, 29, 1))
    cut = []
    for seed in range(6):
        things = random_things(np.random.default_rng(seed), subject, np.array([[0.0, 1.0, 4.0]]))
        mask = filmed(free_body, [(0, 0)], things) == MASK_SUBJECT
        assert not (mask & ~alone).any()
        cut.append(1 - mask.sum() / alone.sum())
    assert max(cut) > 0.1 and min(cut) < 0.9


def test_masks_of_hidden_people_are_parts_of_their_silhouettes(free_body):
    config = SynthConfig(clips=4, frames=3, seed=9, second_person_share=1.0, occluder_share=1.0)
    source = SynthSource(config, free_body)
    shares = []
    for clip in map(source.make, range(4)):
        vertices = posed(free_body, clip).vertices.numpy()
        for t in range(3):
            mask, whole = clip.masks.decode(t) == MASK_SUBJECT, silhouette(free_body, clip, vertices[t], t)
            about = cv2.dilate(whole.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            assert not (mask & ~about).any()
            shares.append(mask.sum() / whole.sum())
    assert min(shares) < 0.9 and max(shares) > 0.5


def test_who_passes_by_keeps_clear_of_the_subject_and_the_camera(free_body, monkeypatch):
    scenes: list[tuple[CameraPath, list[Figure]]] = []
    start = Film.__init__

    def remembered(self, *, camera, figures, **more):
        scenes.append((camera, figures))
        start(self, camera=camera, figures=figures, **more)

    monkeypatch.setattr(Film, "__init__", remembered)
    source = SynthSource(SynthConfig(clips=8, frames=5, fps=2.0, seed=5, second_person_share=1.0), free_body)
    for i in range(8):
        source.make(i)
        camera, (subject, other) = scenes[-1]
        assert camera.from_world(other.vertices)[..., 2].min() > 0.1
        apart = np.linalg.norm((subject.vertices.mean(1) - other.vertices.mean(1))[:, [0, 2]], axis=1)
        assert apart.min() > 0.25


def test_clips_with_somebody_else_have_a_second_label(free_body):
    source = SynthSource(SynthConfig(clips=3, frames=9, seed=4, second_person_share=1.0, occluder_share=0.0), free_body)
    labels = [np.unique(clip.masks.decode(t)) for clip in map(source.make, range(3)) for t in range(9)]
    assert any(MASK_OTHER in found for found in labels)


def test_a_frame_in_which_nobody_is_seen_is_not_valid(free_body, monkeypatch):
    source = SynthSource(SynthConfig(clips=1, frames=2, seed=1), free_body)
    nothing = (np.zeros((384, 384, 3), np.uint8), np.zeros((384, 384), np.uint8))
    monkeypatch.setattr(Film, "frame", lambda *_: nothing)
    assert not source.make(0).valid.any()


# ---- cameras and looks ---------------------------------------------------------------------------------------------


def test_cameras_keep_a_walking_person_in_the_picture():
    walk = np.linspace([-1.5, 0.95, 0], [1.5, 0.95, 0.5], 60)
    inside = []
    for seed in range(40):
        camera = random_camera(np.random.default_rng(seed), walk, moving=seed % 2 == 0)
        assert np.allclose(camera.rotation @ camera.rotation.transpose(0, 2, 1), np.eye(3), atol=1e-9)
        assert np.linalg.det(camera.rotation) == pytest.approx(np.ones(60))
        in_camera = camera.from_world(walk[:, None])[:, 0]
        assert (in_camera[:, 2] > 0.5).all()
        pixels = (in_camera @ camera.intrinsics.T)[:, :2] / in_camera[:, 2:]
        inside.append(((pixels > 0) & (pixels < camera.image_size)).all(1).mean())
        fov = 2 * np.degrees(np.arctan(camera.image_size[1] / 2 / camera.intrinsics[1, 1]))
        assert 24 < fov < 71
    assert np.mean(inside) > 0.97


def test_looks_are_painted_by_landmarks_so_that_other_bodies_wear_them_too(free_body):
    class Stretched:
        """The free body with longer legs and another origin, as far as painting looks at it."""

        def rest_vertices(self, betas):
            return self._moved(free_body.rest_vertices(betas))

        def rest_joints(self, betas):
            return self._moved(free_body.rest_joints(betas))

        @staticmethod
        def _moved(points):
            return points * torch.tensor([1.1, 1.2, 1.0]) + torch.tensor([0.0, -0.3, 0.05])

    free = paint_coordinates(free_body)
    rest = free_body.rest_vertices(torch.zeros(1, 10))[0].numpy()
    assert np.abs(free - rest).max() < 0.002  # on the free body, places are the vertices themselves
    assert np.abs(paint_coordinates(Stretched()) - free).max() < 1e-5


# ---- the same seed -------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(free_body):
    config = SynthConfig(clips=3, frames=4, seed=7, second_person_share=0.5, occluder_share=1.0)
    source = SynthSource(config, free_body)
    forwards = [encode_clip(source.make(i)) for i in range(3)]
    backwards = [encode_clip(SynthSource(config, free_body).make(i)) for i in (2, 1, 0)][::-1]
    assert forwards == backwards
    assert len({clip["frames.jpgs"] for clip in forwards}) == 3
    other = SynthSource(SynthConfig(clips=3, frames=4, seed=8), free_body).make(0)
    assert other.frames.data != source.make(0).frames.data


def test_another_process_gives_the_same_bytes(free_body):
    program = """
import hashlib
from fasthmr.body import load_body
from fasthmr.data.synth.source import SynthConfig, SynthSource
clip = SynthSource(SynthConfig(clips=2, frames=2, seed=7, occluder_share=1.0), load_body("free")).make(1)
print(hashlib.sha256(clip.frames.data + clip.masks.data + clip.joints3d.tobytes()).hexdigest())
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    clip = SynthSource(SynthConfig(clips=2, frames=2, seed=7, occluder_share=1.0), free_body).make(1)
    assert told == hashlib.sha256(clip.frames.data + clip.masks.data + clip.joints3d.tobytes()).hexdigest()


def test_bytes_do_not_depend_on_the_number_of_threads(free_body):
    source = SynthSource(SynthConfig(clips=1, frames=2, seed=3), free_body)
    before = torch.get_num_threads(), cv2.getNumThreads()
    clips = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            cv2.setNumThreads(threads)
            clips.append(encode_clip(source.make(0)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
    assert clips[0] == clips[1]
