"""SMPLHead: one query token attends to the image tokens and is read out as pose, shape and camera."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasthmr.conventions import NUM_BETAS, NUM_JOINTS
from fasthmr.models.layers import CrossAttention, FeedForward, SelfAttention, init_transformer_weights

NORM_EPS = 1e-5
POSE6D_DIM = 6 * NUM_JOINTS
CAMERA_DIM = 3
#: what CameraHMR's query token is made of: the box as `fasthmr.geometry.cameras.box_info` gives it, and the means
BOX_INFO_DIM = 3
CAMERAHMR_TOKEN_DIM = BOX_INFO_DIM + POSE6D_DIM + NUM_BETAS + CAMERA_DIM
#: keypoints of CameraHMR's additional read-out (25 of OpenPose and 19 more)
CAMERAHMR_KEYPOINTS = 44
#: gain of the read-outs' start: an untrained head predicts the mean parameters, nearly.
READOUT_GAIN = 0.01


class MeanParameters(NamedTuple):
    """What the read-outs add to: pose6d (144,) or (1, 144), betas (10,), camera (3,) = (s, tx, ty)."""

    pose6d: Tensor
    betas: Tensor
    camera: Tensor


def default_mean_parameters() -> MeanParameters:
    """A rest-pose person of mean shape who stands upright, faces the camera and fills about 0.9 of the crop.

    HMR2.0's own means are statistics of licensed data; a foreign checkpoint brings them along. In the camera
    frame (y down, z away) upright and facing the camera is a root turned by pi about x: columns (1,0,0) and (0,-1,0).
    """
    pose6d = torch.tensor([1.0, 0, 0, 0, 1, 0]).repeat(NUM_JOINTS, 1)
    pose6d[0, 4] = -1.0
    return MeanParameters(pose6d.flatten(), torch.zeros(NUM_BETAS), torch.tensor([0.9, 0.0, 0.0]))


class HeadOutput(NamedTuple):
    """feature (B, D): the token before its read-outs; pose6d (B, 144), betas (B, 10), camera (B, 3); keypoints (B, K,
    2), None where the head has no such read-out; all float32."""

    feature: Tensor
    pose6d: Tensor
    betas: Tensor
    camera: Tensor
    keypoints: Tensor | None = None


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, cross-attention and feed-forward network, each added to its input."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.self_attn = SelfAttention(dim, heads, head_dim, qkv_bias=False)
        self.cross_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim, context_dim, heads, head_dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """(B, M, D), (B, N, context_dim) -> (B, M, D). The context is not normalised: the backbone's last norm did."""
        queries = queries + self.dropout(self.self_attn(self.self_norm(queries)))
        queries = queries + self.dropout(self.cross_attn(self.cross_norm(queries), context))
        return queries + self.dropout(self.mlp(self.mlp_norm(queries)))


class SMPLHead(nn.Module):
    """HMR2.0's head (`4D-Humans/hmr2/models/heads/smpl_head.py`), of any size and for any number of image tokens; or
    CameraHMR's (`CameraHMR/core/heads/smpl_head_cliff.py`), which is told where the crop was.

    Args:
        dim: width D of the query token, and so of the feature.
        depth: number of decoder layers.
        heads: attention heads.
        head_dim: width of one head.
        mlp_dim: hidden width of the feed-forward networks.
        context_dim: width of the image tokens.
        camera: CameraHMR's head: its query token is made of the box and the mean parameters, where HMR2.0's is made of
            a single zero, and it has a read-out of keypoints, which is carried along, but not trained.
        dropout: after each branch and inside the feed-forward networks.
        mean: mean parameters to start from; buffers of the state dict, so that a checkpoint brings its own.
    """

    init_body_pose: Tensor
    init_betas: Tensor
    init_cam: Tensor

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        head_dim: int,
        mlp_dim: int,
        context_dim: int,
        camera: bool = False,
        dropout: float = 0.0,
        mean: MeanParameters | None = None,
    ) -> None:
        super().__init__()
        self.token_embed = nn.Linear(CAMERAHMR_TOKEN_DIM if camera else 1, dim)
        self.token_pos = nn.Parameter(torch.zeros(1, 1, dim))
        self.layers = nn.ModuleList(
            DecoderLayer(dim, context_dim, heads, head_dim, mlp_dim, dropout) for _ in range(depth)
        )
        self.decpose = nn.Linear(dim, POSE6D_DIM)
        self.decshape = nn.Linear(dim, NUM_BETAS)
        self.deccam = nn.Linear(dim, CAMERA_DIM)
        # No loss of ours reads it; a parameter without a gradient would stop distributed training.
        self.deckp = nn.Linear(dim, 2 * CAMERAHMR_KEYPOINTS).requires_grad_(False) if camera else None
        mean = mean if mean is not None else default_mean_parameters()
        self.register_buffer("init_body_pose", _mean_row("pose6d", mean.pose6d, POSE6D_DIM))
        self.register_buffer("init_betas", _mean_row("betas", mean.betas, NUM_BETAS))
        self.register_buffer("init_cam", _mean_row("camera", mean.camera, CAMERA_DIM))

        self.apply(init_transformer_weights)
        nn.init.trunc_normal_(self.token_pos, std=0.02, a=-0.04, b=0.04)
        for readout in (self.decpose, self.decshape, self.deccam):
            nn.init.xavier_uniform_(readout.weight, gain=READOUT_GAIN)

    def forward(self, context: Tensor, box_info: Tensor | None = None) -> HeadOutput:
        """Decode image tokens.

        Args:
            context: (B, N, context_dim), any N.
            box_info: (B, 3) of `fasthmr.geometry.cameras.box_info`, which CameraHMR's head needs; HMR2.0's ignores it.

        Raises:
            ValueError: it is needed and missing.
        """
        query = (self.token_embed(self._token(context, box_info)) + self.token_pos[:, 0])[:, None]
        for layer in self.layers:
            query = layer(query, context)
        # bf16 would round poses to 3 digits, so the read-outs, which cost next to nothing, stay in float32.
        with torch.autocast(query.device.type, enabled=False):
            feature = query[:, 0].float()
            return HeadOutput(
                feature=feature,
                pose6d=self.decpose(feature) + self.init_body_pose,
                betas=self.decshape(feature) + self.init_betas,
                camera=self.deccam(feature) + self.init_cam,
                keypoints=None if self.deckp is None else self.deckp(feature).unflatten(-1, (-1, 2)),
            )

    def _token(self, context: Tensor, box_info: Tensor | None) -> Tensor:
        """What the query token is made of: (B, 1) or (B, 160)."""
        if self.deckp is None:
            return context.new_zeros(len(context), 1)
        if box_info is None:
            raise ValueError(
                "this model is CameraHMR's and is told where the crop was: pass box_info "
                "(fasthmr.geometry.cameras.box_info of box, image size and focal length)"
            )
        means = torch.cat((self.init_body_pose, self.init_betas, self.init_cam), dim=-1)
        return torch.cat((box_info, means.expand(len(context), -1)), dim=-1).to(context.dtype)


def _mean_row(name: str, value: Tensor, length: int) -> Tensor:
    if value.numel() != length:
        raise ValueError(f"the mean {name} must have {length} numbers, got shape {tuple(value.shape)}")
    return value.detach().to(torch.float32).reshape(1, length).clone()
