"""Norms written out as arithmetic, in the spellings people use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.graph import ModelGraph


class Written(nn.Module):
    def __init__(self, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.temperature = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.formula(self, x))


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


RMS: dict[str, Callable[..., Tensor]] = {
    "rsqrt of the mean square": lambda m, x: m.gamma * (x * torch.rsqrt(mean_square(x) + 1e-6)),
    "divided by the root": lambda m, x: x / torch.sqrt(mean_square(x) + 1e-6) * m.gamma,
    "power of minus a half": lambda m, x: x * (mean_square(x) + 1e-6) ** -0.5 * m.gamma,
    "reciprocal": lambda m, x: x * torch.reciprocal(mean_square(x).add(1e-6).sqrt()) * m.gamma,
    "square": lambda m, x: x / x.square().mean(-1, keepdim=True).clamp(min=1e-6).sqrt() * m.gamma,
    "x * x": lambda m, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * m.gamma,
    "sum of squares over n": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + 1e-6) * m.gamma,
    "in float32": lambda m, x: m.gamma * (x.float() * torch.rsqrt(mean_square(x.float()) + 1e-6)).type_as(x),
    "gain first": lambda m, x: m.gamma * x * torch.rsqrt(mean_square(x) + 1e-6),
    "norm": lambda m, x: x / (x.norm(2, dim=-1, keepdim=True) * 8**-0.5 + 1e-6) * m.gamma,
    "torch.linalg": lambda m, x: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) / 8**0.5).clamp(min=1e-6) * m.gamma,
    "F.normalize": lambda m, x: F.normalize(x, dim=-1) * 8**0.5 * m.gamma,
}
LAYER: dict[str, Callable[..., Tensor]] = {
    "variance of the centred": lambda m, x: centred(x) / torch.sqrt(mean_square(centred(x)) + 1e-6) * m.gamma + m.beta,
    "var": lambda m, x: centred(x) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6) * m.gamma + m.beta,
    "std": lambda m, x: m.gamma * centred(x) / (x.std(-1, keepdim=True) + 1e-6) + m.beta,
    "addcmul": lambda m, x: torch.addcmul(m.beta, centred(x) / (x.std(-1, keepdim=True) + 1e-6), m.gamma),
}
QUIET: dict[str, Callable[..., Tensor]] = {
    "unit vectors": lambda m, x: F.normalize(x, dim=-1),
    "unit vectors with a temperature": lambda m, x: F.normalize(x, dim=-1) * m.temperature,
    "divided by another value's root": lambda m, x: x / torch.sqrt(mean_square(m.out(x)) + 1e-6),
    "response normalization": lambda m, x: x * (x.norm(dim=1, keepdim=True) / (x.norm(dim=1, keepdim=True).mean(-1, keepdim=True) + 1e-6)),
    "divided by the maximum": lambda m, x: x / x.amax(-1, keepdim=True),
}


def read(formula: Callable[..., Tensor]) -> list[tuple[str, str, str]]:
    return [(norm.kind, norm.gamma, norm.beta) for norm in ModelGraph.from_model(Written(formula), torch.zeros(2, 6, 8)).norms]


@pytest.mark.parametrize("name", RMS)
def test_root_mean_square(name: str) -> None:
    assert read(RMS[name]) == [("rms", "gamma", "")]


@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(name: str) -> None:
    assert read(LAYER[name]) == [("layer", "gamma", "beta")]


@pytest.mark.parametrize("name", QUIET)
def test_no_norm(name: str) -> None:
    assert read(QUIET[name]) == []


def test_a_table_of_positions_behind_a_norm_is_not_its_shift() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(mean_square(x) + 1e-6) * m.gamma + m.out.weight[:6]

    assert read(formula) == [("rms", "gamma", "")]


def test_batch_norm_by_hand_takes_statistics_over_the_batch() -> None:
    def formula(m: Written, x: Tensor) -> Tensor:
        mean, variance = x.mean((0, 1), keepdim=True), x.var((0, 1), keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + 1e-5) * m.gamma + m.beta

    assert read(formula) == [("batch", "gamma", "beta")]
