"""NK405, NK406 and NK409: numbers too large or too small for their type."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.graph.autograd import base, output_dtype, saved
from pl_normkit.methods.nan_safety.losses.cases import Case, explained, lost_epsilons, observations
from pl_normkit.methods.nan_safety.losses.loss_graph import (
    LossGraph,
    is_square,
    read_loss_graph,
)
from pl_normkit.rules import Mark, Observation, rule
from pl_normkit.subject import Needs, Subject


@rule(
    "NK405",
    "float16-overflow",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/rules/test_suspicions.py",
    needs=(Needs.LOSS,),
)
def float16_overflow(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds exp, squares and sums computed in float16 whose result is not bounded below 65504.

    Why it hurts
        exp(11.1), 256^2 and a sum over 65504 ones are infinite in float16; inf - inf and inf / inf are NaN.

    Evidence
        The largest value seen in this step; from `audit_loss` arguments at which it overflows.

    Example
        ```python
        def loss(prediction, target):
            return ((prediction.half() - target.half()) ** 2).sum()
        ```

    Use instead
        ```python
        def stable_loss(prediction, target):
            return ((prediction.float() - target.float()) ** 2).sum()
        ```

        Or autocast, which runs these operations in float32.

    Fix and its safety
        Advice only.

    Source
        Derived: float16 has 65504 as its largest number.
    """
    yield from explained(subject, "NK405", _suspected_overflows(subject))


def _suspected_overflows(subject: Subject) -> Iterator[Observation]:
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
    return Case(node, what, seen)


@rule(
    "NK406",
    "epsilon-lost-in-half-precision",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/rules/test_suspicions.py",
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
        ```python
        import torch

        def loss(x):
            return torch.sqrt(x.half() + 1e-8).mean()
        ```

    Use instead
        ```python
        def stable_loss(x):
            return torch.sqrt(x.float() + 1e-8).mean()
        ```

        Or an epsilon of 1e-4 and more in float16.

    Fix and its safety
        Advice only.

    Source
        Derived: the smallest positive float16 is 6e-8, half of it rounds to 0. Added numbers are known only from
        `pl-normkit lint --loss`; on a training step the rule goes by the 0 it sees.
    """
    suspicions = observations(
        lost_epsilons(subject.once(read_loss_graph)),
        "the epsilon of a {what} is 0 in the precision it is used in",
        "compute it in float32 (.float() before it), or use an epsilon that float16 can hold (1e-4)",
        "epsilon after rounding",
        "positive",
    )
    yield from explained(subject, "NK406", suspicions)


@rule(
    "NK409",
    "value-overflow",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/losses/test_witness.py",
    needs=(Needs.LOSS,),
)
def overflow(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds exponentials, powers and products in float32 that the search drives beyond the largest number.

    Why it hurts
        exp(88.8) is infinite in float32. Where the value is hidden afterwards (1 / (1 + exp(-z)), torch.where), the gradient is still
        inf * 0 = NaN.

    Evidence
        Arguments of the loss at which its value or gradient is not finite.

    Example
        ```python
        import torch

        def loss(z):
            return torch.log(torch.exp(z) + 1).mean()
        ```

    Use instead
        ```python
        import torch.nn.functional as F

        def stable_loss(z):
            return F.softplus(z).mean()
        ```

        `torch.sigmoid(z)` for `1 / (1 + torch.exp(-z))`, `F.log_softmax` for `(e / e.sum()).log()`, `torch.logsumexp` for a log of a
        sum of exp,
        `torch.where(x <= 0, torch.exp(x.clamp(max=0)), 1 + x)`.

    Fix and its safety
        Advice only.

    Source
        Derived: the largest float32 is 3.4e38 = exp(88.7).
    """
    yield from explained(subject, "NK409")
