"""Nodes of a step's graph, read by name and in order, and the lines that made them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pl_normkit.graph.autograd import base, behind, forward_order, output_dtype, saved, source_line, tensors_in


def test_nodes_are_named_and_ordered() -> None:
    x = torch.ones(3, requires_grad=True)
    root = (x.exp() * x.exp().sqrt()).sum().grad_fn
    assert root is not None
    order = forward_order(root)
    assert sorted(map(base, order)) == ["AccumulateGrad", "Exp", "Exp", "Mul", "Sqrt", "Sum"]
    assert all(order.index(inner) < order.index(node) for node in order for inner in behind(node))
    assert order[-1] is root
    assert output_dtype(root) == torch.float32


def test_a_freed_value_is_none() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    assert torch.equal(saved(y.grad_fn, "result"), y)
    y.sum().backward()
    assert saved(y.grad_fn, "result") is None
    assert saved(y.grad_fn, "nothing_of_that_name") is None


def test_a_checkpoint_is_not_run_again() -> None:
    runs: list[Tensor] = []

    def part(hidden: Tensor) -> Tensor:
        runs.append(hidden)
        return hidden.exp()

    y = checkpoint(part, torch.ones(3, requires_grad=True), use_reentrant=False)
    assert saved(y.grad_fn, "result") is None
    assert len(runs) == 1


def test_the_line_is_that_of_the_innermost_users_frame() -> None:
    seen: list[str] = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            seen.append(source_line(sys._getframe(1)))
            return func(*args, **(kwargs or {}))

    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with Watched():
        layer(x)  # torch's own lines are no one's
    line = test_the_line_is_that_of_the_innermost_users_frame.__code__.co_firstlineno + 10
    assert set(seen) == {f"tests/graph/test_autograd.py:{line}"}
    assert source_line(None) == ""


def test_tensors_are_found_in_any_nest() -> None:
    @dataclass
    class Batch:
        image: Tensor

    a, b, c = torch.ones(3).unbind()
    assert [t is u for t, u in zip(tensors_in({"x": [a, (Batch(b),)], "y": "text", "z": c}), (a, b, c), strict=True)] == [True] * 3
