"""Makes the free body from Anny: `python -m fasthmr.body.generate OUT.npz`, after `pip install -e .[body-generator]`.

Anny (Brégier et al. 2025, https://github.com/naver/anny; PyPI `anny`) is a parametric body whose assets are CC0. From
it this program makes a body in SMPL's format: 24 joints, 10 shapes, skinning weights, none of SMPL's data. The steps:

1. 600 adults are drawn from Anny's own distribution of ages, heights and weights.
2. Each is brought into a T pose, with SMPL's 24 joints read off Anny's bones (anny_rig.py).
3. The mesh is thinned to 6,600 vertices, symmetrically (decimate.py).
4. The 10 main directions in which these people differ are the shapes; one unit of a beta is one standard deviation.
5. Joints are weighted means of a few vertices, fitted to the bones over all people.

Only rig "anny" and topology "anny-notongue" are used: they come with the package. Anny's topologies "smpl" and "smplx"
download files that are not free. It runs offline, in 20 s; the first run takes a minute and leaves Anny's own cache of
0.8 GB in ~/.cache/anny. The committed file is compared with a new one in tests/test_body_generate.py.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import nnls

from fasthmr.body.anny_rig import HEADS_OF_JOINT, AnnyRig
from fasthmr.body.decimate import decimate_symmetric, mirror_pairs
from fasthmr.conventions import JOINT_INDEX, LEAVES, NUM_BETAS, NUM_JOINTS, PARENTS24, SWAP24

if TYPE_CHECKING:
    from anny import Anny

#: Fewer than 6,788: smplx's own vertex table for SMPL then fails loudly on this body, where a larger one would silently
#: give wrong points. Never SMPL's 6,890.
TARGET_VERTICES = 6600
PEOPLE = 600
_SEED = 0
_PEOPLE_PER_BATCH = 50  # bounds memory: about 1 GB
_CANDIDATES_PER_JOINT = 500
_AVERAGE_ADULT = {"gender": 0.5, "age": 0.7, "muscle": 0.5, "weight": 0.5, "height": 0.5, "proportions": 0.5}
_MIRROR = np.array([-1.0, 1.0, 1.0])

log = logging.getLogger(__name__)


def generate_free_body() -> dict[str, np.ndarray]:
    """The arrays of the free body as its file holds them: float32 and small integers. Takes about 20 s.

    Raises:
        ModuleNotFoundError: the package `anny` is not installed.
    """
    model = _load_anny()
    rig = AnnyRig(model)
    kept, faces, mirror = _thin_mesh(rig)
    log.info("mesh: %d of %d vertices, %d faces", len(kept), len(rig.bone_weights), len(faces))

    people, joints = _people_in_t_pose(rig, _sample_adults(model), kept)
    people = _symmetric(people, mirror)
    heights = np.ptp(people[:, :, 1], axis=1)
    log.info("people: %d, %.3f +- %.3f m tall", len(people), heights.mean(), heights.std())

    template = people.mean(0)
    shapes = _symmetric(_main_shapes(people - template), mirror)
    regressor = _fit_joint_regressor(people, joints, mirror)
    error_mm = np.linalg.norm(np.einsum("jv,bvc->bjc", regressor, people) - joints, axis=-1) * 1e3
    log.info("joints: %.1f mm from Anny's bones on average, %.1f mm at worst", error_mm.mean(), error_mm.max())

    weights = rig.joint_weights[kept]
    weights = weights + weights[mirror][:, SWAP24]
    weights /= weights.sum(1, keepdims=True)
    rows, columns = np.nonzero(regressor)
    return {
        "v_template": template.astype(np.float32),
        "shapedirs": shapes.transpose(1, 2, 0).astype(np.float32),
        "weights": weights.astype(np.float32),
        "f": faces.astype(np.uint16),
        "kintree_table": np.array([PARENTS24, range(NUM_JOINTS)], np.int32),
        "J_reg_rows": rows.astype(np.uint8),
        "J_reg_cols": columns.astype(np.uint16),
        "J_reg_vals": regressor[rows, columns].astype(np.float32),
        "leaf_vertices": _leaf_vertices(rig, kept, template, mirror).astype(np.uint16),
        "mirror_index": mirror.astype(np.uint16),
    }


def _load_anny() -> Anny:
    try:
        import anny
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "making the free body needs the package `anny`: pip install -e '.[body-generator]'. "
            "Using the body needs no generator: its file is part of this package"
        ) from error
    return anny.Anny(rig="anny", topology="anny-notongue")


def _sample_adults(model: Anny) -> dict[str, np.ndarray]:
    """Phenotypes (PEOPLE,) of people of 18 to 75 years, heights calibrated by Anny on WHO data."""
    from anny.shape_distribution import SimpleShapeDistribution

    youngest, oldest = torch.tensor(18.0, dtype=model.dtype), torch.tensor(75.0, dtype=model.dtype)
    adults = SimpleShapeDistribution(model, torch.distributions.Uniform(youngest, oldest))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        _, phenotypes = adults.sample(PEOPLE)
    return {name: value.numpy() for name, value in phenotypes.items()}


def _thin_mesh(rig: AnnyRig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept vertices (V,), faces (F,3) and mirror partners (V,) in terms of them; decided on an average adult."""
    vertices = rig.rest({name: np.array([value]) for name, value in _AVERAGE_ADULT.items()})[0][0]
    vertices[np.abs(vertices[:, 0]) < 1e-6, 0] = 0.0
    kept, faces = decimate_symmetric(vertices, rig.faces, TARGET_VERTICES)
    return kept, faces, mirror_pairs(vertices[kept])


def _people_in_t_pose(
    rig: AnnyRig, phenotypes: dict[str, np.ndarray], kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (B,V,3) and joints (B,24,3), the vertices' mean at the origin: shapes shall not hold translations."""
    vertices, joints = [], []
    for start in range(0, PEOPLE, _PEOPLE_PER_BATCH):
        batch = {name: value[start : start + _PEOPLE_PER_BATCH] for name, value in phenotypes.items()}
        posed, posed_joints = rig.to_t_pose(*rig.rest(batch), kept)
        centre = posed.mean(1, keepdims=True)
        vertices.append(posed - centre)
        joints.append(posed_joints - centre)
    return np.concatenate(vertices), np.concatenate(joints)


def _symmetric(points: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """Remove what rounding left of asymmetry: the mean of (...,V,3) and its mirror image."""
    return (points + points[..., mirror, :] * _MIRROR) / 2


def _main_shapes(offsets: np.ndarray) -> np.ndarray:
    """Principal directions (10,V,3) of people's offsets from their mean (B,V,3), one standard deviation long."""
    _, sizes, directions = np.linalg.svd(offsets.reshape(len(offsets), -1), full_matrices=False)
    variance = sizes**2 / (sizes**2).sum()
    log.info("shapes: %d hold %.2f %% of the variance", NUM_BETAS, 100 * variance[:NUM_BETAS].sum())
    deviations = sizes[:NUM_BETAS] / np.sqrt(len(offsets) - 1)
    shapes = (directions[:NUM_BETAS] * deviations[:, None]).reshape(NUM_BETAS, -1, 3)
    # A direction's sign is arbitrary: a positive beta raises the point that the shape moves up or down the most.
    heights = shapes[:, :, 1]
    most_moved = np.abs(heights).argmax(1)
    return shapes * np.sign(heights[np.arange(NUM_BETAS), most_moved])[:, None, None]


def _fit_joint_regressor(people: np.ndarray, joints: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """(24,V) weights, not negative and summing to one, whose vertex means are the joints; right mirrors left."""
    regressor = np.zeros((NUM_JOINTS, people.shape[1]))
    distance_from = people.mean(0)
    for name in HEADS_OF_JOINT:
        joint = JOINT_INDEX[name]
        nearest = np.linalg.norm(distance_from - joints[:, joint].mean(0), axis=1).argsort(kind="stable")
        if name.startswith("left_"):
            near = nearest[:_CANDIDATES_PER_JOINT]
            weights = _convex_fit(people[:, near], joints[:, joint])
            regressor[joint, near] = weights
            regressor[SWAP24[joint], mirror[near]] = weights
        else:  # on the midline: a vertex and its mirror image share one weight, so only y and z are to fit
            near = nearest[: 2 * _CANDIDATES_PER_JOINT]
            near = np.unique(np.minimum(near, mirror[near]))
            pairs = (people[:, near] + people[:, mirror[near]]) / 2
            weights = _convex_fit(pairs[..., 1:], joints[:, joint, 1:])
            np.add.at(regressor[joint], near, weights / 2)
            np.add.at(regressor[joint], mirror[near], weights / 2)
    return regressor


def _convex_fit(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights (N,), not negative and summing to one, with which the mean of points (B,N,D) is targets (B,D)."""
    centre = targets.mean(0)
    rows = (points - centre).transpose(0, 2, 1).reshape(-1, points.shape[1])
    sum_weight = 100.0  # one more equation, heavy against metres: the weights sum to one
    matrix = np.concatenate([rows, np.full((1, points.shape[1]), sum_weight)])
    weights, _ = nnls(matrix, np.append((targets - centre).reshape(-1), sum_weight), maxiter=20_000)
    return weights / weights.sum()


def _leaf_vertices(rig: AnnyRig, kept: np.ndarray, template: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """(5,) the vertices at the ends of head, middle fingers and big toes, in the order of conventions.LEAVES."""

    def farthest(region: np.ndarray, direction: tuple[float, float, float]) -> int:
        candidates = np.flatnonzero(region)
        return int(candidates[(template[candidates] @ direction).argmax()])

    on_midline = mirror == np.arange(len(mirror))
    vertex = {
        "head_top": farthest(on_midline & (rig.weight_of("head")[kept] > 0.5), (0.0, 1.0, 0.0)),
        "left_middle_tip": farthest(rig.weight_of("finger3-3.L")[kept] > 0.5, (1.0, 0.0, 0.0)),
        "left_big_toe": farthest(rig.weight_of("toe1-2.L")[kept] > 0.3, (0.0, 0.0, 1.0)),
    }
    for left in ("left_middle_tip", "left_big_toe"):
        vertex[left.replace("left", "right")] = int(mirror[vertex[left]])
    return np.array([vertex[name] for name in LEAVES])


def write_body(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz atomically, with fixed time stamps: the same arrays always make the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.getvalue())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    log.info("wrote %s, %d bytes", path, path.stat().st_size)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the free SMPL-format body from Anny (about 20 s).")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    out: Path = parser.parse_args(arguments).out
    if out.suffix != ".npz":
        parser.error(f"OUT must end in .npz, got {out}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arrays = generate_free_body()
    except ModuleNotFoundError as error:
        if error.__cause__ is None or getattr(error.__cause__, "name", None) != "anny":
            raise
        log.error("%s", error)
        return 1
    write_body(out, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
