"""Images that receptive fields are measured on."""

from __future__ import annotations

import torch
from torch import Tensor


def images(count: int = 3, size: tuple[int, int] = (64, 64), channels: int = 3) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))
