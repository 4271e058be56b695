"""The rasteriser, light and lens, and the pictures of meshes, on scenes small enough to know what must come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasthmr.render.overlay import overlay_mesh, side_view
from fasthmr.render.raster import Fragments, interpolate, project_points, rasterize, vertex_normals
from fasthmr.render.shading import (
    NOISE_PX,
    cast_shadows,
    expose,
    ground_shade,
    sensor_noise,
    shadow_fragments,
    shrunken,
    surface_shade,
    texel,
    tone_curve,
)

#: a square of two triangles that faces a camera (y down) looking along +z
CORNERS = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32)
FACING = np.array([[0, 2, 1], [0, 3, 2]], np.int32)


def square(x: float, y: float, depth: float, half: float = 1.0) -> np.ndarray:
    """The square around pixel (x, y), in what the rasteriser takes: px, px, metres."""
    return (CORNERS * [half, half, 0] + [x, y, depth]).astype(np.float32)


# ---- rasteriser ----------------------------------------------------------------------------------------------------


def test_pixels_have_their_centres_at_integers():
    fragments = rasterize(square(5, 4, 2.0, half=2.5), FACING, 12, 10)
    covered = np.argwhere(fragments.face >= 0)
    assert covered.min(0).tolist() == [2, 3] and covered.max(0).tolist() == [6, 7] and len(covered) == 25
    assert np.allclose(fragments.inverse_depth[2:7, 3:8], 0.5)


def test_every_pixel_of_a_closed_surface_is_drawn_exactly_once():
    # two triangles that share the diagonal through pixel centres leave no gap
    assert (rasterize(square(5, 5, 1.0, half=3), FACING, 11, 11).face >= 0).sum() == 49


def test_triangles_that_turn_away_are_not_drawn():
    assert (rasterize(square(5, 5, 1.0, half=3), FACING[:, ::-1].copy(), 11, 11).face == -1).all()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_surface_wins_in_whatever_order(order: tuple[int, int]):
    squares = [square(5, 5, 3.0, half=4), square(7, 5, 2.0, half=2)]
    fragments = Fragments.empty(12, 12)
    for which in order:
        rasterize(squares[which], FACING, 12, 12, into=fragments)
    assert fragments.inverse_depth[5, 7] == pytest.approx(1 / 2) and fragments.inverse_depth[5, 3] == pytest.approx(
        1 / 3
    )


def test_what_is_behind_the_camera_or_too_near_is_left_out():
    for depth in (-1.0, 0.0, 0.04):
        assert (rasterize(square(5, 5, depth, half=3), FACING, 11, 11).face == -1).all()


def test_interpolation_is_correct_in_perspective():
    # A floor-like square that runs from 1 m to 5 m: colour its vertices with their own positions; at each pixel the
    # interpolated position must project back onto that pixel.
    vertices = np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 5], [-1, 1, 5]], np.float32)
    focal_px, center = 20.0, (20.0, 15.0)
    fragments = rasterize(project_points(vertices, focal_px, center), FACING, 40, 30)
    where = interpolate(fragments.face, fragments.bary, FACING, vertices)
    rows, columns = np.nonzero(fragments.face >= 0)
    assert len(rows) > 100
    again = project_points(where[rows, columns], focal_px, center)
    np.testing.assert_allclose(again[:, :2], np.stack([columns, rows], 1), atol=1e-3)
    np.testing.assert_allclose(fragments.inverse_depth[rows, columns], 1 / where[rows, columns, 2], rtol=1e-4)


def test_cleared_fragments_show_nothing():
    fragments = rasterize(square(5, 5, 1.0, half=3), FACING, 11, 11)
    fragments.clear()
    assert (fragments.face == -1).all() and (fragments.inverse_depth == 0).all()


def brute_force(points: np.ndarray, faces: np.ndarray, width: int, height: int) -> tuple[np.ndarray, ...]:
    """What each pixel shows, by solving for the weights of every triangle at every pixel in double precision.

    Also how far, in weight, the pixel is from any edge of a triangle that faces the camera.
    """
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3).astype(float)
    face, nearest = np.full(len(pixels), -1), np.full(len(pixels), np.inf)
    bary, margin = np.zeros((len(pixels), 3)), np.full(len(pixels), np.inf)
    for f, corners in enumerate(points[faces].astype(float)):
        on_screen = np.concatenate([corners[:, :2], np.ones((3, 1))], 1)
        if np.linalg.det(on_screen) >= 0:
            continue
        weights = pixels @ np.linalg.inv(on_screen)
        margin = np.minimum(margin, np.abs(weights).min(1))
        in_space = weights / corners[:, 2]
        depth = 1 / in_space.sum(1)
        hit = (weights >= 0).all(1) & (depth < nearest)
        face[hit], nearest[hit] = f, depth[hit]
        bary[hit] = in_space[hit] * depth[hit, None]
    shape = (height, width)
    return face.reshape(shape), nearest.reshape(shape), bary.reshape(*shape, 3), margin.reshape(shape)


def test_triangles_are_drawn_as_brute_force_draws_them():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-8, 48, (60, 2)), rng.uniform(0.5, 6, (60, 1))], 1).astype(np.float32)
    faces = np.arange(60, dtype=np.int32).reshape(20, 3)  # about half of them turn away
    fragments = rasterize(points, faces, 40, 32)
    face, depth, bary, margin = brute_force(points, faces, 40, 32)
    clear = margin > 1e-4  # not on an edge, where single precision may decide otherwise
    assert clear.mean() > 0.98 and 5 < len(np.unique(face)) < 20 and (face == -1).any()
    assert np.array_equal(fragments.face[clear], face[clear])
    drawn = clear & (face >= 0)
    np.testing.assert_allclose(1 / fragments.inverse_depth[drawn], depth[drawn], rtol=1e-4)
    np.testing.assert_allclose(fragments.bary[drawn], bary[drawn][:, :2], atol=1e-3)
    again = rasterize(points, faces, 40, 32)
    assert np.array_equal(again.face, fragments.face) and np.array_equal(again.bary, fragments.bary)


def sphere(rings: int = 24, corners: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A unit sphere around the origin, its faces counter-clockwise from outside."""
    down, around = np.meshgrid(
        np.pi * np.arange(rings + 1) / rings, 2 * np.pi * np.arange(corners) / corners, indexing="ij"
    )
    vertices = np.stack([np.sin(down) * np.sin(around), np.cos(down), np.sin(down) * np.cos(around)], -1).reshape(-1, 3)
    quads = [(r * corners + i, r * corners + (i + 1) % corners) for r in range(rings) for i in range(corners)]
    faces = [t for a, b in quads for t in ((a, a + corners, b + corners), (a, b + corners, b))]
    return vertices.astype(np.float32), np.array(faces, np.int32)


def test_normals_of_a_sphere_point_away_from_its_middle():
    vertices, faces = sphere()
    normals = vertex_normals(vertices, faces)
    assert (np.sum(normals * vertices, 1) > 0.995).all()


def test_a_ball_is_lit_from_above_and_its_outline_is_a_circle():
    vertices, faces = sphere()
    picture = np.zeros((101, 101, 3), np.uint8)
    drawn = overlay_mesh(
        picture, vertices + np.array([0, 0, 10]), faces, 400.0, (50.0, 50.0), (1.0, 1.0, 1.0), opacity=1.0
    )
    gray = drawn[..., 0].astype(float)
    radius_px = 400 / np.sqrt(10**2 - 1)  # of the cone that touches the ball
    assert (gray > 0).sum() == pytest.approx(np.pi * radius_px**2, rel=0.02)
    assert gray[20, 50] > gray[80, 50] + 30 and gray[50, 40] > gray[50, 60]
    assert gray[gray > 0].min() >= 0.3 * 255  # what is turned away from the light can still be seen


def test_normals_of_the_body_point_outwards(free_body):
    vertices = free_body.rest_vertices(torch.zeros(1, 10))[0].numpy()
    normals = vertex_normals(vertices, free_body.faces.numpy().astype(np.int32))
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-3)
    assert normals[vertices[:, 1].argmax(), 1] > 0.5  # crown
    assert normals[vertices[:, 0].argmax(), 0] > 0.5  # finger tip
    assert normals[vertices[:, 1].argmin(), 1] < -0.5  # sole


# ---- light and lens ------------------------------------------------------------------------------------------------


def test_a_table_shades_the_ground_and_not_itself():
    # a square lid of 1 m at a height of 1 m; the sun stands at 45 degrees in the east (+x), so that shadows fall to -x
    lid = np.array([[-0.5, 1, -0.5], [0.5, 1, -0.5], [0.5, 1, 0.5], [-0.5, 1, 0.5]], np.float32)
    sun = np.array([1.0, 1.0, 0.0]) / np.sqrt(2)
    shadow = cast_shadows(lid, np.array([[0, 2, 1], [0, 3, 2]], np.int32), sun, 0.0, shadow_fragments())
    one = np.float32
    assert ground_shade(shadow, one(-1), one(0)) == pytest.approx(1, abs=0.01)
    assert ground_shade(shadow, one(0), one(0)) == pytest.approx(0, abs=0.01)
    assert ground_shade(shadow, one(-1.4), one(0.4)) == pytest.approx(1, abs=0.01)
    assert ground_shade(shadow, one(-1.7), one(0)) == pytest.approx(0, abs=0.01)
    assert ground_shade(shadow, one(50), one(50)) == 0
    assert surface_shade(shadow, one(-0.2), one(0.7), one(0)) == 1  # under the lid
    assert surface_shade(shadow, one(0), one(1), one(0)) == 0  # on it


def test_soft_shadows_have_wide_edges_and_the_same_middle():
    lid = np.array([[-0.5, 1, -0.5], [0.5, 1, -0.5], [0.5, 1, 0.5], [-0.5, 1, 0.5]], np.float32)
    faces, sun = np.array([[0, 2, 1], [0, 3, 2]], np.int32), np.array([1.0, 1.0, 0.0]) / np.sqrt(2)
    soft = cast_shadows(lid, faces, sun, 0.08, shadow_fragments())
    at_edge = ground_shade(soft, np.float32(-1), np.float32(0.5))
    assert 0.3 < at_edge < 0.7 and ground_shade(soft, np.float32(-1), np.float32(0)) > 0.95


def test_tone_curve_goes_from_black_to_white():
    curve = tone_curve(2.2)
    assert curve[0] == 0 and curve[-1] == 255 and (np.diff(curve) >= 0).all()


def test_smaller_levels_of_a_texture_keep_its_mean_and_repeat():
    texture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    levels = shrunken(texture)
    assert np.array_equal(levels[:16], texture)
    assert np.abs(levels[30, 0].astype(float) - texture.reshape(-1, 3).mean(0)).max() < 3  # the level of one texel
    first, repeated = np.zeros(3, np.float32), np.zeros(3, np.float32)
    for level in range(5):
        side = 16 >> level
        texel(levels, level, np.float32(0.3), np.float32(0.6), first)
        texel(levels, level, np.float32(0.3 + 3 * side), np.float32(0.6 - side), repeated)
        np.testing.assert_allclose(first, repeated, atol=0.02)


def test_a_camera_sees_nothing_beside_its_sensor_and_leaves_the_picture_as_it_was():
    rng = np.random.default_rng(0)
    picture = np.full((40, 50, 3), 120, np.uint8)
    noise = sensor_noise(rng, 5.0, 0.0)
    taken = expose(picture, 0.5, noise, np.array([3, NOISE_PX - 2]), np.array([10, 30, 5, 20], np.float32))
    assert (picture == 120).all()
    outside = np.ones((40, 50), bool)
    outside[5:21, 10:31] = False
    assert (taken[outside] == 0).all() and 2 < taken[~outside].std() < 8
    assert taken[~outside].mean() == pytest.approx(120, abs=2)


def test_coarse_grain_is_as_strong_and_smoother():
    fine, coarse = (sensor_noise(np.random.default_rng(1), 4.0, grain) for grain in (0.0, 2.0))
    assert fine.std() == pytest.approx(4, rel=0.05) and coarse.std() == pytest.approx(4, rel=0.05)
    assert np.abs(np.diff(coarse, axis=0)).mean() < 0.5 * np.abs(np.diff(fine, axis=0)).mean()


# ---- pictures of meshes --------------------------------------------------------------------------------------------


def standing_in_camera(free_body, depth_m: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """The T pose as a camera at hip height sees it from the front: vertices in the camera's frame, and faces."""
    vertices = free_body.rest_vertices(torch.zeros(1, 10))[0].numpy()
    return vertices * [1, -1, -1] + [0, 0, depth_m], free_body.faces.numpy()


def test_overlay_draws_the_mesh_where_its_vertices_project(free_body):
    vertices, faces = standing_in_camera(free_body)
    image = np.full((200, 160, 3), 90, np.uint8)
    drawn = overlay_mesh(image, vertices, faces, 300.0, (80.0, 100.0), color=(1.0, 0.0, 0.0))
    assert (image == 90).all() and drawn.dtype == np.uint8
    rows, columns = np.nonzero((drawn != 90).any(-1))
    points = project_points(vertices, 300.0, (80.0, 100.0))[:, :2]
    assert np.abs([columns.min(), rows.min()] - points.min(0)).max() < 2
    assert np.abs([columns.max(), rows.max()] - points.max(0)).max() < 2
    assert drawn[rows, columns, 0].mean() > drawn[rows, columns, 1].mean() + 40


def test_side_view_shows_people_upright_and_facing_left(free_body):
    vertices, faces = standing_in_camera(free_body)
    seen = side_view(vertices, faces, 200)
    rows, columns = np.nonzero((seen != 255).any(-1))
    assert seen.shape == (200, 200, 3) and 160 < np.ptp(rows) < 200
    feet, head = rows > rows.max() - 6, rows < rows.min() + 30
    # toes stick out to the front, which is left; so does the nose
    assert (
        columns[feet].min() < columns.mean() - 4
        and columns[feet].max() - columns.mean() < columns.mean() - columns[feet].min()
    )
    assert np.ptp(columns[head]) < 30


def test_side_view_of_a_prediction_gone_wild_is_still_a_picture(free_body):
    vertices, faces = standing_in_camera(free_body)
    assert side_view(vertices * 1e-6, faces, 64).shape == (64, 64, 3)
