"""NK405 and NK406: what half precision does to a loss."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.methods.nan_safety.cases import Case, lost_epsilons, observations
from pl_normkit.methods.nan_safety.loss_graph import (
    LossGraph,
    is_square,
    read_loss_graph,
)
from pl_normkit.methods.nan_safety.ranges import base, output_dtype, saved
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule


@rule(
    "NK405",
    "float16-overflow",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/test_rules.py",
    needs=(Needs.LOSS,),
)
def float16_overflow(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds exp, squares and sums computed in float16 whose result is not bounded below 65504.

    Why it hurts
        exp(11.1), 256^2 and a sum over 65504 ones are infinite in float16; inf - inf and inf / inf are NaN.

    Evidence
        The largest value seen in this step.

    Example
        `((pred.half() - target.half()) ** 2).sum()`.

    Use instead
        `((pred.float() - target.float()) ** 2).sum()`, or autocast, which runs these operations in float32.

    Fix and its safety
        Advice only.

    Source
        Derived: float16 has 65504 as its largest number.
    """
    graph = subject.once(read_loss_graph)
    half = [node for node in graph.nodes if output_dtype(node) == torch.float16]
    yield from observations(
        [case for node in half if (case := _overflow(graph, node)) is not None],
        "{what} in float16 can pass 65504, the largest number it holds",
        "cast to float32 before it (.float()), or leave the cast to autocast",
        "largest value seen",
        "well below 65504",
        max,
    )


def _overflow(graph: LossGraph, node: Node) -> Case | None:
    bound = graph.input_range(node)
    largest = bound.largest if bound.known else math.inf
    if base(node) == "Exp" and (bound.high if bound.known else math.inf) > 11:
        return _overflowing(node, "exp", saved(node, "result"), lambda value: value)
    if (is_square(node) or _is_high_power(node)) and largest > 255:
        return _overflowing(node, "a square or power", saved(node, "self"), lambda value: value ** float(saved(node, "exponent") or 2))
    if base(node) == "MseLoss":
        return Case(node, "a squared error")
    if base(node) == "Sum" and not largest * _summed(node) <= 65504:
        return Case(node, "a sum")
    return None


def _is_high_power(node: Node) -> bool:
    exponent = saved(node, "exponent")
    return base(node) == "Pow" and isinstance(exponent, (int, float)) and exponent > 1


def _summed(node: Node) -> int:
    sizes: Any = saved(node, "self_sym_sizes") or ()
    outputs: int = math.prod(node._input_metadata[0].shape)
    return max(1, math.prod(int(size) for size in sizes) // max(1, outputs))


def _overflowing(node: Node, what: str, kept: Any, grow: Callable[[float], float]) -> Case:
    if not isinstance(kept, Tensor) or kept.numel() == 0:
        return Case(node, what)
    seen = grow(float(kept.detach().abs().amax()))
    return Case(node, what, seen, certain=not seen <= 65504)


@rule(
    "NK406",
    "epsilon-lost-in-half-precision",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/test_rules.py",
    needs=(Needs.LOSS,),
)
def epsilon_lost(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds an epsilon that rounds to 0 in the precision it is added or clamped in.

    Why it hurts
        1e-8 is 0 in float16: the guard is written in the code and is not there in the numbers.

    Evidence
        The epsilon after rounding, or the 0 that reached the root, logarithm or division although something was added.

    Example
        `torch.sqrt(x.half() + 1e-8)`, `x.half().clamp_min(1e-8).log()`.

    Use instead
        `torch.sqrt(x.float() + 1e-8)`, or an epsilon of 1e-4 and more in float16.

    Fix and its safety
        Advice only.

    Source
        Derived: the smallest positive float16 is 6e-8, half of it rounds to 0. Added numbers are known only from
        `pl-normkit lint --loss`; on a training step the rule goes by the 0 it sees.
    """
    graph = subject.once(read_loss_graph)
    yield from observations(
        lost_epsilons(graph),
        "the epsilon of a {what} is 0 in the precision it is used in",
        "compute it in float32 (.float() before it), or use an epsilon that float16 can hold (1e-4)",
        "epsilon after rounding",
        "positive",
    )
