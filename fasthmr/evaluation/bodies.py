"""The bodies of an evaluation: the neutral one, which predictions are of, and those that labels are of."""

from __future__ import annotations

from fasthmr.body import BodyModel, load_body, require_same_body
from fasthmr.data.schema import Clip, Gender
from fasthmr.evaluation.config import EvaluationConfig

#: where a gendered body comes from
_FILES = "SMPL_MALE.pkl and SMPL_FEMALE.pkl come from https://smpl.is.tue.mpg.de"


def load_bodies(config: EvaluationConfig) -> dict[Gender, BodyModel]:
    """The neutral body, and the gendered ones that are given, on the CPU.

    Raises:
        FileNotFoundError, BodyFileError: as `fasthmr.body.load_body`.
        ValueError: their vertices are not the same ones, so their meshes cannot be compared.
    """
    paths: dict[Gender, str | None] = {
        "neutral": config.body, "male": config.body_male, "female": config.body_female,
    }  # fmt: skip
    bodies = {gender: load_body(path) for gender, path in paths.items() if path is not None}
    neutral = bodies["neutral"]
    for gender, body in bodies.items():
        if body.num_vertices != neutral.num_vertices:
            raise ValueError(
                f"body_{gender} has {body.num_vertices} vertices and body has {neutral.num_vertices}: meshes of the "
                f"two cannot be compared. Give bodies of one family ({_FILES})"
            )
    return bodies


def require_true_body(clip: Clip, bodies: dict[Gender, BodyModel]) -> None:
    """Refuse a clip whose true mesh cannot be made.

    Raises:
        ValueError: its labels are of a gendered body that is not given.
        BodyMismatchError: the body of its gender is another one than its labels are of.
    """
    if clip.gender not in bodies:
        raise ValueError(
            f"clip {clip.key} has labels of the {clip.gender} body {clip.body}: give that body with "
            f"--body_{clip.gender} FILE ({_FILES})"
        )
    option = "body" if clip.gender == "neutral" else f"body_{clip.gender}"
    require_same_body(bodies[clip.gender].id, clip.body, where=f"clip {clip.key}, with labels of --{option},")
