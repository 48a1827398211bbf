"""NK401-NK404: what in a loss can turn into NaN, judged on the autograd graph of one real step."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pl_normkit.findings import Severity
from pl_normkit.methods.nan_safety import precision_rules  # noqa: F401 - registers NK405 and NK406
from pl_normkit.methods.nan_safety.cases import LOGS, Case, can_divide, denominator, hazard, is_root, lost_epsilons, observations
from pl_normkit.methods.nan_safety.loss_graph import (
    LossGraph,
    cancelling_differences,
    fed_by_saturating,
    masked_origin,
    read_loss_graph,
)
from pl_normkit.methods.nan_safety.ranges import base, output_dtype, saved
from pl_normkit.methods.nan_safety.sources import place_of
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

PAPER = "Analysis of NaN Divergence in Training Monocular Depth Estimation Model, arXiv 2311.03938"


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
    lost = {id(case.node) for case in lost_epsilons(graph)}
    cases = [hazard(graph, node) for node in graph.named("Sqrt", "Rsqrt", "Hypot", "Pow") if is_root(node) and id(node) not in lost]
    yield from observations(
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
    yield from observations(
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
    yield from observations(
        _variance_cases(graph),
        "{what} divides by N - 1 and N depends on the data: one valid element gives NaN, none gives NaN in any form",
        "use correction=0 and skip an empty mask, or pl_normkit.nn.stable_variance(x, mask)",
        "elements seen",
        "2 or more in every batch",
    )
    yield from observations(
        [Case(node, "cancelling difference") for node in cancelling_differences(graph)],
        "mean(x^2) - mean(x)^2 can round to a negative number under a root or logarithm (derived here, not the paper's)",
        "use torch.var(x, correction=0) or pl_normkit.nn.stable_variance",
        "",
        "",
    )
    yield from observations(
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
        Not seen: a count that needs no gradient. `error[mask].mean()` and `error.sum() / mask.sum()` are NaN for an empty mask; write
        `error[mask].sum() / mask.sum().clamp_min(1)`, and lint the loss once more on an example with an empty mask.

    Fix and its safety
        Advice only.

    Source
        Derived: the criterion and its fixtures.
    """
    graph = subject.once(read_loss_graph)
    excluded = {id(case.node) for case in (*lost_epsilons(graph), *_log_cases(graph))}
    excluded |= {id(node) for node in graph.named(*LOGS) if (found := fed_by_saturating(node)) and not found[1]}
    cases = [hazard(graph, node, denominator(node)) for node in graph.nodes if can_divide(node) and id(node) not in excluded]
    yield from observations(
        [case for case in cases if case is not None],
        "{what} of something that can be 0, without an epsilon",
        "add an epsilon, clamp, or select the valid elements before the operation, not after it",
        "smallest argument seen",
        "bounded away from 0",
    )
