"""A motion estimate as an AMASS-style npz file, which `fasthmr.data.synth.amass.MotionFolder` reads back.

| key | shape | what |
|---|---|---|
| `poses` | (T, 72) | axis-angle, radians, SMPL's 24 joints; the first turns the body in the world |
| `trans` | (T, 3) | metres, world: the pelvis is at the rest pelvis + `trans` |
| `betas` | (10,) | shape |
| `gender` | () | "neutral" |
| `mocap_framerate` | () | frames a second |
| `up_axis` | () | "z", as AMASS has it |
| `world_from_camera` | (3, 3) | rotation from the camera frame (x right, y down, z forward) to the world; same origin |
| `intrinsics` | (3, 3) | of the full image, px |
| `image_size` | (2,) | width and height, px |
| `interpolated` | (T,) | bool, frames in which the person was not seen |
| `body` | () | id of the body that pose and shape belong to, `BodyModel.id` |

The world is the camera turned so that z is up where the camera is held level: x right, y away from it. A camera that
looks down, or moves, is not made up for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fasthmr.body import BodyModel
from fasthmr.files import written_whole
from fasthmr.geometry.rotations import matrix_to_axis_angle
from fasthmr.pipeline import MotionEstimate

#: x right, y away, z up, from x right, y down, z forward
WORLD_FROM_CAMERA = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))


def save_motion(path: Path, motion: MotionEstimate, body: BodyModel) -> None:
    """Write a motion, whole or not at all. It has one shape, the mean over its frames.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(path) as file:
        np.savez_compressed(file, **motion_arrays(motion, body))  # type: ignore[arg-type]


def motion_arrays(motion: MotionEstimate, body: BodyModel) -> dict[str, np.ndarray]:
    """What the file holds, by key."""
    turn = torch.tensor(WORLD_FROM_CAMERA)
    rotations = motion.rotations.clone()
    rotations[:, 0] = turn @ rotations[:, 0]
    betas = motion.betas.mean(0)
    # The body turns about its pelvis, not about the origin: turn (pelvis + t) = pelvis + trans, solved for trans.
    pelvis = body.rest_joints(betas[None].to(body.faces.device))[0, 0].cpu()
    trans = (pelvis + motion.translation) @ turn.mT - pelvis
    return {
        "poses": matrix_to_axis_angle(rotations).flatten(1).numpy(),
        "trans": trans.numpy(),
        "betas": betas.numpy(),
        "gender": np.array("neutral"),
        "mocap_framerate": np.array(motion.fps),
        "up_axis": np.array("z"),
        "world_from_camera": turn.numpy(),
        "intrinsics": motion.intrinsics.numpy(),
        "image_size": motion.image_size.numpy(),
        "interpolated": motion.interpolated.numpy(),
        "body": np.array(motion.body),
    }
