"""HumanFoV: the field of view of a whole picture of people, from which CameraHMR gets its focal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, cat, nn

#: side of its square input, px: the whole picture, letterboxed (`fasthmr.data.letterbox`)
FOV_INPUT_PX = 256
#: which of its two outputs is the vertical field of view; CameraHMR uses no other
VERTICAL = 1
#: HRNet-W48; its branches have 1, 2, 4 and 8 times as many channels
_WIDTH = 48
_STEM, _STEM_OUT = 64, 256
_FC = 1024


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _conv_norm_relu(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [_conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs), nn.ReLU()]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        inner = self.bn1(self.conv1(images)).relu()
        return (self.bn2(self.conv2(inner)) + images).relu()


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1, added to the input, which a 1x1 convolution brings to as many channels."""

    def __init__(self, inputs: int, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, channels, kernel=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = _conv(channels, outputs, kernel=1), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, kernel=1), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        inner = self.bn1(self.conv1(images)).relu()
        inner = self.bn2(self.conv2(inner)).relu()
        return (self.bn3(self.conv3(inner)) + self.downsample(images)).relu()


class Exchange(nn.Module):
    """Branches of different resolutions, four blocks each, after which each becomes the sum of all of them, resized."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(c) for _ in range(4))) for c in channels)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_resized(channels, source, target) for source in range(len(channels)))
            for target in range(len(channels))
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One (B, C, H, W) a branch, each half as wide and high as the one before; the same shapes come back."""
        maps = [branch(one) for branch, one in zip(self.branches, maps, strict=True)]
        sums = []
        for row in self.fuse_layers:
            parts = [resize(one) for resize, one in zip(cast(nn.ModuleList, row), maps, strict=True)]
            sums.append(sum(parts[1:], start=parts[0]).relu())
        return sums


def _resized(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """What brings a branch to the size and channels of another."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(
            _conv(channels[source], channels[target], kernel=1),
            nn.BatchNorm2d(channels[target]),
            nn.Upsample(scale_factor=2 ** (source - target), mode="nearest"),
        )
    halvings = [
        nn.Sequential(*_conv_norm_relu(channels[source], channels[source], stride=2))
        for _ in range(target - source - 1)
    ]
    last = nn.Sequential(_conv(channels[source], channels[target], stride=2), nn.BatchNorm2d(channels[target]))
    return nn.Sequential(*halvings, last)


class HRNet(nn.Module):
    """HRNet (Sun et al. 2019) as CameraHMR has it (`CameraHMR/core/cam_model/backbone/hrnet.py`): four branches, in
    the end all brought to the smallest one's size.

    Args:
        width: channels of the first branch; each further one has twice as many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.channels = sum(channels)
        self.conv1, self.bn1 = _conv(3, _STEM, stride=2), nn.BatchNorm2d(_STEM)
        self.conv2, self.bn2 = _conv(_STEM, _STEM, stride=2), nn.BatchNorm2d(_STEM)
        self.layer1 = nn.Sequential(
            *(Bottleneck(_STEM if number == 0 else _STEM_OUT, _STEM, _STEM_OUT) for number in range(4))
        )
        # A further branch is made of the smallest one; the others go on as they are.
        self.transition1 = nn.ModuleList(
            [nn.Sequential(*_conv_norm_relu(_STEM_OUT, channels[0])), _halved(_STEM_OUT, channels[1])]
        )
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), _halved(channels[1], channels[2])])
        self.transition3 = nn.ModuleList(
            [nn.Identity(), nn.Identity(), nn.Identity(), _halved(channels[2], channels[3])]
        )
        self.stage2 = nn.Sequential(Exchange(channels[:2]))
        self.stage3 = nn.Sequential(*(Exchange(channels[:3]) for _ in range(4)))
        self.stage4 = nn.Sequential(*(Exchange(channels) for _ in range(3)))
        self.downsample_stage_1, self.downsample_stage_2, self.downsample_stage_3 = (
            nn.Sequential(*(layer for _ in range(times) for layer in _conv_norm_relu(c, c, stride=2)))
            for c, times in zip(channels[:3], (3, 2, 1), strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, channels, H / 32, W / 32)."""
        stem = self.bn1(self.conv1(images)).relu()
        stem = self.layer1(self.bn2(self.conv2(stem)).relu())
        maps = [stem]
        for transition, stage in (
            (self.transition1, self.stage2), (self.transition2, self.stage3), (self.transition3, self.stage4),
        ):  # fmt: skip
            sources = [*maps, *[maps[-1]] * (len(transition) - len(maps))]
            maps = stage([into(one) for into, one in zip(transition, sources, strict=True)])
        halvings = (self.downsample_stage_1, self.downsample_stage_2, self.downsample_stage_3, nn.Identity())
        return cat([halve(one) for halve, one in zip(halvings, maps, strict=True)], dim=1)


def _halved(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Sequential(*_conv_norm_relu(inputs, outputs, stride=2)))


class HumanFoV(nn.Module):
    """Field of view of pictures (CameraHMR, Patel and Black 2025; `CameraHMR/core/cam_model/fl_net.py`, "FLNet").

    The original has two further layers that it never calls, `fc2` and the backbone's `final_layer`; they are left out.

    Args:
        width: of the HRNet; the original's is 48.
    """

    def __init__(self, width: int = _WIDTH) -> None:
        super().__init__()
        self.width = width
        self.backbone = HRNet(width)
        self.fc1 = nn.Linear(self.backbone.channels, _FC)
        self.drop1 = nn.Dropout()
        self.fc3 = nn.Linear(_FC, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        """The vertical field of view.

        Args:
            pictures: (B, 3, 256, 256) RGB, whole and letterboxed, normalised as the encoder's input is.

        Returns:
            (B,) radians, float32; `fasthmr.geometry.cameras.focal_of_fov` makes focal lengths of them.
        """
        if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, FOV_INPUT_PX, FOV_INPUT_PX):
            raise ValueError(
                f"pictures must be (B, 3, {FOV_INPUT_PX}, {FOV_INPUT_PX}), normalised; got {tuple(pictures.shape)}"
            )
        pooled = self.backbone(pictures).mean((2, 3))
        return self.fc3(self.drop1(self.fc1(pooled)))[:, VERTICAL].float()
