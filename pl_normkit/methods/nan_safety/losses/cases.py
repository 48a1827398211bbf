"""What the rules share: cases, how they become observations, and which epsilons are lost."""

from __future__ import annotations

__all__ = ["Case", "can_divide", "denominator", "explained", "hazard", "is_root", "lost_epsilons", "observations"]

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.autograd.graph import Node

from pl_normkit.findings import Evidence, Severity
from pl_normkit.graph.autograd import base, output_dtype, saved
from pl_normkit.methods.nan_safety.diagnosis.sources import place_of, scalar_of
from pl_normkit.methods.nan_safety.losses.loss_graph import (
    LossGraph,
    adds_constant,
    is_reshaping,
    scales_by_constant,
    smallest,
    through,
)
from pl_normkit.methods.nan_safety.losses.witness import Shown, in_user_code, witnesses
from pl_normkit.rules import Observation, Subject

LOGS = ("Log", "Log2", "Log10")
WORDS = {"Sqrt": "sqrt", "Rsqrt": "rsqrt", "Hypot": "hypot", "Pow": "power", "Div": "division", "Reciprocal": "reciprocal"}


@dataclass(frozen=True)
class Case:
    """One node that a rule objects to, with the number seen there in this step."""

    node: Node
    what: str
    seen: float | None = None


def observations(
    cases: Iterable[Case], message: str, advice: str, measured: str, expected: str, worst: Callable[..., float] = min
) -> Iterator[Observation]:
    """One observation per kind of operation, with all its places and the worst number seen."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.what, []).append(case)
    for what, group in groups.items():
        numbers = [case.seen for case in group if case.seen is not None]
        evidence = [Evidence(measured, worst(numbers), expected)] if numbers else []
        places = dict.fromkeys(place_of(case.node) for case in group)
        yield Observation(message.format(what=what), tuple(places), advice, evidence, cause=what)


def explained(subject: Subject, code: str, suspicions: Iterable[Observation] = ()) -> Iterator[Observation]:
    """What the search showed that rule `code` explains, and the suspicions from the graph: notes where the search did not bear them out.

    A subject known only by the graph of one call (a training step) is not searched: its suspicions stay as they are.
    """
    found = subject.once(witnesses)
    if found is None:
        yield from suspicions
        return
    causes: dict[str, list[Shown]] = {}
    for shown in found.of(code):
        causes.setdefault(shown.explanation.operation, []).append(shown)
    for operation, group in causes.items():
        first = min(group, key=lambda shown: shown.severity is not Severity.ERROR)
        places = tuple(dict.fromkeys(shown.place for shown in group))
        yield Observation(first.message, places, first.explanation.advice, severity=first.severity, cause=operation, witness=first.witness)
    lines = {shown.place.source for shown in found.of(code)}
    for suspicion in suspicions:
        places = tuple(place for place in map(in_user_code, suspicion.places) if place.source not in lines)
        if places:
            yield replace(suspicion, message=f"{suspicion.message}: {found.otherwise}", places=places, severity=Severity.NOTE)


def hazard(graph: LossGraph, node: Node, position: int = 0) -> Case | None:
    """A case where the argument provably reaches 0, or was seen at or below 0 in this step."""
    seen = smallest(node)
    if not (seen is not None and seen <= 0) and not graph.input_range(node, position).reaches_zero:
        return None
    return Case(node, WORDS.get(base(node), base(node).lower()), seen)


def is_root(node: Node) -> bool:
    exponent = saved(node, "exponent")
    return base(node) in ("Sqrt", "Rsqrt", "Hypot") or (isinstance(exponent, (int, float)) and 0 < exponent < 1)


def can_divide(node: Node) -> bool:
    name = base(node)
    if name == "Pow":
        exponent = saved(node, "exponent")
        return isinstance(exponent, (int, float)) and exponent < 0
    if name == "Div" and len(node.next_functions) == 1:  # by a number, as cross_entropy divides by the batch for soft targets
        return False
    return name in (*LOGS, "Div", "Reciprocal")


def denominator(node: Node) -> int:
    return 1 if base(node) == "Div" else 0


def lost_epsilons(graph: LossGraph) -> list[Case]:
    return [case for node in graph.nodes if (case := _lost_clamp(node) or _lost_sum(node)) is not None]


def _lost_clamp(node: Node) -> Case | None:
    low, dtype = saved(node, "min"), output_dtype(node)
    if base(node) not in ("Clamp", "ClampMin") or not isinstance(low, (int, float)) or dtype is None or not low > 0:
        return None
    return Case(node, "clamp", 0.0) if _rounds_to_zero(low, dtype) else None


def _lost_sum(node: Node) -> Case | None:
    """A root, logarithm or division whose argument is `x + constant` in half precision, where the constant is lost."""
    if not (can_divide(node) or is_root(node)):
        return None
    edge = node.next_functions[denominator(node)][0]
    found = edge if edge is None or not (is_reshaping(edge) or scales_by_constant(edge)) else through(edge, _is_transparent)
    dtype = None if found is None else output_dtype(found)
    if found is None or not adds_constant(found) or dtype not in (torch.float16, torch.bfloat16):
        return None
    number = scalar_of(found)
    if number is not None:
        lost = number != 0 and _rounds_to_zero(number, dtype)
    else:
        lost = smallest(node) == 0
    return Case(node, WORDS.get(base(node), base(node).lower()), 0.0) if lost else None


def _is_transparent(node: Node) -> bool:
    return is_reshaping(node) or scales_by_constant(node)


def _rounds_to_zero(number: float, dtype: torch.dtype) -> bool:
    return float(torch.tensor(number, dtype=torch.float64).to(dtype)) == 0
