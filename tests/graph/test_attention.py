"""Which softmax weighs the values of an attention written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pl_normkit.graph import ModelGraph
from tests.graph.networks import Written

TOKENS = torch.zeros(2, 6, 8)


def _softmax_of_einsum(m: Written, x: Tensor) -> Tensor:
    scores = torch.einsum("bld,bmd->blm", m.q(x), m.k(x))
    return torch.einsum("blm,bmd,ed->ble", scores.softmax(-1), m.v(x), m.out.weight)


def _router(m: Written, x: Tensor) -> Tensor:
    chances = m.q(x).softmax(-1)
    return torch.einsum("ble,bled->bld", chances, torch.einsum("bld,ed->bled", x, m.k.weight))


def _talking_heads(m: Written, x: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", m.q(x).unflatten(-1, (2, 4)), m.k(x).unflatten(-1, (2, 4)))
    mixed = torch.einsum("bhlm,hg->bglm", scores, m.out.weight[:2, :2]).softmax(-1)
    return torch.einsum("bhlm,bmd->bld", mixed, m.v(x))


def _learned_queries(m: Written, x: Tensor) -> Tensor:
    return (m.experts @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x)


@pytest.mark.parametrize(("forward", "expected"), [(_softmax_of_einsum, 1), (_talking_heads, 1), (_learned_queries, 1), (_router, 0)])
def test_a_softmax_that_weighs_experts_is_no_attention(forward: Callable[..., Any], expected: int) -> None:
    assert len(ModelGraph.from_model(Written(forward), TOKENS).attentions) == expected
