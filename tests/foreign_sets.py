"""Writers of miniature data sets in the formats of their makers, filmed with our own body; one function a format.

A `Take` is one person before one camera, with the truth in the camera frame computed the direct way: the body is posed
in the world, then every vertex is moved into the camera. What converters must undo is done here, nowhere else.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import scipy.io
import torch
from scipy.spatial.transform import Rotation

from fasthmr.body import BodyModel
from fasthmr.body.files import FREE_BODY
from fasthmr.conventions import JOINT_INDEX
from fasthmr.data.convert.keypoints import FROM_24
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.render.raster import rasterize

GREEN = (40, 220, 40)
DARK = (20, 20, 60)


def gendered_body_files(folder: Path) -> dict[str, Path]:
    """Two bodies of other shapes in the free body's format."""
    with np.load(FREE_BODY) as file:
        members = dict(file)
    files = {}
    for gender, scale in (("male", (1.06, 1.04, 1.1)), ("female", (0.9, 0.95, 0.93))):
        files[gender] = folder / f"{gender}.npz"
        np.savez(files[gender], **{**members, "v_template": (members["v_template"] * scale).astype(np.float32)})
    return files


@dataclass(frozen=True)
class Take:
    """T frames of one person: `pose` (T,24,3), `trans` (T,3) in a world; `camera` (T,4,4) from it; `size` in px."""

    body: BodyModel
    pose: np.ndarray
    trans: np.ndarray
    betas: np.ndarray
    camera: np.ndarray
    intrinsics: np.ndarray
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.pose)

    @cached_property
    def _posed(self):
        with torch.no_grad():
            return self.body(
                axis_angle_to_matrix(torch.from_numpy(self.pose)).float(),
                torch.from_numpy(self.betas).float().expand(len(self), -1),
                torch.from_numpy(self.trans).float(),
            )

    def _moved(self, points: torch.Tensor) -> np.ndarray:
        points = points.numpy().astype(np.float64)
        return np.einsum("tij,tnj->tni", self.camera[:, :3, :3], points) + self.camera[:, None, :3, 3]

    @cached_property
    def vertices(self) -> np.ndarray:
        """(T,V,3) camera frame."""
        return self._moved(self._posed.vertices)

    @cached_property
    def joints(self) -> np.ndarray:
        """(T,29,3) camera frame."""
        return self._moved(self._posed.joints29)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        homogeneous = points @ self.intrinsics.T
        return homogeneous[..., :2] / homogeneous[..., 2:]

    @property
    def root_in_camera(self) -> np.ndarray:
        """(T,3) axis-angle of the root in the camera."""
        turn = Rotation.from_matrix(self.camera[:, :3, :3]) * Rotation.from_rotvec(self.pose[:, 0])
        return turn.as_rotvec()

    @property
    def pose_in_camera(self) -> np.ndarray:
        return np.concatenate([self.root_in_camera[:, None], self.pose[:, 1:]], 1)

    @property
    def trans_in_camera(self) -> np.ndarray:
        """(T,3): the pelvis in the camera less the rest pelvis."""
        with torch.no_grad():
            rest = self.body.rest_joints(torch.from_numpy(self.betas).float()[None])[0, 0].numpy()
        return self.joints[:, 0] - rest

    @cached_property
    def masks(self) -> list[np.ndarray]:
        """T of (H,W) bool: where the person shows."""
        faces = np.ascontiguousarray(self.body.faces.numpy(), np.int32)
        shown = []
        for vertices in self.vertices:
            points = np.concatenate([self.pixels(vertices), vertices[:, 2:]], 1).astype(np.float32)
            shown.append(rasterize(points, faces, *self.size).face >= 0)
        return shown

    @cached_property
    def images(self) -> list[np.ndarray]:
        """T of (H,W,3) uint8 RGB: a green person before dark blue."""
        return [np.where(mask[..., None], GREEN, DARK).astype(np.uint8) for mask in self.masks]

    @cached_property
    def boxes(self) -> np.ndarray:
        """(T,4) x0 y0 x1 y1 of the mesh."""
        pixels = self.pixels(self.vertices)
        return np.concatenate([pixels.min(1), pixels.max(1)], 1)


def take(
    body: BodyModel,
    frames: int = 4,
    seed: int = 0,
    up: str = "y",
    size: tuple[int, int] = (320, 240),
    still: bool = False,
) -> Take:
    """Somebody who moves and turns before a camera that does as well, unless it is `still`; the world has `up` up."""
    rng = np.random.default_rng(seed)
    pose = rng.normal(0, 0.2, (frames, 24, 3)) * np.linspace(0.8, 1, frames)[:, None, None]
    heading = Rotation.from_euler("y", (0.8 + 0.3 * np.arange(frames))[:, None])
    trans = np.array([0.2, 0.1, -0.3]) + 0.05 * np.arange(frames)[:, None] * [1, 0, 0.5]
    # a camera 3.5 m away: OpenCV's axes, x right, y down
    sway = 0.0 if still else 0.1
    turn = Rotation.from_euler("yx", np.stack([0.4 + sway * np.arange(frames), np.full(frames, 0.15)], 1))
    flip = Rotation.from_euler("x", np.pi)
    camera = np.tile(np.eye(4), (frames, 1, 1))
    camera[:, :3, :3] = (flip * turn).as_matrix()
    camera[:, :3, 3] = np.array([0.1, -0.1, 3.5]) - np.einsum("tij,j->ti", camera[:, :3, :3], [0.25, 0.1, -0.2])
    if up == "z":  # the same scene, its world turned
        z_from_y = Rotation.from_euler("x", np.pi / 2)
        with torch.no_grad():
            betas = torch.zeros(1, 10)
            rest = body.rest_joints(betas)[0, 0].numpy().astype(np.float64)
        heading = z_from_y * heading
        trans = z_from_y.apply(rest + trans) - rest
        camera[:, :3, :3] = camera[:, :3, :3] @ z_from_y.as_matrix().T
    pose[:, 0] = heading.as_rotvec()
    focal = 1.25 * min(size)
    intrinsics = np.array([[focal, 0, size[0] / 2 + 7.5], [0, 1.02 * focal, size[1] / 2 - 4.25], [0, 0, 1]])
    betas = np.zeros(10) if up == "z" else rng.normal(0, 1, 10)
    return Take(body, pose, trans, betas, camera, intrinsics, size)


def write_picture(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [cv2.IMWRITE_JPEG_QUALITY, 97] if path.suffix == ".jpg" else []
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)


def write_pickle(path: Path, content: object, protocol: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


# ---- 3DPW and EMDB --------------------------------------------------------------------------------------------------


def write_threedpw(root: Path, people: list[Take], genders: list[str], valid: np.ndarray, **changes: object) -> None:
    """Two people before one camera; Python 2's pickle."""
    first = people[0]
    labels = {
        "sequence": "downtown_test_00",
        "genders": genders,
        "betas": [np.append(t.betas, [0.0] * 2) for t in people],
        "poses": [t.pose.reshape(len(t), 72) for t in people],
        "trans": [t.trans for t in people],
        "poses_60Hz": [np.zeros((2 * len(t), 72)) for t in people],
        "campose_valid": list(valid),
        "cam_poses": first.camera,
        "cam_intrinsics": first.intrinsics,
        "img_frame_ids": 2 * np.arange(len(first)),
        **changes,
    }
    write_pickle(root / "sequenceFiles/test/downtown_test_00.pkl", labels, protocol=2)
    for i in range(len(first)):
        image = first.images[i].copy()
        for other in people[1:]:
            image[other.masks[i]] = (220, 40, 40)
        write_picture(root / f"imageFiles/downtown_test_00/image_{i:05d}.jpg", image)


def write_emdb(root: Path, made: Take, name: str = "09_outdoor_walk", **changes: object) -> None:
    folder = root / "P0" / name
    labels = {
        "gender": "female",
        "name": name,
        "emdb1": True,
        "emdb2": False,
        "n_frames": len(made),
        "good_frames_mask": np.ones(len(made), bool),
        "camera": {
            "intrinsics": made.intrinsics, "extrinsics": made.camera, "width": made.size[0], "height": made.size[1],
        },
        "smpl": {
            "poses_root": made.pose[:, 0].astype(np.float32),
            "poses_body": made.pose[:, 1:].reshape(len(made), 69).astype(np.float32),
            "trans": made.trans,
            "betas": made.betas,
        },
        "kp2d": np.zeros((len(made), 24, 2)),
        "bboxes": {"bboxes": made.boxes, "invalid_idxs": np.array([], np.int64)},
        **changes,
    }  # fmt: skip
    write_pickle(folder / f"P0_{name}_data.pkl", labels, protocol=pickle.HIGHEST_PROTOCOL)
    for i, image in enumerate(made.images):
        write_picture(folder / f"images/{i:05d}.jpg", image)


# ---- BEDLAM, CameraHMR ----------------------------------------------------------------------------------------------


def bedlam_labels(made: Take, names: list[str], sub: str = "rp_aaron_posed_002", **changes: object) -> dict:
    center, side = (made.boxes[:, :2] + made.boxes[:, 2:]) / 2, (made.boxes[:, 2:] - made.boxes[:, :2]).max(1)
    shift = np.array([0.3, -0.2, 0.5])  # `trans_cam` and `cam_ext` share the place between them
    ext = np.tile(np.eye(4), (len(made), 1, 1))
    ext[:, :3, 3] = shift
    return {
        "imgname": np.array(names),
        "center": center,
        "scale": 1.2 * side / 200,
        "pose_cam": made.pose_in_camera.reshape(len(made), 72),
        "pose_world": made.pose.reshape(len(made), 72),
        "shape": np.tile(made.betas, (len(made), 1)),
        "trans_cam": made.trans_in_camera - shift,
        "trans_world": made.trans,
        "gtkps": made.pixels(made.joints)[:, :24],
        "cam_int": np.tile(made.intrinsics, (len(made), 1, 1)),
        "cam_ext": ext,
        "gender": np.array(["neutral"] * len(made)),
        "sub": np.array([sub] * len(made)),
        **changes,
    }


def write_bedlam(
    root: Path, scene: str, made: Take, step: int = 5, with_masks: bool = False, **changes: object
) -> None:
    """One person's track; the pictures of closeups lie on their side on the disk."""
    lying = "closeup" in scene or "portrait" in scene
    stems = [f"seq_000000/seq_000000_{step * i:04d}" for i in range(len(made))]
    labels = bedlam_labels(made, [f"{stem}.png" for stem in stems], **changes)
    (root / "labels").mkdir(parents=True, exist_ok=True)
    np.savez(root / f"labels/{scene}.npz", **labels)
    for stem, image, mask in zip(stems, made.images, made.masks, strict=True):
        write_picture(root / f"images/{scene}/png/{stem}.png", np.rot90(image) if lying else image)
        if with_masks:
            other = np.zeros_like(mask)
            other[:20, :20] = True
            low = np.arange(mask.shape[0])[:, None] > mask.shape[0] // 2
            for name, shown in (("00_body", other), ("01_body", mask & low), ("01_clothing", mask & ~low)):
                layer = np.repeat(255 * shown[..., None].astype(np.uint8), 3, 2)
                write_picture(root / f"masks/{scene}/{stem}_{name}.png", np.rot90(layer) if lying else layer)


def write_camerahmr(root: Path, made: Take, **changes: object) -> None:
    """Pictures that have nothing to do with one another, in names and order of COCO's kind."""
    names = [f"a/{len(made) - i}.jpg" for i in range(len(made))]
    labels = bedlam_labels(made, names, trans_cam=made.trans_in_camera, **changes)
    (root / "labels").mkdir(parents=True)
    np.savez(root / "labels/coco-release.npz", **{k: v for k, v in labels.items() if k not in ("cam_ext", "sub")})
    for name, image in zip(names, made.images, strict=True):
        write_picture(root / "images/coco" / name, image)


# ---- 4D-Humans ------------------------------------------------------------------------------------------------------


def hmr2_person(made: Take, frame: int = 0, **changes: object) -> dict:
    """44 keypoints: those of OpenPose that are SMPL's joints, and LSP's right ankle."""
    points, places = np.zeros((44, 3), np.float32), np.zeros((44, 4), np.float32)
    pixels = made.pixels(made.joints)[frame]
    for theirs, ours in {8: 0, 1: 12, 12: 1, 9: 2, 13: 4, 10: 5, 14: 7, 5: 16, 2: 17, 25: 8}.items():
        points[theirs] = [*pixels[ours], 0.9]
        places[theirs] = [*(made.joints[frame, ours] - made.joints[frame, 0]), 1]
    x0, y0, x1, y1 = made.boxes[frame]
    return {
        "keypoints_2d": points,
        "keypoints_3d": places,
        "center": np.array([(x0 + x1) / 2, (y0 + y1) / 2]),
        "scale": np.array([x1 - x0, y1 - y0]) * 1.2 / 200,
        "body_pose": made.pose_in_camera[frame].reshape(72),
        "betas": made.betas,
        "has_body_pose": np.array(1.0),
        "has_betas": np.array(1.0),
        "personid": 0,
        "extra_info": {},
        **changes,
    }


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def hmr2_members(key: str, made: Take, frame: int, people: list[dict], with_masks: bool = True) -> dict[str, bytes]:
    image = cv2.imencode(".jpg", cv2.cvtColor(made.images[frame], cv2.COLOR_RGB2BGR))[1].tobytes()
    members = {f"{key}.jpg": image, f"{key}.data.pyd": pickle.dumps(people)}
    if with_masks:
        other = np.zeros_like(made.masks[frame])
        left = int(made.boxes[frame, 0])
        other[100:150, left - 12 : left - 2] = True
        content = io.BytesIO()
        np.savez_compressed(content, masks=np.stack([other, made.masks[frame]]))
        members[f"{key}.detection.npz"] = content.getvalue()
    return members


# ---- AMASS ----------------------------------------------------------------------------------------------------------


def write_amass(path: Path, made: Take, fps: float = 120.0) -> None:
    """SMPL-H's layout: SMPL's hands are the index fingers' first joints."""
    poses = np.zeros((len(made), 52, 3))
    poses[:, :22], poses[:, 22], poses[:, 37] = made.pose[:, :22], made.pose[:, 22], made.pose[:, 23]
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = {"trans": made.trans, "mocap_framerate": fps, "gender": b"male", "betas": np.zeros(16)}
    np.savez(path, poses=poses.reshape(len(made), 156), **labels)


# ---- Human3.6M, MPI-INF-3DHP ----------------------------------------------------------------------------------------


def coco(names: list[str], made: Take, about: list[dict] | None = None, **labels: np.ndarray) -> dict:
    """COCO's layout: `labels` hold a row a picture."""
    boxes = np.concatenate([made.boxes[:, :2], made.boxes[:, 2:] - made.boxes[:, :2]], 1)
    images = [
        {"id": 100 + i, "file_name": name, "width": made.size[0], "height": made.size[1], **(about[i] if about else {})}
        for i, name in enumerate(names)
    ]
    annotations = [
        {"id": i, "image_id": 100 + i, "bbox": boxes[i].tolist(), **{k: v[i] for k, v in labels.items()}}
        for i in range(len(names))
    ]
    return {"images": images, "annotations": annotations}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, default=lambda array: np.asarray(array).tolist()))


def calibration(made: Take) -> dict:
    """H36M's camera: millimetres; the world's metres times 1000."""
    focal = [made.intrinsics[0, 0], made.intrinsics[1, 1]]
    camera = made.camera[0]
    return {"R": camera[:3, :3], "t": 1000 * camera[:3, 3], "f": focal, "c": made.intrinsics[:2, 2]}


def fits(made: Take) -> dict:
    return {
        str(i): {"pose": made.pose[i].reshape(72), "shape": made.betas, "trans": made.trans[i]}
        for i in range(len(made))
    }


def write_h36m_hybrik(root: Path, made: Take, joints: int = 29, split: str = "train", **changes: np.ndarray) -> None:
    folder = f"s_{'01' if split == 'train' else '09'}_act_02_subact_01_ca_01"
    names = [f"{folder}/{folder}_{5 * i + 1:06d}.jpg" for i in range(len(made))]
    camera = calibration(made)
    labels = {
        "cam_param": [{"f": camera["f"], "c": camera["c"]}] * len(made),
        "smpl_joints": 1000 * made.joints[:, :joints],
        "h36m_joints": np.zeros((len(made), 17, 3)),
        "betas": np.tile(made.betas, (len(made), 1)),
        "thetas": made.pose_in_camera,
        "root_coord": 1000 * made.joints[:, 0],
        **changes,
    }
    write_json(root / f"annotations/Sample_5_{split}_Human36M_smpl.json", coco(names, made, **labels))
    for name, image in zip(names, made.images, strict=True):
        write_picture(root / "images" / name, image)


def write_h36m_neural_annot(root: Path, made: Take) -> None:
    folder = "s_01_act_02_subact_01_ca_03"
    names = [f"{folder}/{folder}_{i + 1:06d}.jpg" for i in range(len(made))]
    about = [
        {"subject": 1, "action_idx": 2, "subaction_idx": 1, "cam_idx": 3, "frame_idx": i} for i in range(len(made))
    ]
    stem = root / "annotations/Human36M_subject1"
    write_json(Path(f"{stem}_data.json"), coco(names, made, about))
    write_json(Path(f"{stem}_camera.json"), {"3": calibration(made)})
    write_json(Path(f"{stem}_SMPL_NeuralAnnot.json"), {"2": {"1": fits(made)}})
    for name, image in zip(names, made.images, strict=True):
        write_picture(root / "images" / name, image)


def write_3dhp_neural_annot(root: Path, made: Take) -> None:
    names = [f"S1_Seq2_V4/img_S1_Seq2_V4_{i:06d}.jpg" for i in range(len(made))]
    about = [{"subject_idx": 1, "seq_idx": 2, "cam_idx": 4, "frame_idx": i} for i in range(len(made))]
    folder = root / "annotations"
    write_json(folder / "MPI-INF-3DHP_1k.json", coco(names, made, about))
    write_json(folder / "MPI-INF-3DHP_camera_1k.json", {"1": {"2": {"4": calibration(made)}}})
    write_json(folder / "MPI-INF-3DHP_SMPL_NeuralAnnot.json", {"1": {"2": fits(made)}})
    for name, image in zip(names, made.images, strict=True):
        write_picture(root / "images" / name, image)


#: 3DHP's 28 joints <- ours, where they are SMPL's
OURS_OF_3DHP = {4: 0, 9: 16, 10: 18, 11: 20, 14: 17, 15: 19, 16: 21, 18: 1, 19: 4, 20: 7, 23: 2, 24: 5, 25: 8, 7: 24}


def joints_3dhp(made: Take) -> np.ndarray:
    """(T,28,3) metres."""
    joints = np.full((len(made), 28, 3), 3.0)
    for theirs, ours in OURS_OF_3DHP.items():
        joints[:, theirs] = made.joints[:, ours]
    return joints


def write_3dhp_hybrik(root: Path, made: Take) -> None:
    names = [f"S2/Seq1/img_S2_Seq1_V0_{i + 1:06d}.jpg" for i in range(len(made))]
    labels = {
        "keypoints_cam": 1000 * joints_3dhp(made),
        "cam_param": [{"intrinsic_param": made.intrinsics}] * len(made),
    }
    write_json(root / "annotations/annotation_mpi_inf_3dhp_train_v2.json", coco(names, made, **labels))
    for name, image in zip(names, made.images, strict=True):
        write_picture(root / "images" / name, image)


def write_3dhp_raw(root: Path, made: Take) -> None:
    """Two cameras, of which one has pictures."""
    folder = root / "S1/Seq1"
    joints = joints_3dhp(made)
    cells = {name: np.empty((2, 1), object) for name in ("annot2", "annot3")}
    for camera in range(2):
        cells["annot2"][camera, 0] = made.pixels(joints).reshape(len(made), 56)
        cells["annot3"][camera, 0] = 1000 * joints.reshape(len(made), 84)
    folder.mkdir(parents=True)
    scipy.io.savemat(folder / "annot.mat", cells)
    matrix = np.eye(4)
    matrix[:3, :3] = made.intrinsics
    lines = ["Skeletool Camera Calibration File V1.0"]
    for camera in range(2):
        lines += [f"name          {camera}", "  intrinsic   " + " ".join(map(repr, matrix.ravel().tolist()))]
    (folder / "camera.calibration").write_text("\n".join(lines))
    for i, image in enumerate(made.images):
        write_picture(folder / f"imageFrames/video_1/frame_{i + 1:06d}.jpg", image)


def write_3dhp_spin(root: Path, made: Take) -> None:
    """Rows of which the second has no SMPL."""
    places = np.zeros((len(made), 24, 4))
    for ours, (theirs,) in FROM_24.items():
        places[:, theirs, :3], places[:, theirs, 3] = made.joints[:, JOINT_INDEX[ours]], 1
    names = [f"S1/Seq1/frame_{i + 1:06d}.jpg" for i in range(len(made))]
    (root / "annotations").mkdir(parents=True)
    np.savez(
        root / "annotations/mpi_inf_3dhp_train.npz",
        imgname=np.array(names),
        center=(made.boxes[:, :2] + made.boxes[:, 2:]) / 2,
        scale=1.2 * (made.boxes[:, 2:] - made.boxes[:, :2]).max(1) / 200,
        S=places,
        pose=made.pose_in_camera.reshape(len(made), 72),
        shape=np.tile(made.betas, (len(made), 1)),
        has_smpl=np.arange(len(made)) != 1,
    )
    for name, image in zip(names, made.images, strict=True):
        write_picture(root / "images" / name, image)
