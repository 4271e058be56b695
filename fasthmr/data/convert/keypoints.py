"""Which of other data sets' keypoints are among our 29 joints.

Our 29 are SMPL's joints and five leaves. Annotated keypoints lie near some of them; those that mean another place (the
hips of LSP, thorax, spine and jaw, eyes, ears, heels) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fasthmr.conventions import JOINT_INDEX, JOINTS29

#: 4D-Humans' 44 keypoints, 25 of OpenPose and 19 more: ours <- theirs, the first that is known. The OpenPose ones are
#: those joints and vertices of SMPL that HMR2.0 compares them with (`4D-Humans/hmr2/models/smpl_wrapper.py`).
FROM_44 = {
    "pelvis": (8,), "neck": (1,), "left_hip": (12,), "right_hip": (9,), "left_knee": (13, 29), "right_knee": (10, 26),
    "left_ankle": (14, 30), "right_ankle": (11, 25), "left_shoulder": (5, 34), "right_shoulder": (2, 33),
    "left_elbow": (6, 35), "right_elbow": (3, 32), "left_wrist": (7, 36), "right_wrist": (4, 31),
    "left_big_toe": (19,), "right_big_toe": (22,), "head_top": (38,),
}  # fmt: skip

#: SPIN's 24 keypoints (LSP's 14 first); its hips are LSP's and therefore left out, its pelvis MPII's.
FROM_24 = {
    "pelvis": (14,), "left_knee": (4,), "right_knee": (1,), "left_ankle": (5,), "right_ankle": (0,),
    "left_shoulder": (9,), "right_shoulder": (8,), "left_elbow": (10,), "right_elbow": (7,), "left_wrist": (11,),
    "right_wrist": (6,), "head_top": (13,),
}  # fmt: skip

#: MPI-INF-3DHP's 28 joints.
FROM_3DHP_28 = {
    "pelvis": (4,), "head_top": (7,), "left_shoulder": (9,), "left_elbow": (10,), "left_wrist": (11,),
    "right_shoulder": (14,), "right_elbow": (15,), "right_wrist": (16,), "left_hip": (18,), "left_knee": (19,),
    "left_ankle": (20,), "right_hip": (23,), "right_knee": (24,), "right_ankle": (25,),
}  # fmt: skip

#: HybrIK's 17 of MPI-INF-3DHP, and Human3.6M's 17 (both begin with the pelvis).
FROM_H36M_17 = {
    "pelvis": (0,), "right_hip": (1,), "right_knee": (2,), "right_ankle": (3,), "left_hip": (4,), "left_knee": (5,),
    "left_ankle": (6,), "head_top": (10,), "left_shoulder": (11,), "left_elbow": (12,), "left_wrist": (13,),
    "right_shoulder": (14,), "right_elbow": (15,), "right_wrist": (16,),
}  # fmt: skip


def joints29(keypoints: np.ndarray, table: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Keypoints as our joints.

    Args:
        keypoints: (T,K,D), the last of the D numbers a confidence; units and frame are kept.
        table: ours <- theirs, in order of preference.

    Returns:
        (T,29,D), zeros where there is no such keypoint.
    """
    joints = np.zeros((len(keypoints), len(JOINTS29), keypoints.shape[2]))
    for name, candidates in table.items():
        ours = joints[:, JOINT_INDEX[name]]
        for theirs in candidates:
            known = (ours[:, -1] <= 0) & (keypoints[:, theirs, -1] > 0)
            ours[known] = keypoints[known, theirs]
    return joints
