"""NK401-NK406: what in a loss can turn into NaN, judged on the autograd graph of one real step."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.findings import Evidence, Severity
from pl_normkit.methods.nan_safety.loss_graph import (
    LossGraph,
    adds_constant,
    cancelling_differences,
    fed_by_saturating,
    is_reshaping,
    is_square,
    masked_origin,
    read_loss_graph,
    scales_by_constant,
    smallest,
    through,
)
from pl_normkit.methods.nan_safety.ranges import base, output_dtype, saved
from pl_normkit.methods.nan_safety.sources import place_of, scalar_of
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

PAPER = "Analysis of NaN Divergence in Training Monocular Depth Estimation Model, arXiv 2311.03938"
LOGS = ("Log", "Log2", "Log10")
WORDS = {"Sqrt": "sqrt", "Rsqrt": "rsqrt", "Hypot": "hypot", "Pow": "power", "Div": "division", "Reciprocal": "reciprocal"}


@dataclass(frozen=True)
class Case:
    """One node that a rule objects to, with the number seen there in this step."""

    node: Node
    what: str
    seen: float | None = None
    certain: bool = False


def _observations(
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
        severity = Severity.ERROR if any(case.certain for case in group) else None
        yield Observation(message.format(what=what), tuple(places), advice, evidence, severity, cause=what)


def _hazard(graph: LossGraph, node: Node, position: int = 0) -> Case | None:
    """A case where the argument provably reaches 0, or was seen at or below 0 in this step."""
    seen = smallest(node)
    certain = seen is not None and seen <= 0
    if not certain and not graph.input_range(node, position).reaches_zero:
        return None
    return Case(node, WORDS.get(base(node), base(node).lower()), seen, certain)


def _is_root(node: Node) -> bool:
    exponent = saved(node, "exponent")
    return base(node) in ("Sqrt", "Rsqrt", "Hypot") or (isinstance(exponent, (int, float)) and 0 < exponent < 1)


@rule(
    "NK401",
    "root-of-zero",
    mark=Mark.PUBLISHED,
    source=f"{PAPER} (abstract: square-root loss -> unstable gradient); the criterion is derived here",
    needs=(Needs.LOSS,),
)
def root_of_zero(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds square roots (sqrt, rsqrt, hypot, powers between 0 and 1) whose argument can reach 0.

    Why it hurts
        The derivative 1 / (2 sqrt(D)) is infinite at D = 0, and inf * 0 makes the whole gradient NaN. In float16 D underflows to 0
        already at residuals of 1.7e-4. Even before that the gradient does not shrink near the optimum.

    Evidence
        The smallest argument that the root has seen in this very step.

    Example
        `10 * torch.sqrt(torch.var(g) + 0.15 * g.mean() ** 2)`; also `torch.where(d > 0, torch.sqrt(d), 0)`, which does not help.

    Use instead
        Drop the root, or `torch.sqrt(d + 1e-8)`, or `d.clamp_min(1e-8).sqrt()`, or `pl_normkit.nn.safe_sqrt(d)`.
        `x.norm()` and `x.std()` are safe in torch and stay quiet.

    Fix and its safety
        `replace_unsafe_losses(module)` swaps known loss modules; loss functions are advice only.

    Source
        Published: the cause (abstract of arXiv 2311.03938). Derived: the criterion (interval of the argument, read from the
        autograd graph), tested in tests/methods/nan_safety/test_rules.py.
    """
    graph = subject.once(read_loss_graph)
    lost = {id(case.node) for case in _lost_epsilons(graph)}
    cases = [_hazard(graph, node) for node in graph.named("Sqrt", "Rsqrt", "Hypot", "Pow") if _is_root(node) and id(node) not in lost]
    yield from _observations(
        [case for case in cases if case is not None],
        "the argument of {what} can reach 0, where its gradient is infinite",
        "drop the root, or add an epsilon or a clamp under it, or use pl_normkit.nn.safe_sqrt",
        "smallest argument seen",
        "bounded away from 0",
    )


@rule(
    "NK402",
    "log-of-sigmoid",
    mark=Mark.PUBLISHED,
    source=f"{PAPER} (abstract: log-sigmoid -> numerical instability); the criterion is derived here",
    needs=(Needs.LOSS,),
)
def log_of_sigmoid(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds a logarithm of a sigmoid or softmax (scaled, resized, indexed or mirrored as in 1 - p) instead of the fused form.

    Why it hurts
        The sigmoid rounds to 0 below -88.7 in float32 and below -17.3 in float16: the loss is -inf and the gradient NaN. In float16 an
        added epsilon does not help, because max_depth / epsilon overflows on the way back.

    Evidence
        The smallest probability seen in this step.

    Example
        `torch.log(max_depth * torch.sigmoid(z))`, `torch.log(torch.softmax(z, 1))`, `torch.log(1 - torch.sigmoid(z))`.

    Use instead
        `F.logsigmoid(z) + math.log(max_depth)`, `F.log_softmax(z, 1)`, `F.logsigmoid(-z)`; for binary cross entropy on a sigmoid
        `F.binary_cross_entropy_with_logits` (there the logarithm is clamped: no NaN, but a saturated pixel gets no gradient).

    Fix and its safety
        Advice only: the logits are needed where the probability is used now. `pl_normkit.nn.SILogLoss(max_depth=...)` takes logits.

    Source
        Published: the cause (abstract of arXiv 2311.03938). Derived: thresholds and criterion.
    """
    graph = subject.once(read_loss_graph)
    yield from _observations(
        _log_cases(graph),
        "the logarithm of a {what} is taken: it is -inf where the {what} rounds to 0, and the gradient there is NaN",
        "use F.logsigmoid(z), F.logsigmoid(-z) or F.log_softmax(z, dim) on the logits (in half precision cast them to float32 first)",
        "smallest probability seen",
        "never computed: work on the logits",
    )
    clamped = [node for node in graph.named("BinaryCrossEntropy") if fed_by_saturating(node) is not None]
    if clamped:
        yield Observation(
            "binary cross entropy is taken of a sigmoid: no NaN, but no gradient either where the sigmoid is saturated",
            tuple(dict.fromkeys(map(place_of, clamped))),
            "use binary_cross_entropy_with_logits on the logits",
            severity=Severity.NOTE,
            cause="binary cross entropy",
        )


def _log_cases(graph: LossGraph) -> Iterator[Case]:
    for node in graph.named(*LOGS):
        found = fed_by_saturating(node)
        if found is None:
            continue
        origin, guarded = found
        if not guarded or output_dtype(origin) == torch.float16:
            result = saved(origin, "result")
            seen = float(result.detach().amin()) if isinstance(result, Tensor) and result.numel() else None
            yield Case(node, base(origin).lower(), seen, certain=seen == 0.0)


@rule(
    "NK403",
    "variance-of-few",
    mark=Mark.PUBLISHED,
    source=f"{PAPER}; the reading 'unbiased default of torch.var' is that of the repository kmbmjn/MDE_Toolbox_Others",
    needs=(Needs.LOSS,),
)
def variance_of_few(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds variances and standard deviations with torch's default correction on a tensor picked by a boolean mask; separately,
        differences mean(x^2) - mean(x)^2 under a root or logarithm, and means that were empty in this step.

    Why it hurts
        With one valid element the unbiased variance is 0 / 0 = NaN, value and gradient; with none every mean and variance is NaN.
        The difference of two large squares rounds to a negative number, whose root is NaN (612 of 2000 trials at mean 3, standard
        deviation 1e-4, float32).

    Evidence
        The number of elements that entered the variance in this step.

    Example
        `torch.var(g[mask])`; `torch.sqrt((g ** 2).mean() - g.mean() ** 2)`.

    Use instead
        `pl_normkit.nn.stable_variance(g, mask)`, or `torch.var(g[mask], correction=0)` after testing that the mask is not empty.

    Fix and its safety
        `replace_unsafe_losses(module)` swaps known loss modules; loss functions are advice only.

    Source
        Published: the variance (abstract, and the repository's README for its reading). Derived here, not the paper's: the
        cancelling difference and the empty mean.
    """
    graph = subject.once(read_loss_graph)
    yield from _observations(
        _variance_cases(graph),
        "{what} divides by N - 1 and N depends on the data: one valid element gives NaN, none gives NaN in any form",
        "use correction=0 and skip an empty mask, or pl_normkit.nn.stable_variance(x, mask)",
        "elements seen",
        "2 or more in every batch",
    )
    yield from _observations(
        [Case(node, "cancelling difference") for node in cancelling_differences(graph)],
        "mean(x^2) - mean(x)^2 can round to a negative number under a root or logarithm (derived here, not the paper's)",
        "use torch.var(x, correction=0) or pl_normkit.nn.stable_variance",
        "",
        "",
    )
    yield from _observations(
        _empty_means(graph),
        "{what} was taken over no element in this step (derived here, not the paper's)",
        "skip the term when nothing is valid, for example prediction.sum() * 0",
        "elements seen",
        "1 or more",
    )


def _variance_cases(graph: LossGraph) -> Iterator[Case]:
    for node in graph.named("Var", "Std", "VarMean", "StdMean"):
        correction = saved(node, "correction")
        if (correction is None or correction > 0) and masked_origin(node) is not None:
            values = saved(node, "self")
            outputs = max(1, math.prod(node._input_metadata[0].shape))
            seen = values.numel() / outputs if isinstance(values, Tensor) else None
            yield Case(node, base(node).lower().replace("mean", ""), seen, certain=seen is not None and seen <= 1)


def _empty_means(graph: LossGraph) -> Iterator[Case]:
    for node in graph.named("Mean"):
        if saved(node, "self_sym_numel") == 0:
            yield Case(node, "a mean", 0.0, certain=True)
    for node in graph.named("NllLoss", "NllLoss2D"):
        weight = saved(node, "total_weight")
        if saved(node, "reduction") == 1 and isinstance(weight, Tensor) and float(weight) == 0:
            yield Case(node, "a cross entropy", 0.0, certain=True)


@rule(
    "NK404",
    "division-by-zero",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/test_rules.py",
    needs=(Needs.LOSS,),
)
def division_by_zero(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds logarithms, divisions (also by a norm) and negative powers of something that can be 0, without an epsilon or a clamp.

    Why it hurts
        log(0) is -inf with an infinite gradient, x / 0 is inf or NaN; one pixel is enough for the whole step.

    Evidence
        The smallest argument seen in this step.

    Example
        `x / x.norm()`, `torch.log(torch.relu(x))`, `intersection / union`.

    Use instead
        `F.normalize(x)`, `torch.log(x.clamp_min(1e-6))`, `intersection / (union + 1e-6)`. What cannot reach 0 (exp, softplus, softmax,
        clamped, where- or epsilon-guarded) stays quiet, and so does everything whose sign is not known, unless it was 0 in this step.

    Fix and its safety
        Advice only.

    Source
        Derived: the criterion and its fixtures.
    """
    graph = subject.once(read_loss_graph)
    excluded = {id(case.node) for case in (*_lost_epsilons(graph), *_log_cases(graph))}
    excluded |= {id(node) for node in graph.named(*LOGS) if (found := fed_by_saturating(node)) and not found[1]}
    cases = [_hazard(graph, node, _denominator(node)) for node in graph.nodes if _can_divide(node) and id(node) not in excluded]
    yield from _observations(
        [case for case in cases if case is not None],
        "{what} of something that can be 0, without an epsilon",
        "add an epsilon, clamp, or select the valid elements before the operation, not after it",
        "smallest argument seen",
        "bounded away from 0",
    )


def _can_divide(node: Node) -> bool:
    name = base(node)
    if name == "Pow":
        exponent = saved(node, "exponent")
        return isinstance(exponent, (int, float)) and exponent < 0
    return name in (*LOGS, "Div", "Reciprocal")


def _denominator(node: Node) -> int:
    return 1 if base(node) == "Div" else 0


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
    yield from _observations(
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
    yield from _observations(
        _lost_epsilons(graph),
        "the epsilon of a {what} is 0 in the precision it is used in",
        "compute it in float32 (.float() before it), or use an epsilon that float16 can hold (1e-4)",
        "epsilon after rounding",
        "positive",
    )


def _lost_epsilons(graph: LossGraph) -> list[Case]:
    return [case for node in graph.nodes if (case := _lost_clamp(node) or _lost_sum(node)) is not None]


def _lost_clamp(node: Node) -> Case | None:
    low, dtype = saved(node, "min"), output_dtype(node)
    if base(node) not in ("Clamp", "ClampMin") or not isinstance(low, (int, float)) or dtype is None or not low > 0:
        return None
    return Case(node, "clamp", 0.0) if _rounds_to_zero(low, dtype) else None


def _lost_sum(node: Node) -> Case | None:
    """A root, logarithm or division whose argument is `x + constant` in half precision, where the constant is lost."""
    if not (_can_divide(node) or _is_root(node)):
        return None
    edge = node.next_functions[_denominator(node)][0]
    found = edge if edge is None or not (is_reshaping(edge) or scales_by_constant(edge)) else through(edge, _is_transparent)
    dtype = None if found is None else output_dtype(found)
    if found is None or not adds_constant(found) or dtype not in (torch.float16, torch.bfloat16):
        return None
    number = scalar_of(found)
    if number is not None:
        lost = number != 0 and _rounds_to_zero(number, dtype)
    else:
        lost = smallest(node) == 0
    return Case(node, WORDS.get(base(node), base(node).lower()), 0.0, certain=smallest(node) == 0) if lost else None


def _is_transparent(node: Node) -> bool:
    return is_reshaping(node) or scales_by_constant(node)


def _rounds_to_zero(number: float, dtype: torch.dtype) -> bool:
    return float(torch.tensor(number, dtype=torch.float64).to(dtype)) == 0
