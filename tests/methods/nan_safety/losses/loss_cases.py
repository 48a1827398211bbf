"""A loss with ordinary arguments and with some that try to break it; nothing here says which break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Make = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A loss; `free` are the arguments that need a gradient, `trials` arguments that may break it."""

    loss: Callable[..., Tensor]
    example: Make
    trials: Sequence[Make]
    free: tuple[int, ...] = (0,)


CASES: dict[str, Case] = {}


def rand(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    seed = sum((position + 1) * size for position, size in enumerate(shape)) + int(1000 * high)
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def add(name: str, loss: Callable[..., Tensor], example: Make, *trials: Make, free: tuple[int, ...] = (0,)) -> None:
    assert name not in CASES, name
    CASES[name] = Case(loss, example, trials, free)


def full(value: float, *shape: int) -> Tensor:
    return torch.full(shape, float(value))


Z, O = torch.zeros, torch.ones  # noqa: E741
