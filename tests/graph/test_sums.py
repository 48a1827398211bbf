"""Every spelling of an identity shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.graph.networks import Written, adds, fusions

X = torch.zeros(2, 8, 8, 8)
TOKENS = torch.zeros(2, 6, 8)


def _in_place(m: Written, x: Tensor) -> Tensor:
    x = x.clone()
    x += m.branch(x)
    return x


def _matrices(m: Written) -> Tensor:
    return m.q.weight.expand(2, 8, 8)


SPELLINGS: dict[str, Callable[..., Any]] = {
    "x + f(x)": lambda m, x: x + m.branch(x),
    "x += f(x)": _in_place,
    "x.add(f(x), alpha)": lambda m, x: torch.add(x, m.branch(x), alpha=0.5),
    "x - f(x)": lambda m, x: x - m.branch(x),
    "rsub(f(x), x)": lambda m, x: torch.rsub(m.branch(x), x),
    "x.sub_(f(x))": lambda m, x: x.clone().sub_(m.branch(x)),
    "lerp": lambda m, x: torch.lerp(x, m.branch(x), 0.3),
    "lerp_, learned weight": lambda m, x: torch.lerp(x, m.branch(x), m.scale),
    "addcmul": lambda m, x: torch.addcmul(x, m.branch(x), m.scale),
    "addcdiv": lambda m, x: torch.addcdiv(x, m.branch(x), m.scale),
    "baddbmm": lambda m, x: torch.baddbmm(x.flatten(2), _matrices(m), m.branch(x).flatten(2)),
    "baddbmm_ with factors": lambda m, x: x.flatten(2).clone().baddbmm_(_matrices(m), m.branch(x).flatten(2), beta=0.5, alpha=2),
    "addmm": lambda m, x: torch.addmm(x.flatten(1).T, m.branch(x).flatten(1).T, m.project.weight[:2, :2, 0, 0], beta=0.5),
    "concatenated parts": lambda m, x: torch.cat([x[..., :1], x[..., 1:]], 3) + torch.cat(m.branch(x).split([1, 7], 3), 3),
    "stack and sum": lambda m, x: torch.stack([x, m.branch(x)]).sum(0),
    "stack and mean, last dimension": lambda m, x: torch.stack([x, m.branch(x)], dim=-1).mean(-1),
    "python's sum": lambda m, x: sum([x, m.branch(x)]),
    "scaled": lambda m, x: (x + m.branch(x)) / 2**0.5,
    "einsum that scales": lambda m, x: x + torch.einsum("bchw,c->bchw", m.branch(x), m.norm.weight),
    "parallel branches": lambda m, x: x + m.branch(x) + m.second(x).relu(),
    "resized alike on both sides": lambda m, x: F.interpolate(x, scale_factor=2) + m.branch(F.interpolate(x.relu(), scale_factor=2)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_an_identity_shortcut_is_read(name: str) -> None:
    assert (adds(SPELLINGS[name], X), fusions(SPELLINGS[name], X)) == ((1, 0), 0)


def _scan_by_products(m: Written, x: Tensor) -> Tensor:
    """Of Mamba 2: the scan is a product with what other layers make, and D x goes around it."""
    weights = (m.q(x) @ m.k(x).mT).tril() * torch.ones(6, 6).cumsum(0).exp()
    values = m.v(x)
    return m.out(weights @ (values * m.k(x).sigmoid()) + values * m.norm.weight)


def test_around_a_scan_that_products_make() -> None:
    assert (adds(_scan_by_products, TOKENS), fusions(_scan_by_products, TOKENS)) == ((1, 0), 0)
