"""Cameras: from the network's weak-perspective camera to a translation, and from 3D points to pixels.

Convention: the camera frame is OpenCV's (x right, y down, z forward, metres); pixels go right and down. The network
predicts `camera = (s, tx, ty)` of its square crop: s scales, and (tx, ty) move the body in metres.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasthmr.conventions import CROP_FOCAL_PX, CROP_PX

#: as the originals do, added to the divisor so that a scale of exactly 0 gives a far but finite camera.
_SCALE_EPS = 1e-9


def crop_camera_translation(camera: Tensor, focal_px: float = CROP_FOCAL_PX, crop_px: float = CROP_PX) -> Tensor:
    """Translation that puts the body in front of the crop's own camera (`4D-Humans/hmr2/models/hmr2.py`).

    At depth tz one metre is focal/tz pixels; s says that it is s times half a crop: tz = 2 focal / (crop s).
    A worked number: camera (1, 0, 0) gives (0, 0, 39.0625).

    Args:
        camera: (..., 3) = (s, tx, ty).
        focal_px: focal length that the crop is taken to have.
        crop_px: side of the square crop.

    Returns:
        (..., 3) metres, to be added to points centred on the body.
    """
    scale, tx, ty = _unbind_camera(camera)
    return torch.stack((tx, ty, 2 * focal_px / (crop_px * scale + _SCALE_EPS)), dim=-1)


def full_image_translation(
    camera: Tensor, box_center: Tensor, box_size: Tensor, image_size: Tensor, focal_px: Tensor | float
) -> Tensor:
    """Translation that puts the body in front of the full image's camera, whose principal point is the image's centre.

    The same function of HMR2.0's `cam_crop_to_full` and CameraHMR's `convert_to_full_img_cam`: the crop's half side
    takes the place of the crop camera's, and the box's offset from the image centre adds to the translation.

    Args:
        camera: (..., 3) = (s, tx, ty), predicted on the crop.
        box_center: (..., 2) px of the full image.
        box_size: (...) side of the square crop, px of the full image.
        image_size: (..., 2) width and height, px.
        focal_px: (...) or a number: focal length of the full image.

    Returns:
        (..., 3) metres.
    """
    scale, tx, ty = _unbind_camera(camera)
    scaled_size = box_size * scale + _SCALE_EPS
    offset = 2 * (box_center - image_size / 2) / scaled_size[..., None]
    return torch.stack((tx + offset[..., 0], ty + offset[..., 1], 2 * focal_px / scaled_size), dim=-1)


class Lens(NamedTuple):
    """A pinhole camera whose picture is the network's square crop.

    Attributes:
        focal_px: (...) px of the crop.
        center: (..., 2) its principal point, px of the crop.
    """

    focal_px: Tensor
    center: Tensor


def image_lens(box_center: Tensor, box_size: Tensor, intrinsics: Tensor) -> Lens:
    """The full image's lens, as the crop sees it; arguments as of `predicted_lens`."""
    scale = CROP_PX / box_size
    offset = intrinsics[..., :2, 2] - box_center
    return Lens(scale * intrinsics[..., 0, 0], CROP_PX / 2 + scale[..., None] * offset)


def predicted_lens(
    camera: Tensor, box_center: Tensor, box_size: Tensor, intrinsics: Tensor, full_image: bool
) -> tuple[Lens, Tensor]:
    """The lens that a network's prediction counts on, and where it puts the body.

    Args:
        camera: (..., 3) = (s, tx, ty), predicted on the crop.
        box_center: (..., 2) px of the full image.
        box_size: (...) side of the square crop, px of the full image.
        intrinsics: (..., 3, 3) of the full image.
        full_image: whether `camera` counts on the full image's lens, as CameraHMR's does, or on one of the crop's own,
            as HMR2.0's.

    Returns:
        The lens, and (..., 3) metres, to be added to points centred on the body.
    """
    if not full_image:
        own = Lens(torch.full_like(box_size, CROP_FOCAL_PX), torch.full_like(box_center, CROP_PX / 2))
        return own, crop_camera_translation(camera)
    focal, principal = intrinsics[..., 0, 0], intrinsics[..., :2, 2]
    translation = full_image_translation(camera, box_center, box_size, 2 * principal, focal)
    return image_lens(box_center, box_size, intrinsics), translation


def box_info(box_center: Tensor, box_size: Tensor, image_size: Tensor, focal_px: Tensor | float) -> Tensor:
    """Where a crop was, in units of the focal length: what CameraHMR's head is told
    (`CameraHMR/core/camerahmr_model.py`; its principal point is the image's centre, whatever the intrinsics say).

    Args:
        box_center: (..., 2) px of the full image.
        box_size: (...) side of the square crop, px of the full image.
        image_size: (..., 2) width and height, px.
        focal_px: (...) or a number: focal length of the full image.

    Returns:
        (..., 3): ((cx - W/2) / f, (cy - H/2) / f, size / f).
    """
    offset = box_center - image_size / 2
    pixels = torch.cat((offset, box_size[..., None]), dim=-1)
    return pixels / (focal_px[..., None] if isinstance(focal_px, Tensor) else focal_px)


def focal_of_fov(vertical_fov: Tensor, image_height: Tensor | float) -> Tensor:
    """Focal length of a picture: H / (2 tan(v / 2)), (...) px.

    A worked number: 90 degrees over 1000 px are 500 px.

    Args:
        vertical_fov: (...) radians.
        image_height: (...) or a number, px.
    """
    return image_height / (2 * (vertical_fov / 2).tan())


def project(points: Tensor, translation: Tensor | None, focal_px: Tensor | float, center_px: Tensor) -> Tensor:
    """Perspective projection of points to pixels.

    Args:
        points: (B, N, 3) metres.
        translation: (B, 3) metres, added to the points to bring them into the camera frame; None where they are in it.
        focal_px: a number, (B,), or (B, 2) for fx and fy.
        center_px: (B, 2) principal point.

    Returns:
        (B, N, 2) px. Points behind the camera (z <= 0) have no meaningful pixel; they are not treated specially.
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"points must have shape (B, N, 3), got {tuple(points.shape)}")
    if translation is not None:
        points = points + translation[:, None]
    if isinstance(focal_px, Tensor):
        focal_px = focal_px[:, None, None] if focal_px.ndim == 1 else focal_px[:, None]
    return points[..., :2] / points[..., 2:] * focal_px + center_px[:, None]


def project_into_crop(
    points: Tensor, camera: Tensor, box_center: Tensor, box_size: Tensor, intrinsics: Tensor
) -> Tensor:
    """Points through the full image's camera, in crop widths from the crop's centre.

    Args:
        points: (B, N, 3) metres, centred on the body.
        camera: (B, 3) = (s, tx, ty), predicted on the crop.
        box_center: (B, 2), box_size: (B,) of the crop, px of the full image.
        intrinsics: (B, 3, 3) of the full image, px, without skew.

    Returns:
        (B, N, 2).
    """
    focal_px, principal = intrinsics[:, 0, 0], intrinsics[:, :2, 2]
    # Full images are usually centred on their principal point, and the function halves a size to find it.
    translation = full_image_translation(camera, box_center, box_size, 2 * principal, focal_px)
    return (project(points, translation, focal_px, principal) - box_center[:, None]) / box_size[:, None, None]


def _unbind_camera(camera: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if camera.shape[-1] != 3:
        raise ValueError(f"camera must have shape (..., 3) = (s, tx, ty), got {tuple(camera.shape)}")
    scale, tx, ty = camera.unbind(-1)
    return scale, tx, ty
