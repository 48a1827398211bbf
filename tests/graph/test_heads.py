"""Heads behind a global pooling, in the forms poolings come in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.graph import ModelGraph


class Pooled(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.pool, self.drop = nn.Conv2d(3, 8, 3, padding=1), pool, nn.Dropout(0.1)
        self.wide, self.narrow = nn.Linear(16, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(self.stem(x))
        return (self.wide if pooled.shape[1] == 16 else self.narrow)(self.drop(pooled))


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean of a mean": lambda x: x.mean(3).mean(2),
    "flattened": lambda x: x.flatten(2).mean(-1),
    "sum over the count": lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "whole-map kernel": lambda x: F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1),
    "average and maximum added": lambda x: 0.5 * (F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1)).flatten(1),
    "average and maximum joined": lambda x: torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1),
    "generalized mean": lambda x: F.adaptive_avg_pool2d(x.clamp(min=1e-6).pow(3), 1).pow(1 / 3).flatten(1),
}


def heads(model: nn.Module, side: int) -> int:
    return len({head.pool for head in ModelGraph.from_model(model, torch.zeros(2, 3, side, side)).heads})


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_makes_a_head(name: str) -> None:
    assert heads(Pooled(POOLINGS[name]), 8) == 1


def test_map_of_one_position_still_has_a_head() -> None:
    assert heads(Pooled(POOLINGS["adaptive"]), 1) == 1


@pytest.mark.parametrize("pool", [lambda x: x.flatten(1)[:, :8], lambda x: F.adaptive_max_pool2d(x, 1).flatten(1)])
def test_other_ways_to_one_vector_are_none(pool: Callable[[Tensor], Tensor]) -> None:
    assert heads(Pooled(pool), 8) == 0


@pytest.mark.parametrize(("pool", "expected"), [("avg", 1), ("avgmax", 1), ("catavgmax", 1), ("max", 0)])
def test_poolings_of_timm(pool: str, expected: int) -> None:
    with torch.device("meta"):
        model, x = timm.create_model("resnet10t", global_pool=pool), torch.zeros(2, 3, 64, 64)

    assert len({head.pool for head in ModelGraph.from_model(model, x).heads}) == expected
