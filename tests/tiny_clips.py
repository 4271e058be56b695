"""Clips for tests, drawn and posed by simple rules so that every label can be checked against the picture."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from fasthmr.conventions import JOINTS29, MASK_SUBJECT, PARENTS29, SWAP29
from fasthmr.data.schema import Clip, PackedImages
from fasthmr.geometry.boxes import apply_affine, crop_affine, square_box
from fasthmr.geometry.rotations import axis_angle_to_matrix

IMAGE_SIZE = np.array([640, 480], dtype=np.int64)
INTRINSICS = np.array([[700, 0, 331], [0, 710, 236], [0, 0, 1]], dtype=np.float32)
#: colour of a joint's dot, by the side of the body it belongs to.
COLORS = {"left": (250, 30, 30), "right": (30, 30, 250), "middle": (30, 250, 30)}


def side(name: str) -> str:
    return name.split("_")[0] if name.startswith(("left_", "right_")) else "middle"


def forward_kinematics(rotations: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Joints (T, 29, 3) of a mirror-symmetric stick figure with SMPL's tree; its rest pelvis lies at the origin."""
    offsets = np.random.default_rng(5).uniform(-0.25, 0.25, (29, 3))
    swap = list(SWAP29)
    offsets = (offsets + offsets[swap] * [-1, 1, 1]) / 2
    joints = np.zeros((len(rotations), 29, 3))
    world = np.zeros((len(rotations), 29, 3, 3))
    joints[:, 0], world[:, 0] = translation, rotations[:, 0]
    for joint, parent in enumerate(PARENTS29):
        if parent >= 0:
            joints[:, joint] = joints[:, parent] + world[:, parent] @ offsets[joint]
            world[:, joint] = world[:, parent] @ rotations[:, joint] if joint < 24 else world[:, parent]
    return joints


def project(joints3d: np.ndarray, intrinsics: np.ndarray = INTRINSICS) -> np.ndarray:
    homogeneous = joints3d @ intrinsics.T
    return homogeneous[..., :2] / homogeneous[..., 2:]


def drawn_clip(
    key: str = "clip", frames: int = 6, crop_px: int = 384, body: str | None = "stick@0", seed: int = 0
) -> Clip:
    """A stick figure of coloured dots (red left, blue right, green middle) moving in front of a camera."""
    rng = np.random.default_rng(seed)
    pose = rng.normal(0, 0.25, (1, 24, 3)) + np.linspace(0, 0.3, frames)[:, None, None] * rng.normal(0, 0.3, (1, 24, 3))
    pose = pose.astype(np.float32)
    translation = np.array([0.3, -0.1, 4.0]) + np.linspace(0, 1, frames)[:, None] * [0.2, 0.05, 0.1]
    rotations = axis_angle_to_matrix(torch.from_numpy(pose)).numpy()
    joints3d = forward_kinematics(rotations, translation)
    joints2d = project(joints3d)
    center, size = square_box(joints2d, 1.1)
    crop_from_image = crop_affine(center, 1.5 * size, crop_px)
    images, masks = [], []
    for points, affine in zip(joints2d, crop_from_image, strict=True):
        image = np.full((crop_px, crop_px, 3), 128, np.uint8)
        mask = np.zeros((crop_px, crop_px), np.uint8)
        for name, point in zip(JOINTS29, apply_affine(affine, points), strict=True):
            # 4 fractional bits: the dots are drawn at sub-pixel positions
            at = tuple(int(v) for v in np.rint(point * 16))
            cv2.circle(image, at, 4 * 16, COLORS[side(name)], -1, cv2.LINE_AA, 4)
            cv2.circle(mask, at, 6 * 16, MASK_SUBJECT, -1, cv2.LINE_8, 4)
        images.append(image)
        masks.append(mask)
    confident = np.ones((frames, 29, 1))
    labels = ("joints2d", "joints3d", "pose", "betas", "translation", "masks", "intrinsics")
    return Clip(
        key=key,
        source="test/stick",
        fps=25.0,
        body=body,
        image_size=IMAGE_SIZE.copy(),
        intrinsics=INTRINSICS.copy(),
        frames=PackedImages.encode_jpeg(images, quality=95),
        masks=PackedImages.encode_png(masks),
        crop_from_image=crop_from_image.astype(np.float32),
        box_center=center.astype(np.float32),
        box_size=size.astype(np.float32),
        valid=np.ones(frames, bool),
        joints2d=np.concatenate([joints2d, confident], -1).astype(np.float32),
        joints3d=np.concatenate([joints3d, confident], -1).astype(np.float32),
        pose=pose,
        betas=np.zeros(10, np.float32),
        translation=translation.astype(np.float32),
        status=dict.fromkeys(labels, "ground_truth"),
    )
