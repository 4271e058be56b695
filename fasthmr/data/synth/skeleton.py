"""The mean free body's skeleton: forward kinematics, soles, and placing arms and legs at targets (two-bone IK)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fasthmr.body import load_body
from fasthmr.conventions import JOINT_INDEX, NUM_BETAS, NUM_JOINTS, PARENTS24, PELVIS
from fasthmr.data.synth.quaternions import Array, X, Y, about, from_axes, inverse, multiply, rotate

LEFT, RIGHT = 1, -1
SIDES = (LEFT, RIGHT)


def joint(name: str, side: int = 0) -> int:
    """Number of a joint by its name; `side` LEFT or RIGHT puts the prefix before it."""
    prefix = {LEFT: "left_", RIGHT: "right_", 0: ""}[side]
    return JOINT_INDEX[prefix + name]


@dataclass(frozen=True)
class Skeleton:
    """Rest joints and soles of one body, in metres.

    Attributes:
        rest: (29, 3) rest joints.
        sole_y: height of the lowest rest vertex: where the floor is in the rest pose.
        contacts: (6, 3) rest positions of heel, ball and toe tip of the left, then the right foot, on the sole.
        contact_joints: (6,) the joint that each contact moves with.
    """

    rest: Array
    sole_y: float
    contacts: Array
    contact_joints: tuple[int, ...]

    @property
    def leg_length(self) -> float:
        """Hip to ankle when straight."""
        knee, hip, ankle = (self.rest[joint(n, LEFT)] for n in ("knee", "hip", "ankle"))
        return float(np.linalg.norm(knee - hip) + np.linalg.norm(ankle - knee))

    @property
    def arm_length(self) -> float:
        """Shoulder to wrist when straight."""
        shoulder, elbow, wrist = (self.rest[joint(n, LEFT)] for n in ("shoulder", "elbow", "wrist"))
        return float(np.linalg.norm(elbow - shoulder) + np.linalg.norm(wrist - elbow))

    @property
    def standing_height(self) -> float:
        """Height of the pelvis above the floor in the rest pose."""
        return float(self.rest[PELVIS, 1] - self.sole_y)

    def forward(self, local: Array) -> tuple[Array, Array]:
        """World rotations and positions with the pelvis at the origin.

        Args:
            local: (T, 24, 4) rotations relative to the parent; joint 0 relative to the world.

        Returns:
            (T, 24, 4) world rotations and (T, 24, 3) joint positions.
        """
        turned = np.empty_like(local)
        position = np.zeros((*local.shape[:2], 3))
        turned[:, 0] = local[:, 0]
        for j in range(1, NUM_JOINTS):
            parent = PARENTS24[j]
            turned[:, j] = multiply(turned[:, parent], local[:, j])
            position[:, j] = position[:, parent] + rotate(turned[:, parent], self.rest[j] - self.rest[parent])
        return turned, position

    def contact_points(self, local: Array) -> Array:
        """Heel, ball and toe tip of both feet relative to the pelvis: (T, 6, 3)."""
        turned, position = self.forward(local)
        moved_by = list(self.contact_joints)
        return position[:, moved_by] + rotate(turned[:, moved_by], self.contacts - self.rest[moved_by])


@lru_cache(maxsize=1)
def free_skeleton() -> Skeleton:
    """Skeleton of the free body of mean shape."""
    body = load_body("free")
    mean = torch.zeros(1, NUM_BETAS)
    with torch.no_grad():
        rest = body.rest_joints(mean)[0].double().numpy()
        sole_y = float(body.rest_vertices(mean)[0, :, 1].min())
    contacts, moved_by = [], []
    for side in SIDES:
        ankle, ball, toe = (rest[joint(n, side)] for n in ("ankle", "foot", "big_toe"))
        # The heel reaches back behind the ankle about a third of the way from the ankle to the ball.
        heel = ankle - (ball - ankle) / 3
        contacts += [(heel[0], sole_y, heel[2]), (ball[0], sole_y, ball[2]), (toe[0], sole_y, toe[2])]
        moved_by += [joint("ankle", side), joint("ankle", side), joint("foot", side)]
    return Skeleton(rest, sole_y, np.array(contacts), tuple(moved_by))


def place_limb(
    upper: Array, lower: Array, hinge: int, sign: int, bend_towards: Array, target: Array, pole: Array
) -> tuple[Array, Array]:
    """Rotations of a two-bone limb that puts its end at a target.

    A target out of reach is approached smoothly, so that the middle joint never snaps straight.

    Args:
        upper: (3,) rest vector of the first bone; lower: (3,) of the second.
        hinge: axis (0, 1, 2) about which the middle joint bends, in the direction `sign`.
        bend_towards: (3,) side of the rest limb to which the middle joint sticks out when bent.
        target: (T, 3) where the end shall be, relative to the first joint.
        pole: (T, 3) direction in which the middle joint shall stick out; not parallel to `target`.

    Returns:
        (T, 4) rotation of the first bone in the frame of `target`, and (T, 4) of the second relative to the first.
    """
    reach = np.linalg.norm(upper) + np.linalg.norm(lower)
    distance = np.linalg.norm(target, axis=-1)
    soft, longest = 0.02 * reach, 0.9995 * reach
    distance = np.where(
        distance > longest - soft, longest - soft * np.exp((longest - soft - distance) / soft), distance
    )
    # |upper + R(angle) lower| as a function of the bend: constant + a cos + b sin = half the excess of the squares.
    turned90 = rotate(about(hinge, sign * np.pi / 2), lower)
    along = lower[hinge] * upper[hinge]
    cosine, sine = float(upper @ lower) - along, float(upper @ turned90) - along
    wanted = (distance**2 - upper @ upper - lower @ lower) / 2 - along
    bend = np.arctan2(sine, cosine) + np.arccos(np.clip(wanted / np.hypot(cosine, sine), -1.0, 1.0))
    middle = about(hinge, sign * np.maximum(bend, 0.0))
    end = upper + rotate(middle, lower)
    toward = np.broadcast_to(bend_towards, end.shape)
    first = multiply(from_axes(target, pole), inverse(from_axes(end, toward)))
    return first, middle


def place_leg(
    skeleton: Skeleton, pelvis: Array, side: int, ankle: Array, foot: Array, knee_yaw: Array
) -> tuple[Array, Array, Array]:
    """Hip, knee and ankle rotations (T, 4) that put the foot where it shall be.

    Args:
        pelvis: (T, 4) rotation of the pelvis.
        ankle: (T, 3) ankle relative to the pelvis joint, in the frame that `pelvis` turns in.
        foot: (T, 4) rotation of the foot in that frame.
        knee_yaw: (T,) heading of the plane in which the knee bends, radians about y.
    """
    hip, knee, end = (skeleton.rest[joint(n, side)] for n in ("hip", "knee", "ankle"))
    target = ankle - rotate(pelvis, hip - skeleton.rest[PELVIS])
    # Perpendicular to the leg in that plane: forward under a hanging leg, up over one stretched forward.
    pole = np.cross(target, rotate(about(Y, knee_yaw), np.array((1.0, 0.0, 0.0))))
    thigh, bend = place_limb(knee - hip, end - knee, X, 1, np.array((0.0, 0.0, 1.0)), target, pole)
    return multiply(inverse(pelvis), thigh), bend, multiply(inverse(multiply(thigh, bend)), foot)


def place_arm(skeleton: Skeleton, collar: Array, side: int, wrist: Array, elbow_towards: Array) -> tuple[Array, Array]:
    """Shoulder and elbow rotations (T, 4) that put the wrist at (T, 3), metres from the shoulder in the chest's frame.

    `collar` (T, 4) is the collar's rotation in the chest; `elbow_towards` (T, 3) is where the elbow points.
    """
    shoulder, elbow, end = (skeleton.rest[joint(n, side)] for n in ("shoulder", "elbow", "wrist"))
    upper, lower = elbow - shoulder, end - elbow
    arm, bend = place_limb(upper, lower, Y, -side, np.array((0.0, 0.0, -1.0)), wrist, elbow_towards)
    return multiply(inverse(collar), arm), bend
