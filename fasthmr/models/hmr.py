"""HMR: person crop in, SMPL pose, shape and camera out, frame by frame (HMR2.0's or CameraHMR's architecture)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthmr.conventions import CROP_PX, NUM_JOINTS
from fasthmr.geometry.boxes import TokenGrid
from fasthmr.geometry.rotations import rotation_6d_to_matrix
from fasthmr.merging import LayerMergePlan, MergedTokens, TokenMerging, collapse
from fasthmr.models.smpl_head import BOX_INFO_DIM, MeanParameters, SMPLHead
from fasthmr.models.vit import PATCH_PADDING_PX, ViT

#: columns cut off on each side of the square crop: people are upright, and the backbone was trained on 256 x 192.
SIDE_COLUMNS_PX = 32
#: where the 192 tokens lie in the crop (before any are merged)
TOKEN_GRID = TokenGrid(
    rows=16,
    columns=12,
    patch_px=16,
    left_px=SIDE_COLUMNS_PX - PATCH_PADDING_PX,
    top_px=-PATCH_PADDING_PX,
    crop_px=CROP_PX,
)

#: whose head: CameraHMR's is told where the crop was in the image, and how the camera sees
Architecture = Literal["hmr2", "camerahmr"]


@dataclass(frozen=True)
class HMRConfig:
    """Sizes of an `HMR`; the defaults are HMR2.0's (ViT-H, 670 M parameters).

    Args:
        architecture: "hmr2" or "camerahmr"; they differ in the head alone.
        vit_dim: width of the image tokens, a multiple of 4.
        vit_depth: layers of the backbone.
        vit_heads: attention heads of the backbone; they divide `vit_dim`.
        vit_mlp_ratio: hidden width of the backbone's feed-forward networks, over `vit_dim`.
        head_dim: width of the head's token, and so of the feature.
        head_depth: layers of the head.
        head_heads: attention heads of the head.
        head_dim_head: width of one attention head of the head.
        head_mlp_dim: hidden width of the head's feed-forward networks.
        drop_path: stochastic depth of the backbone's last layer in training, growing linearly from 0 at the first;
            HMR2.0 trains its ViT-H with 0.55.
        head_dropout: dropout in the head, in training.
        token_merging: Mask-ToMe's settings; None merges no tokens.

    Raises:
        ValueError: a size is not a positive whole number, or does not fit another; names the field.
    """

    architecture: Architecture = "hmr2"
    vit_dim: int = 1280
    vit_depth: int = 32
    vit_heads: int = 16
    vit_mlp_ratio: float = 4.0
    head_dim: int = 1024
    head_depth: int = 6
    head_heads: int = 8
    head_dim_head: int = 64
    head_mlp_dim: int = 1024
    drop_path: float = 0.0
    head_dropout: float = 0.0
    token_merging: TokenMerging | None = None

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(f"architecture must be one of {get_args(Architecture)}, got {self.architecture!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("architecture", "token_merging"):
                continue
            if field.name in ("drop_path", "head_dropout"):
                valid, wanted = _is_number(value) and 0 <= value < 1, "a number in [0, 1)"
            elif field.name == "vit_mlp_ratio":
                valid, wanted = _is_number(value) and value > 0, "a positive number"
            else:
                valid, wanted = type(value) is int and value > 0, "a positive whole number"
            if not valid:
                raise ValueError(f"{field.name} must be {wanted}, got {value!r}")
        if self.vit_dim % 4:
            raise ValueError(f"vit_dim must be a multiple of 4, got {self.vit_dim}")
        if self.vit_dim % self.vit_heads:
            raise ValueError(f"vit_heads must divide vit_dim ({self.vit_dim}), got {self.vit_heads}")
        if not float(self.vit_dim * self.vit_mlp_ratio).is_integer():
            raise ValueError(f"vit_mlp_ratio times vit_dim ({self.vit_dim}) must be whole, got {self.vit_mlp_ratio}")

    @property
    def full_image(self) -> bool:
        """Whether the predicted camera counts on the full image's lens, or on one of the crop's own."""
        return self.architecture == "camerahmr"

    @classmethod
    def hmr2(cls) -> HMRConfig:
        """HMR2.0's size: ViT-H and a 1024-d feature, 670,459,037 parameters."""
        return cls()

    @classmethod
    def camerahmr(cls) -> HMRConfig:
        """CameraHMR's size, without the network for its intrinsics: 670,712,053 parameters."""
        return cls(architecture="camerahmr")

    @classmethod
    def tiny(cls) -> HMRConfig:
        """For two CPU cores: 12 layers of width 192 and a 256-d feature, 7.8 M parameters."""
        return cls(
            vit_dim=192, vit_depth=12, vit_heads=3,
            head_dim=256, head_depth=3, head_heads=4, head_dim_head=64, head_mlp_dim=512,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HMRConfig:
        """Config of plain data; absent keys take their defaults. Raises ValueError naming an unknown key."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                raise ValueError(f"unknown key {key!r} in an HMR config: did you mean {nearest!r}?")
        merging = values.get("token_merging")
        if isinstance(merging, Mapping):
            names = [field.name for field in dataclasses.fields(TokenMerging)]
            if odd := sorted(set(merging) - set(names)):
                raise ValueError(f"unknown key {odd[0]!r} in token_merging; it may have: {', '.join(names)}")
            values = {**values, "token_merging": TokenMerging(**merging)}
        return cls(**values)


class HMROutput(NamedTuple):
    """Prediction for B crops, float32 but for the tokens.

    Attributes:
        feature: (B, D) the head's token before its read-outs: what the diffusion decoder is conditioned on.
        rotations: (B, 24, 3, 3) of SMPL's joints relative to their parents; the root's is in the camera frame (y down).
        betas: (B, 10) shape.
        camera: (B, 3) = (s, tx, ty); `fasthmr.geometry.cameras` turns it into a translation.
        pose6d: (B, 144) the 6D numbers that `rotations` are made of.
        tokens: (B, N, vit_dim) the backbone's, which the head reads; in the dtype that they were computed in.
        slots: (B, 192) where in `tokens` each place of `TOKEN_GRID` is; some share one where tokens are merged.
    """

    feature: Tensor
    rotations: Tensor
    betas: Tensor
    camera: Tensor
    pose6d: Tensor
    tokens: Tensor
    slots: Tensor


class HMR(nn.Module):
    """HMR2.0 (Goel et al. 2023) or CameraHMR (Patel and Black 2025): ViT backbone and transformer head.

    It owns no body model.

    `merge_plan` says which layers of the backbone became one; it is changed by `merge_layers` alone.

    Args:
        config: sizes.
        mean: mean parameters the read-outs add to; None for `smpl_head.default_mean_parameters`.
    """

    def __init__(self, config: HMRConfig, mean: MeanParameters | None = None) -> None:
        super().__init__()
        self.config = config
        self.merge_plan = LayerMergePlan(config.vit_depth)
        self.backbone = ViT(
            dim=config.vit_dim,
            depth=config.vit_depth,
            heads=config.vit_heads,
            mlp_ratio=config.vit_mlp_ratio,
            image=(CROP_PX, CROP_PX - 2 * SIDE_COLUMNS_PX),
            drop_path=config.drop_path,
            token_merging=config.token_merging,
        )
        self.smpl_head = SMPLHead(
            dim=config.head_dim,
            depth=config.head_depth,
            heads=config.head_heads,
            head_dim=config.head_dim_head,
            mlp_dim=config.head_mlp_dim,
            context_dim=config.vit_dim,
            camera=config.architecture == "camerahmr",
            dropout=config.head_dropout,
            mean=mean,
        )

    def merge_layers(self, plan: LayerMergePlan) -> None:
        """Merge the backbone's layers, in place, by the events of `plan` that follow those merged already.

        Layers that stay keep their names and their parameters' identity.

        Raises:
            ValueError: `plan` does not continue `merge_plan`, or leaves too few layers for token merging; nothing was
                changed.
        """
        events = plan.after(self.merge_plan)
        self.backbone.tokens_merged(len(plan.layers))
        for event in events:
            collapse(self.backbone.blocks, event)
        self.merge_plan = plan

    def set_token_merging(self, settings: TokenMerging | None) -> None:
        """Merge tokens like this from now on; None merges none.

        Raises:
            ValueError: it cannot be done with the layers that are left; nothing was changed.
        """
        if settings is not None:
            settings.schedule(self.backbone.num_tokens, len(self.backbone.blocks))
        self.config = dataclasses.replace(self.config, token_merging=settings)
        self.backbone.token_merging = settings

    def forward(self, images: Tensor, person_mask: Tensor | None = None, box_info: Tensor | None = None) -> HMROutput:
        """Predict each crop.

        Args:
            images: (B, 3, 256, 256) RGB, normalised with `conventions.IMAGE_MEAN` and `IMAGE_STD`; only the middle 192
                columns are used.
            person_mask: (B, 256, 256) bool in the same crop: protects the person where tokens are merged by mask,
                and is needed there. Checked, but not used, otherwise.
            box_info: (B, 3) where the crop was, as `fasthmr.geometry.cameras.box_info` says it. CameraHMR needs it;
                for HMR2.0 it is checked, but not used.

        Raises:
            ValueError: a shape or type is wrong, or the mask or box that the model needs was not given.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, CROP_PX, CROP_PX) or not images.is_floating_point():
            raise ValueError(
                f"images must be (B, 3, {CROP_PX}, {CROP_PX}) floats, normalised; "
                f"got {tuple(images.shape)} of {images.dtype}"
            )
        if person_mask is not None:
            _check_person_mask(person_mask, len(images))
        state = self.backbone(middle_columns(images), self.person_tokens(person_mask))
        return self.read_out(state, box_info)

    def person_tokens(self, person_mask: Tensor | None) -> Tensor | None:
        """(B, 256, 256) bool -> (B, 192) bool, which tokens merging protects; None where it protects none.

        Raises:
            ValueError: the model merges tokens by mask and there is none.
        """
        settings = self.config.token_merging
        if settings is None or settings.mask == "none":
            return None
        if person_mask is None:
            raise ValueError(
                "this model merges tokens by person mask and got none: pass person_mask, or build it with "
                "token_merging.mask = 'none'"
            )
        return token_mask(person_mask, settings.person_share)

    def read_out(self, state: MergedTokens, box_info: Tensor | None = None) -> HMROutput:
        """Decode the backbone's tokens; `box_info` as for `forward`."""
        if box_info is not None and tuple(box_info.shape) != (len(state.tokens), BOX_INFO_DIM):
            raise ValueError(f"box_info must be ({len(state.tokens)}, {BOX_INFO_DIM}), got {tuple(box_info.shape)}")
        decoded = self.smpl_head(state.tokens, box_info)
        with torch.autocast(state.tokens.device.type, enabled=False):
            rotations = rotation_6d_to_matrix(decoded.pose6d.unflatten(-1, (NUM_JOINTS, 6)))
        return HMROutput(
            decoded.feature, rotations, decoded.betas, decoded.camera, decoded.pose6d, state.tokens, state.slots
        )


def token_mask(person_mask: Tensor, share: float) -> Tensor:
    """Which tokens of `TOKEN_GRID` show the person: (B, 256, 256) bool -> (B, 192) bool, row by row.

    A token does if at least `share` of its patch is person, and any of it. Padding counts as background.
    """
    grid = TOKEN_GRID
    padded = F.pad(person_mask.float(), (0, 0, -grid.top_px, 0))
    seen = padded[:, : grid.rows * grid.patch_px, grid.left_px : grid.left_px + grid.columns * grid.patch_px]
    area = F.avg_pool2d(seen[:, None], grid.patch_px).flatten(1)
    return (area >= share) & (area > 0)


def middle_columns(crops: Tensor) -> Tensor:
    """The part of a square crop that the backbone sees: (..., 256, 256) -> (..., 256, 192), columns 32 to 223."""
    return crops[..., SIDE_COLUMNS_PX : CROP_PX - SIDE_COLUMNS_PX]


def _check_person_mask(mask: Tensor, batch_size: int) -> None:
    if tuple(mask.shape) != (batch_size, CROP_PX, CROP_PX) or mask.dtype != torch.bool:
        raise ValueError(
            f"person_mask must be ({batch_size}, {CROP_PX}, {CROP_PX}) bool, got {tuple(mask.shape)} of {mask.dtype}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
