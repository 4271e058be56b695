"""Pipeline: a video's frames and person masks in, the person's motion out, for any number of frames.

Crops are cut as training cuts them, the encoder sees them in batches, the decoder (if there is one) refines their
features over time, and the body is placed in the full image's camera. Frames and masks are read once, in order, a batch
at a time: neither need fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fasthmr.body import BodyModel, load_body, require_same_body
from fasthmr.checkpoint import encoder_id, load_pipeline_parts, require_same_encoder
from fasthmr.conventions import CROP_PX, MASK_BACKGROUND, MASK_SUBJECT, NUM_BETAS, NUM_JOINTS
from fasthmr.data.crops import CROP_SCALE, cut_image, cut_mask, normalised
from fasthmr.data.letterbox import letterboxed
from fasthmr.geometry.boxes import crop_affine
from fasthmr.geometry.cameras import box_info, focal_of_fov, full_image_translation
from fasthmr.models.diffusion_decoder import DiffusionDecoder
from fasthmr.models.hmr import HMR
from fasthmr.models.human_fov import HumanFoV
from fasthmr.precision import PrecisionChoice, autocast, require_precision
from fasthmr.sequence import Decoder, SequenceConfig, fill_linear, fill_rotations, refine
from fasthmr.video.person import SquareBox, person_frames


@dataclass(frozen=True)
class PipelineConfig:
    """How a pipeline runs.

    Args:
        precision: of the encoder: "bf16", "32", or "auto" (bf16 where the device has instructions for it); the decoder
            and the body compute in float32.
        batch: frames that the encoder sees at a time.
        average_betas: average the shape over the frames of a sequence (FastHMR, Sec. 4.1).
        mask_people: whose tokens merging protects: the tracked person's ("subject"), or those of "all".
        least_person_px: a frame whose mask has fewer pixels of the person is a gap; training's clips set it alike.
        box_smoothing: standard deviation, in frames, of the Gaussian that boxes made from masks are smoothed with;
            training's boxes were smoothed with the default. Boxes that are given are taken as they are.
        sequence: windows, gaps and denoising steps.

    Raises:
        ValueError: a value that cannot be; names it.
    """

    precision: PrecisionChoice = "auto"
    batch: int = 32
    average_betas: bool = True
    mask_people: Literal["subject", "all"] = "subject"
    least_person_px: int = 16
    box_smoothing: float = 1.5
    sequence: SequenceConfig = field(default_factory=SequenceConfig)

    def __post_init__(self) -> None:
        require_precision(self.precision)
        if self.mask_people not in ("subject", "all"):
            raise ValueError(f"mask_people must be one of subject, all, got {self.mask_people!r}")
        for name in ("batch", "least_person_px"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.box_smoothing < math.inf:
            raise ValueError(f"box_smoothing must be 0 frames or more, got {self.box_smoothing}")


class EncodedSequence(NamedTuple):
    """What the encoder says about T frames, on the CPU, and where it looked. Frames that are not valid hold zeros.

    Attributes:
        features: (T, D) for the decoder.
        rotations: (T, 24, 3, 3), betas: (T, 10), camera: (T, 3), as of `HMROutput`.
        box_center: (T, 2), box_size: (T,) of the network's square crop, px of the full image.
        valid: (T,) bool, frames that show the person.
        image_size: (2,) width and height of the full image, px.
    """

    features: Tensor
    rotations: Tensor
    betas: Tensor
    camera: Tensor
    box_center: Tensor
    box_size: Tensor
    valid: Tensor
    image_size: Tensor


@dataclass(frozen=True)
class MotionEstimate:
    """The motion of one person in T frames, in the full image's camera (x right, y down, z forward, metres).

    Attributes:
        rotations: (T, 24, 3, 3) relative to the parents; the root's in the camera frame.
        betas: (T, 10); equal in all frames if they were averaged.
        camera: (T, 3) = (s, tx, ty) of the crop.
        translation: (T, 3): the pelvis is at the rest pelvis + translation.
        interpolated: (T,) bool, frames in which the person was not seen: everything there is made from other frames.
        box_center: (T, 2), box_size: (T,) of the network's square crop, px.
        intrinsics: (3, 3) of the full image, px.
        image_size: (2,) width and height, px.
        fps: frames a second.
        body: `BodyModel.id` of the body that pose and shape belong to.
    """

    rotations: Tensor
    betas: Tensor
    camera: Tensor
    translation: Tensor
    interpolated: Tensor
    box_center: Tensor
    box_size: Tensor
    intrinsics: Tensor
    image_size: Tensor
    fps: float
    body: str

    def __len__(self) -> int:
        return len(self.rotations)


class Pipeline:
    """Encoder, decoder and body, put together.

    Args:
        hmr: the encoder; put into evaluation mode.
        decoder: trained on this encoder's features; None gives the encoder's own poses.
        body: of both.
        config: how it runs.

    Raises:
        ValueError: the decoder takes features of another width than the encoder's.
        EncoderMismatchError: it was trained on another encoder's features.
    """

    def __init__(
        self, hmr: HMR, decoder: Decoder | None, body: BodyModel, config: PipelineConfig | None = None
    ) -> None:
        if decoder is not None:
            width = decoder.encoder_dim if isinstance(decoder, DiffusionDecoder) else decoder.feature_dim
            if width != hmr.config.head_dim:
                raise ValueError(
                    f"the decoder takes features of width {width}, the encoder gives {hmr.config.head_dim}"
                )
        if isinstance(decoder, DiffusionDecoder):
            require_same_encoder(encoder_id(hmr), decoder.encoder, where="the decoder")
        self.hmr, self.decoder, self.body = hmr.eval(), decoder, body
        self.config = config if config is not None else PipelineConfig()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.hmr.smpl_head.init_cam.device

    def to(self, device: torch.device | str) -> Pipeline:
        """Move the networks and the body, in place."""
        for module in (self.hmr, self.decoder, self.body):
            if isinstance(module, torch.nn.Module):
                module.to(device)
        return self

    def __call__(
        self,
        frames: Iterable[np.ndarray],
        person_masks: Iterable[np.ndarray],
        boxes: ArrayLike | None = None,
        fps: float = 30.0,
        intrinsics: ArrayLike | None = None,
        subject: int = MASK_SUBJECT,
    ) -> MotionEstimate:
        """The motion of one person.

        Args:
            frames, person_masks, boxes, subject: as for `encode`.
            fps: frames a second; only noted.
            intrinsics: (3, 3) of the full image, px, without skew; None: a pinhole at the image's centre with the
                image's diagonal as focal length (a field of view of 53 degrees along it). A wrong focal length moves
                the body along the line of sight, and hardly changes where it is seen. CameraHMR's pose depends on it:
                `estimate_intrinsics` is better than None there.

        Raises:
            ValueError: input that cannot be; says what, and in which frame.
        """
        if not 0 < fps < math.inf:
            raise ValueError(f"fps must be positive, got {fps}")
        lens = None if intrinsics is None else _checked_intrinsics(intrinsics)
        seen = self.encode(frames, person_masks, boxes, subject, lens)
        if lens is None:
            lens = default_intrinsics(seen.image_size)
        return self.estimate(seen, lens, fps)

    @torch.no_grad()
    def encode(
        self,
        frames: Iterable[np.ndarray],
        person_masks: Iterable[np.ndarray],
        boxes: ArrayLike | None = None,
        subject: int = MASK_SUBJECT,
        intrinsics: Tensor | None = None,
    ) -> EncodedSequence:
        """The encoder's output for every frame that shows the person.

        Args:
            frames: T full images (H, W, 3) uint8 RGB of one size, an array or anything that yields them.
            person_masks: T masks (H, W) in step with them: bool, True on the person; or whole numbers, instance
                labels, 0 for background.
            boxes: (T, 4) the person's tight box x0, y0, x1, y1, px; NaN where there is none. None: the tight box of
                each mask, smoothed over time.
            subject: the person's label in masks of labels; other labels are other people.
            intrinsics: (3, 3) of the full image, px, which CameraHMR is told; None: as for a call.

        Raises:
            ValueError: frames, masks or boxes of different numbers, sizes or types, no frame that shows the person, or
                features that are not finite.
        """
        rows: list[Tensor] = []
        places: list[SquareBox] = []
        valid: list[bool] = []
        crops: list[tuple[np.ndarray, np.ndarray]] = []
        size = (0, 0)
        config = self.config
        for seen in person_frames(frames, person_masks, boxes, subject, config.least_person_px, config.box_smoothing):
            size = seen.image.shape[1::-1]
            valid.append(seen.box is not None)
            if seen.box is not None:
                places.append(seen.box)
                crops.append(_cut(seen.image, seen.mask, seen.box))
            if len(crops) == self.config.batch:
                rows.append(self._encode_crops(crops, _box_info(places[-len(crops) :], size, intrinsics)))
                crops = []
        if crops:
            rows.append(self._encode_crops(crops, _box_info(places[-len(crops) :], size, intrinsics)))
        if not rows:
            if not valid:
                raise ValueError("there are no frames")
            raise ValueError(
                f"none of the {len(valid)} frames shows the person: their masks have fewer than "
                f"{self.config.least_person_px} pixels labelled {subject}"
            )
        return _sequence(torch.cat(rows), torch.tensor(places), torch.tensor(valid), torch.tensor(size))

    @torch.no_grad()
    def estimate(self, seen: EncodedSequence, intrinsics: Tensor, fps: float) -> MotionEstimate:
        """Refine what the encoder saw, bridge gaps, and place the body in the full image's camera."""
        betas, camera, center = (fill_linear(t, seen.valid) for t in (seen.betas, seen.camera, seen.box_center))
        size = fill_linear(seen.box_size[:, None], seen.valid)[:, 0]
        if self.config.average_betas:
            betas = seen.betas[seen.valid].mean(0).expand(len(betas), -1).clone()
        # Full images are usually centred on their principal point, and the function halves a size to find it.
        twice_center = 2 * intrinsics[:2, 2]
        focal_px = float(intrinsics.diagonal()[:2].mean())
        return MotionEstimate(
            rotations=self.refine(seen.features, seen.rotations, betas, seen.valid).cpu(),
            betas=betas,
            camera=camera,
            translation=full_image_translation(camera, center, size, twice_center, focal_px),
            interpolated=~seen.valid,
            box_center=center,
            box_size=size,
            intrinsics=intrinsics,
            image_size=seen.image_size,
            fps=fps,
            body=self.body.id,
        )

    @torch.no_grad()
    def refine(self, features: Tensor, rotations: Tensor, betas: Tensor, valid: Tensor | None = None) -> Tensor:
        """From the encoder's output for T frames to the motion's rotations, on the networks' device.

        Args:
            features: (T, D).
            rotations: (T, 24, 3, 3) the encoder's own, which are the result where there is no decoder.
            betas: (T, 10), averaged or not.
            valid: (T,) bool, frames that show the person; None: all. Others are interpolated.

        Returns:
            (T, 24, 3, 3).

        Raises:
            ValueError: as `fasthmr.sequence.refine`.
        """
        valid = torch.ones(len(features), dtype=torch.bool) if valid is None else valid
        features, rotations, betas, valid = (t.to(self.device) for t in (features, rotations, betas, valid))
        if self.decoder is None:
            return fill_rotations(rotations, valid)
        if isinstance(self.decoder, DiffusionDecoder):
            features = self.decoder.conditions(features, rotations, betas, self.body)
        return refine(self.decoder, self.body, features, betas, valid, self.config.sequence)

    def _encode_crops(self, crops: list[tuple[np.ndarray, np.ndarray]], where: Tensor) -> Tensor:
        """(N, D + 216 + 10 + 3): feature, rotations, betas and camera of each crop, on the CPU."""
        images = torch.from_numpy(np.stack([image for image, _ in crops])).to(self.device)
        labels = torch.from_numpy(np.stack([mask for _, mask in crops])).to(self.device)
        person = labels == MASK_SUBJECT if self.config.mask_people == "subject" else labels != MASK_BACKGROUND
        with autocast(self.config.precision, self.device):
            output = self.hmr(normalised(images), person_mask=person, box_info=where.to(self.device))
        parts = (output.feature, output.rotations.flatten(1), output.betas, output.camera)
        rows = torch.cat([part.float() for part in parts], dim=1).cpu()
        if not rows.isfinite().all():
            raise ValueError("the encoder gave numbers that are not finite: its weights are damaged")
        return rows


def load_pipeline(path: str | Path, body: str | BodyModel = "free", config: PipelineConfig | None = None) -> Pipeline:
    """The pipeline of a checkpoint, on the CPU: of a pipeline's file, or of an encoder's checkpoint without a decoder.

    Args:
        path: of the checkpoint, or `ENCODER+DECODER`.
        body: that it was trained with: "free", the path of a body file, or the body itself.
        config: how it runs.

    Raises:
        FileNotFoundError, CheckpointError: as `fasthmr.checkpoint.load_pipeline_parts`.
        BodyMismatchError: it was trained with another body.
    """
    body = body if isinstance(body, BodyModel) else load_body(body)
    hmr, decoder, body_id = load_pipeline_parts(path)
    require_same_body(body.id, body_id, where=str(path))
    return Pipeline(hmr, decoder, body, config)


def default_intrinsics(image_size: ArrayLike) -> Tensor:
    """(3, 3) of a pinhole at the centre of an image of (width, height) px, its focal length the image's diagonal."""
    width, height = (float(v) for v in np.asarray(image_size))
    focal_px = math.hypot(width, height)
    return torch.tensor([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])


@torch.no_grad()
def estimate_intrinsics(fov: HumanFoV, frames: Iterable[np.ndarray]) -> Tensor:
    """(3, 3) of a pinhole at the centre of a video's frames, px, with the field of view that HumanFoV sees in them.

    Args:
        fov: the network, in evaluation mode.
        frames: some of the video's, (H, W, 3) uint8 RGB of one size; the median over them counts, since a video has
            one lens, and people who come and go should not zoom it.

    Raises:
        ValueError: no frames, or frames of several sizes.
    """
    device = fov.fc3.weight.device
    angles, sizes = [], set()
    for frame in frames:
        picture = torch.from_numpy(letterboxed(frame)).permute(2, 0, 1)[None].to(device)
        angles.append(fov(normalised(picture)).cpu())
        sizes.add(frame.shape[1::-1])
    if len(sizes) != 1:
        raise ValueError(f"intrinsics are estimated from frames of one size, got {sorted(sizes) or 'no frames'}")
    ((width, height),) = sizes
    focal_px = float(focal_of_fov(torch.cat(angles).median(), height))
    return torch.tensor([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])


def _box_info(boxes: list[SquareBox], image_size: tuple[int, int], intrinsics: Tensor | None) -> Tensor:
    """What CameraHMR is told about the crops around some boxes: (N, 3)."""
    lens = default_intrinsics(image_size) if intrinsics is None else intrinsics
    size = torch.tensor(image_size, dtype=torch.float32)
    return box_info(*_network_box(torch.tensor(boxes)), size, float(lens[0, 0]))


def _cut(image: np.ndarray, labels: np.ndarray, box: SquareBox) -> tuple[np.ndarray, np.ndarray]:
    """The network's crop of a frame and of its mask, cut as `fasthmr.data.transforms.make_sample` cuts them."""
    affine = crop_affine(*_network_box(torch.tensor([box])), CROP_PX)[0]
    crop, mask = np.empty((3, CROP_PX, CROP_PX), np.uint8), np.empty((CROP_PX, CROP_PX), np.uint8)
    cut_image(image, affine, crop)
    cut_mask(labels, affine, mask)
    return crop, mask


def _network_box(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (N, 2) and sides (N,) of the network's crops around people's square boxes (N, 3)."""
    boxes = boxes.double()
    return boxes[:, :2].float(), (boxes[:, 2] * CROP_SCALE).float()


def _sequence(rows: Tensor, boxes: Tensor, valid: Tensor, image_size: Tensor) -> EncodedSequence:
    """Rows of the frames that show the person, spread over all frames."""
    center, size = _network_box(boxes)
    width = rows.shape[1] - NUM_JOINTS * 9 - NUM_BETAS - 3
    features, rotations, betas, camera = rows.split((width, NUM_JOINTS * 9, NUM_BETAS, 3), dim=1)

    def spread(values: Tensor) -> Tensor:
        full = values.new_zeros(len(valid), *values.shape[1:])
        full[valid] = values
        return full

    return EncodedSequence(
        features=spread(features),
        rotations=spread(rotations.unflatten(1, (NUM_JOINTS, 3, 3))),
        betas=spread(betas),
        camera=spread(camera),
        box_center=spread(center),
        box_size=spread(size),
        valid=valid,
        image_size=image_size,
    )


def _checked_intrinsics(intrinsics: ArrayLike) -> Tensor:
    lens = torch.as_tensor(np.asarray(intrinsics), dtype=torch.float32)
    if lens.shape != (3, 3) or not lens.isfinite().all():
        raise ValueError(f"intrinsics must be a finite (3, 3) matrix, got {np.asarray(intrinsics).tolist()}")
    if not (lens.diagonal() > 0).all() or lens[0, 1] or lens[1, 0] or lens[2].tolist() != [0, 0, 1]:
        raise ValueError(f"intrinsics must be [[f, 0, cx], [0, f, cy], [0, 0, 1]], got {lens.tolist()}")
    return lens
