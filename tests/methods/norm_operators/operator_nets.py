"""Small networks with the norms of every operator, and what beside x they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.methods.norm_operators import norm_inputs, swap_norms
from pl_normkit.methods.norm_operators.rows import RowNorm
from tests.methods.norm_operators import reference_norms

WIDTH = 7
ROWS = {**reference_norms.ROWS, "powernorm": None, "unified": None}
IMAGES = {"groupnorm", "bcn", "ibn_a", "evonorm", "weight_standardized"}
LINEAR = {"sigma_reparam"}
ALL = sorted({*ROWS, *IMAGES, *LINEAR})


class RowFirst(nn.Module):
    """A layer norm over the second dimension, as timm writes it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x)
        return result


@contextmanager
def given(model: nn.Module, samples: int) -> Iterator[None]:
    """The time, where a norm takes one."""
    takes_time = any(isinstance(module, RowNorm) and "time" in module.takes for module in model.modules())
    with norm_inputs(model, time=torch.full((samples,), 0.5).double()) if takes_time else norm_inputs(model):
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Two stages of residual blocks with batch norm, odd maps, a channel number that 32 does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.down = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.second = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 10, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = self.down(x)
        result: Tensor = x + self.second(x)
        return result


def made(to: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """A network with the operator's norm or layer, and its input, in float32."""
    if to in ROWS or to in LINEAR:
        model = nn.Sequential(nn.Linear(5, WIDTH), RowFirst(nn.LayerNorm(WIDTH)), nn.Linear(WIDTH, 2))
        x = random(6, 5).float()
    else:
        model, x = Net(), random(2, 3, 9, 7).float()
    swap_norms(model, to, example_inputs=x, **options)
    return model, x
