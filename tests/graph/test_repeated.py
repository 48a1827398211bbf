"""Rows of like blocks are traced once, and what is read is what a trace of all of them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from pl_normkit.graph import ModelGraph, repeated, trace
from tests.graph.networks import AttentionBlock, Block, state_of

DEPTH = 9
TOKENS = torch.zeros(2, 5, 16)


class Row(nn.Module):
    """Blocks in a list, each given the tokens and what else the case passes."""

    def __init__(self, build: Callable[[int], nn.Module], call: Callable[[nn.Module, Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(build(index) for index in range(DEPTH))
        self.call = call or (lambda block, x, _: block(x))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = self.call(block, x, index)
        return x


class Indexed(nn.Module):
    """Knows its place in the row; `uses_it` lets the code depend on it."""

    def __init__(self, index: int, *, uses_it: bool) -> None:
        super().__init__()
        self.layer_idx, self.uses_it = index, uses_it
        self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.layer(self.norm(x))
        if self.uses_it and self.layer_idx == DEPTH - 1:
            y = y.relu()
        return x + (y if mask is None else y * mask)


class Shared(nn.Module):
    """Blocks that share one norm beside layers of their own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = norm, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        return x + self.layer(x)


def _shared_row() -> nn.Module:
    norm = nn.LayerNorm(16)
    return Row(lambda _: Shared(norm))


class SharedBeside(nn.Module):
    """A row, and beside it one norm under two names: such models an export reads through proxies."""

    def __init__(self) -> None:
        super().__init__()
        self.row = Row(lambda _: AttentionBlock())
        self.first = nn.LayerNorm(16)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.row(self.first(x)))


def _hooked() -> nn.Module:
    row = Row(lambda _: AttentionBlock())
    row.blocks[4].register_forward_hook(lambda _m, _a, out: out * 2)
    return row


LLAMA = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "use_cache": False,
}
# network, inputs, calls that stand in for a trace
ROWS: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "transformer": (lambda: Row(lambda _: AttentionBlock()), TOKENS, DEPTH - 3),
    "in sequence": (lambda: nn.Sequential(*(AttentionBlock(fused=False) for _ in range(DEPTH))), TOKENS, DEPTH - 3),
    "convolutions with batch norm": (lambda: Row(lambda _: Block(inplace=False)), torch.zeros(2, 8, 6, 6), DEPTH - 3),
    "index that nothing hangs on": (lambda: Row(lambda i: Indexed(i, uses_it=False)), TOKENS, DEPTH - 3),
    "shared norm": (_shared_row, TOKENS, 0),
    "norm shared beside the row": (SharedBeside, TOKENS, DEPTH - 3),
    "mask passed to each": (
        lambda: Row(lambda i: Indexed(i, uses_it=False), lambda block, x, _: block(x, mask=x.mean(-1, keepdim=True))),
        TOKENS,
        DEPTH - 3,
    ),
    "decoder of transformers": (
        lambda: LlamaModel(LlamaConfig(**LLAMA, num_hidden_layers=DEPTH)),
        {"input_ids": torch.zeros(2, 4, dtype=torch.long)},
        DEPTH - 3,
    ),
    "index that changes the code": (lambda: Row(lambda i: Indexed(i, uses_it=True)), TOKENS, 0),
    "widths that differ": (lambda: Row(lambda i: AttentionBlock(fused=i % 2 == 0)), TOKENS, 0),
    "given tensors are changed in place": (lambda: Row(lambda _: InPlace()), TOKENS, 0),
    "a hook on one": (_hooked, TOKENS, DEPTH - 1 - 3),
    "another flag for some": (lambda: Row(lambda i: Indexed(i, uses_it=False), lambda b, x, i: b(x, mask=None if i < 4 else x)), TOKENS, 4),
}


GIVEN_UP = ("index that changes the code", "given tensors are changed in place")
"""What is seen only on the way: calls that stood in are dropped, and all is traced anew."""


def described(graph: ModelGraph) -> list[tuple[Any, ...]]:
    return [
        (
            n.index,
            n.op,
            n.kind,
            n.module,
            n.shape,
            n.reads,
            n.arguments,
            n.mask,
            n.source,
            [i.index for i in n.inputs],
            [u.index for u in n.users],
        )
        for n in graph.nodes
    ]


def structure(graph: ModelGraph) -> tuple[int, ...]:
    return len(graph.residual_adds), len(graph.norms), len(graph.attentions), len(graph.fusions), len(graph.dropouts)


@pytest.mark.parametrize("name", ROWS)
def test_reading_is_that_of_a_trace_of_all_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, inputs, stood_in = ROWS[name]
    torch.manual_seed(0)
    model = build()
    before = state_of(model)
    repeats: list[str] = []
    original = trace._Reader._repeat
    monkeypatch.setattr(
        trace._Reader, "_repeat", lambda self, block, path, given: repeats.append(path) or original(self, block, path, given)
    )
    shared = ModelGraph.from_model(model, inputs)
    assert state_of(model) == before
    monkeypatch.setattr(repeated, "MIN_BLOCKS", 10**6)
    whole = ModelGraph.from_model(model, inputs)

    assert described(shared) == described(whole)
    assert structure(shared) == structure(whole)
    assert name in GIVEN_UP or len(repeats) == stood_in


def test_short_rows_are_traced_as_they_are() -> None:
    assert repeated.find_rows(nn.Sequential(*(AttentionBlock() for _ in range(repeated.MIN_BLOCKS - 1)))) == []
