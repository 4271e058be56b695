"""A contact sheet: what clips look like, with masks and joints drawn in, so that labels can be seen to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch

from fasthmr.body import BodyModel
from fasthmr.conventions import MASK_OTHER, MASK_SUBJECT, PARENTS29
from fasthmr.data.schema import Clip
from fasthmr.geometry.boxes import apply_affine
from fasthmr.geometry.rotations import axis_angle_to_matrix
from fasthmr.render.overlay import overlay_mesh

_GREEN, _RED, _YELLOW, _WHITE = (60, 230, 60), (240, 60, 60), (255, 220, 0), (255, 255, 255)
_LABEL_PX = 22  # height of the strip that a row's text stands on


def contact_sheet(
    clips: Sequence[Clip], columns: int = 6, tile_px: int = 256, bodies: Mapping[str, BodyModel] | None = None
) -> np.ndarray:
    """One row a clip, `columns` frames spread over it: (rows*tile_px, columns*tile_px, 3) uint8 RGB.

    The tracked person's mask is outlined in green, other people's in red; joints are drawn in yellow where they are
    labelled and lie in the image. With `bodies`, by gender, the labelled mesh is drawn over every second frame, where
    the labels tell all of it: it fits the person if camera and pelvis are taken as the set means them.
    """
    rows = []
    for clip in clips:
        tiles = []
        for column, frame in enumerate(np.linspace(0, len(clip) - 1, columns).astype(int)):
            image = clip.frames.decode(frame)
            if bodies is not None and column % 2 and _has_mesh(clip):
                image = draw_mesh(clip, frame, image, bodies[clip.gender])
            tiles.append(_tile(clip, frame, image, tile_px))
        rows.append(np.concatenate(tiles, 1))
    for row, clip in zip(rows, clips, strict=True):
        text = f"{clip.key}  {clip.source}"
        row[:_LABEL_PX] //= 3
        cv2.putText(row, text, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, _WHITE, 1, cv2.LINE_AA)
    return np.concatenate(rows, 0)


def draw_mesh(clip: Clip, frame: int, image: np.ndarray, body: BodyModel, opacity: float = 0.7) -> np.ndarray:
    """The labelled mesh over the stored crop (S,S,3) of a frame."""
    with torch.no_grad():
        posed = body(
            axis_angle_to_matrix(torch.from_numpy(clip.pose[frame]))[None],
            torch.from_numpy(clip.betas)[None],
            torch.from_numpy(clip.translation[frame])[None],
        )
    camera = np.vstack([clip.crop_from_image[frame], [0, 0, 1]]) @ clip.intrinsics
    vertices = posed.vertices[0].numpy() * [1, camera[1, 1] / camera[0, 0], 1]  # the rasteriser has one focal length
    middle = (float(camera[0, 2]), float(camera[1, 2]))
    return overlay_mesh(image, vertices, body.faces.numpy(), float(camera[0, 0]), middle, opacity=opacity)


def _has_mesh(clip: Clip) -> bool:
    return all(clip.status[name] != "missing" for name in ("pose", "betas", "translation", "intrinsics"))


def _tile(clip: Clip, frame: int, image: np.ndarray, tile_px: int) -> np.ndarray:
    image = image.copy()
    mask = clip.masks.decode(frame)
    for label, color in ((MASK_OTHER, _RED), (MASK_SUBJECT, _GREEN)):
        outlines, _ = cv2.findContours((mask == label).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, outlines, -1, color, 1)
    points = apply_affine(clip.crop_from_image[frame], clip.joints2d[frame, :, :2])
    seen = clip.joints2d[frame, :, 2] > 0
    for joint, parent in enumerate(PARENTS29):
        if seen[joint]:
            at = _pixel(points[joint])
            cv2.circle(image, at, 3, _YELLOW, -1, cv2.LINE_AA)
            if parent >= 0 and seen[parent]:
                cv2.line(image, at, _pixel(points[parent]), _YELLOW, 1, cv2.LINE_AA)
    return cv2.resize(image, (tile_px, tile_px), interpolation=cv2.INTER_AREA)


def _pixel(point: np.ndarray) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))
