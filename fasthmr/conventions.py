"""Names, orders and index tables of the body: the one place where a joint has a number.

Sources: SMPL (Loper et al. 2015) for the 24 joints and their parents; HybrIK (Li et al. 2021,
`HybrIK/hybrik/models/layers/smpl/SMPL.py`) for the five leaves and the child that defines each joint's bone;
ImageNet statistics as used by HMR2.0 (`4D-Humans/hmr2/configs/__init__.py`).
"""

from __future__ import annotations

JOINTS24 = (
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle",
    "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder",
    "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hand", "right_hand",
)  # fmt: skip
LEAVES = ("head_top", "left_middle_tip", "right_middle_tip", "left_big_toe", "right_big_toe")
JOINTS29 = JOINTS24 + LEAVES
NUM_JOINTS = len(JOINTS24)
NUM_BETAS = 10

#: parent of each of the 29 joints; the pelvis has none (-1). Leaves are rigid points of their parent.
PARENTS29 = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21, 15, 22, 23, 10, 11)
PARENTS24 = PARENTS29[:NUM_JOINTS]

#: the joint or leaf to which each joint's bone leads (HybrIK); a joint's twist is about it
BONE_CHILD = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 27, 28, 15, 16, 17, 24, 18, 19, 20, 21, 22, 23, 25, 26)

JOINT_INDEX = {name: i for i, name in enumerate(JOINTS29)}
PELVIS, LEFT_HIP, RIGHT_HIP, HEAD = (JOINT_INDEX[n] for n in ("pelvis", "left_hip", "right_hip", "head"))


def _mirror(name: str) -> str:
    for a, b in (("left_", "right_"), ("right_", "left_")):
        if name.startswith(a):
            return b + name.removeprefix(a)
    return name


#: index of the mirrored joint: `joints[SWAP29]` renames left and right.
SWAP29 = tuple(JOINT_INDEX[_mirror(n)] for n in JOINTS29)
SWAP24 = SWAP29[:NUM_JOINTS]

#: statistics of RGB in [0, 1] with which every network input is normalised.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

#: side of HMR2.0's square network input in pixels, and the focal length its weak-perspective camera assumes there.
CROP_PX = 256
CROP_FOCAL_PX = 5000.0

#: values in a stored instance mask.
MASK_BACKGROUND, MASK_SUBJECT, MASK_OTHER = 0, 1, 2
