"""The generator of the free body: its mesh thinning, its file writing, and that it still makes the committed file."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fasthmr.body.decimate import decimate_symmetric, mirror_pairs
from fasthmr.body.files import FREE_BODY, read_body_file
from fasthmr.body.generate import generate_free_body, main, write_body

HAS_ANNY = importlib.util.find_spec("anny") is not None


def symmetric_sphere(rings: int = 17, segments: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A closed sphere of triangles with vertices on x = 0 and none of the faces crossing it."""
    polar = np.linspace(0, np.pi, rings)[1:-1]
    turn = np.arange(segments) / segments * 2 * np.pi
    ring = np.stack([np.sin(turn), np.zeros(segments), np.cos(turn)], -1)
    ring[np.abs(ring) < 1e-12] = 0
    body = np.sin(polar)[:, None, None] * ring + np.cos(polar)[:, None, None] * [0, 1, 0]
    vertices = np.concatenate([body.reshape(-1, 3), [[0, 1, 0], [0, -1, 0]]])
    north, south = len(vertices) - 2, len(vertices) - 1
    faces = []
    for i in range(segments):
        j = (i + 1) % segments
        last = (rings - 3) * segments
        faces += [[north, i, j], [south, last + j, last + i]]
        for r in range(rings - 3):
            a, b = r * segments, (r + 1) * segments
            faces += [[a + i, b + i, b + j], [a + i, b + j, a + j]]
    faces = np.array(faces)
    # diagonals of mirrored quads must mirror too: take one half's faces for both
    half = faces[vertices[faces][..., 0].mean(1) > 0]
    mirror = mirror_pairs(vertices)
    return vertices, np.concatenate([half, mirror[half][:, ::-1]])


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return float((a * np.cross(b, c)).sum() / 6)


def test_thinning_keeps_the_surface_closed_symmetric_and_in_shape():
    vertices, faces = symmetric_sphere()
    kept, thin = decimate_symmetric(vertices, faces, 240)

    assert 239 <= len(kept) <= 240
    left = vertices[kept]
    mirror_pairs(left)  # raises if a partner is gone
    edges = np.sort(thin[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    edges, count = np.unique(edges, axis=0, return_counts=True)
    assert (count == 2).all()
    assert len(kept) - len(edges) + len(thin) == 2  # Euler: still one sphere
    assert volume(left, thin) == pytest.approx(volume(vertices, faces), rel=0.05)


def test_thinning_refuses_a_lopsided_mesh():
    vertices, faces = symmetric_sphere()
    with pytest.raises(ValueError, match="not mirror-symmetric"):
        decimate_symmetric(vertices + np.array([0.1, 0, 0]), faces, 240)


def test_equal_arrays_make_equal_files_and_a_failed_write_leaves_none(tmp_path, monkeypatch):
    arrays = dict(np.load(FREE_BODY))
    write_body(tmp_path / "a.npz", arrays)
    monkeypatch.setattr("time.time", lambda: 2e9)  # another day
    write_body(tmp_path / "b.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert all(np.array_equal(array, np.load(tmp_path / "a.npz")[name]) for name, array in arrays.items())
    with pytest.raises(ValueError, match="Object arrays"):
        write_body(tmp_path / "c.npz", {"bad": np.array({}, dtype=object)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.skipif(HAS_ANNY, reason="anny is installed here")
def test_without_anny_the_generator_says_what_to_install(tmp_path, caplog):
    with pytest.raises(ModuleNotFoundError, match="body-generator"):
        generate_free_body()
    assert main([str(tmp_path / "body.npz")]) == 1
    assert "body-generator" in caplog.text and not any(tmp_path.iterdir())


def test_the_output_must_be_an_npz(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "body.pkl")])
    assert "must end in .npz" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_ANNY, reason="regenerating needs the package anny: pip install -e '.[body-generator]'")
def test_regenerating_gives_the_committed_body(tmp_path, monkeypatch):
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the generator must work offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main([str(tmp_path / "body.npz")]) == 0
    new, committed = np.load(tmp_path / "body.npz"), np.load(FREE_BODY)
    assert set(new.files) == set(committed.files)
    for name in committed.files:
        assert new[name].dtype == committed[name].dtype, name
        if committed[name].dtype.kind == "f":
            np.testing.assert_allclose(new[name], committed[name], atol=1e-5, err_msg=name)  # 10 micrometres
        else:
            np.testing.assert_array_equal(new[name], committed[name], err_msg=name)
    read_body_file(tmp_path / "body.npz")
