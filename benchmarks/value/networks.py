"""The small networks of the experiments."""

from __future__ import annotations

__all__ = ["Aspp", "Decoder", "PreActivation", "residual_network", "small_vit"]

from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn


class PreActivation(nn.Module):
    """A pre-activation block; its dropout stands where NK101 finds it, between the first convolution and the second norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, p: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.drop = nn.Dropout(p)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.conv1(torch.relu(self.norm1(x))))
        shortcut: Tensor = self.shortcut(x)
        return shortcut + self.conv2(torch.relu(self.norm2(h)))

    @staticmethod
    def network(p: float) -> nn.Module:
        """Six blocks of 16, 32 and 64 channels."""
        shapes = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        blocks = [PreActivation(*shape, p) for shape in shapes]
        head = [nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
        return nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), *blocks, *head)


class PostActivation(nn.Module):
    """The block of ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def residual_network(classes: int, width: int, depths: Sequence[int], strides: Sequence[int], p: float = 0.0) -> nn.Module:
    """Stages of `depths` blocks, each twice as wide as the one before, global pooling, a dropout and a linear layer."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
        for block in range(depth):
            layers.append(PostActivation(inputs, width << stage, stride if block == 0 else 1))
            inputs = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p), nn.Linear(inputs, classes))


def small_vit() -> nn.Module:
    """Timm's VisionTransformer on 8 x 8 images: 16 patches, 4 blocks of width 48."""
    net: nn.Module = timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4, class_token=False, global_pool="avg"
    )
    return net


def _layer(inputs: int, outputs: int, side: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, side, stride, dilation * (side // 2), dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Aspp(nn.Module):
    """Two layers, then four branches as in DeepLab without its image-wide one: a 1x1 convolution and three dilated ones."""

    def __init__(self, rates: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        self.stem = nn.Sequential(_layer(1, 16), _layer(16, 16))
        self.branches = nn.ModuleList([_layer(16, 12, 1), *(_layer(16, 12, 3, dilation=rate) for rate in rates)])
        self.project, self.classify = _layer(48, 24, 1), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits: Tensor = self.classify(self.project(torch.cat([branch(x) for branch in self.branches], 1)))
        return logits


class Decoder(nn.Module):
    """Fine features and coarse ones, brought to one size and joined; the coarse ones are scaled by `apart`."""

    def __init__(self, apart: float) -> None:
        super().__init__()
        self.apart = apart
        self.stem = nn.Sequential(_layer(1, 16), _layer(16, 16))
        self.down = nn.Sequential(_layer(16, 24, stride=2), _layer(24, 24, stride=2), nn.Conv2d(24, 16, 3, padding=1))
        self.fuse, self.classify = nn.Conv2d(32, 24, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(24, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = nn.functional.interpolate(self.apart * self.down(fine), scale_factor=4.0, mode="bilinear")
        logits: Tensor = self.classify(self.fuse(torch.cat([fine, coarse], 1)))
        return logits
