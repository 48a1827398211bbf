"""Dropouts written as a product with a random mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.graph import ModelGraph


class Masked(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.mask = nn.Conv2d(3, 8, 3), mask

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(self.stem(x))


def _in_place(x: Tensor) -> Tensor:
    mask = torch.empty_like(x).bernoulli_(0.8)
    mask.div_(0.8)
    return x * mask


# formula, drop probability, whether whole channels go
DROPOUTS: dict[str, tuple[Callable[[Tensor], Tensor], float, bool]] = {
    "bernoulli": (lambda x: x * torch.bernoulli(torch.full_like(x, 0.8)) / 0.8, 0.2, False),
    "bernoulli_": (_in_place, 0.2, False),
    "new_empty": (lambda x: x.new_empty(x.shape).bernoulli_(0.7) * x, 0.3, False),
    "uniform below keep": (lambda x: x * (torch.rand_like(x) < 0.8).float() / 0.8, 0.2, False),
    "uniform above drop": (lambda x: x * (torch.rand_like(x) > 0.2), 0.2, False),
    "floor": (lambda x: x / 0.8 * (0.8 + torch.rand(x.shape)).floor(), 0.2, False),
    "dropout of ones": (lambda x: x * F.dropout(torch.ones_like(x), 0.2), 0.2, False),
    "dropout of ones, off": (lambda x: x * F.dropout(torch.ones_like(x), 0.2, training=False), 0.0, False),
    "masked_fill": (lambda x: x.masked_fill(torch.rand_like(x) < 0.2, 0.0), 0.2, False),
    "where": (lambda x: torch.where(torch.rand_like(x) < 0.8, x, 0.0), 0.2, False),
    "inverted": (lambda x: x * (1 - torch.bernoulli(torch.full_like(x, 0.2))), 0.2, False),
    "a distribution's sample": (lambda x: x * torch.distributions.Bernoulli(0.8).sample(x.shape) / 0.8, 0.2, False),
    "whole channels": (lambda x: x * torch.bernoulli(torch.full((2, 8, 1, 1), 0.8)), 0.2, True),
    "whole features of tokens": (lambda x: x.flatten(2) * torch.bernoulli(torch.full((2, 1, 36), 0.8)), 0.2, True),
}
QUIET: dict[str, Callable[[Tensor], Tensor]] = {
    "stochastic depth": lambda x: x * torch.bernoulli(torch.full((2, 1, 1, 1), 0.8)) / 0.8,
    "stochastic depth on a single channel": lambda x: x[:, :1] * torch.bernoulli(torch.full((2, 1, 1, 1), 0.8)),
    "hidden positions": lambda x: x * (torch.rand(2, 1, 6, 6) < 0.5),
    "uniform noise": lambda x: x * torch.rand_like(x),
    "noise added": lambda x: x + torch.bernoulli(torch.full_like(x, 0.5)),
    "constant": lambda x: x * torch.full_like(x, 0.5),
    "learned": lambda x: x * torch.bernoulli(x.sigmoid()),
}


def dropouts(mask: Callable[[Tensor], Tensor]) -> list[tuple[float, bool]]:
    return [(round(d.p, 6), d.by_channel) for d in ModelGraph.from_model(Masked(mask), torch.zeros(2, 3, 8, 8)).dropouts]


@pytest.mark.parametrize("name", DROPOUTS)
def test_mask_is_a_dropout_of_its_probability(name: str) -> None:
    mask, p, by_channel = DROPOUTS[name]
    assert dropouts(mask) == [(p, by_channel)]


@pytest.mark.parametrize("name", [name for name, (_, p, _) in DROPOUTS.items() if p])
def test_that_probability_is_what_one_sees(name: str) -> None:
    mask, p, _ = DROPOUTS[name]
    dropped = torch.stack([mask(torch.ones(2, 8, 6, 6)) == 0 for _ in range(300)]).float().mean()
    assert float(dropped) == pytest.approx(p, abs=0.03)


@pytest.mark.parametrize("name", QUIET)
def test_no_dropout(name: str) -> None:
    assert dropouts(QUIET[name]) == []
