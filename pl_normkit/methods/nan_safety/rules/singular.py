"""NK401, NK402, NK404, NK407 and NK410: operations that have no finite value or gradient at some arguments."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterator

import torch
from torch import Tensor

from pl_normkit.findings import Severity
from pl_normkit.graph.autograd import base, output_dtype, saved
from pl_normkit.methods.nan_safety.diagnosis.sources import place_of
from pl_normkit.methods.nan_safety.losses.cases import (
    LOGS,
    Case,
    can_divide,
    denominator,
    explained,
    hazard,
    is_root,
    lost_epsilons,
    observations,
)
from pl_normkit.methods.nan_safety.losses.loss_graph import LossGraph, fed_by_saturating, read_loss_graph
from pl_normkit.rules import Mark, Observation, rule
from pl_normkit.subject import Needs, Subject

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
        The smallest argument that the root has seen in this very step; from `audit_loss` arguments at which the gradient is not finite.

    Example
        ```python
        import torch

        def loss(prediction, target):
            return torch.sqrt((prediction - target).square().mean())
        ```

        Also `torch.where(d > 0, torch.sqrt(d), 0)`, which does not help.

    Use instead
        ```python
        from pl_normkit.nn import safe_sqrt

        def stable_loss(prediction, target):
            return safe_sqrt((prediction - target).square().mean())
        ```

        Or drop the root, or `torch.sqrt(d + 1e-8)`, or `d.clamp_min(1e-8).sqrt()`. `x.norm()` and `x.std()` are safe in torch and stay
        quiet.

    Fix and its safety
        `replace_unsafe_losses(module)` swaps known loss modules; loss functions are advice only.

    Source
        Published: the cause (abstract of arXiv 2311.03938). Derived: the criterion (interval of the argument, read from the
        autograd graph), tested in tests/methods/nan_safety/rules/test_suspicions.py.
    """
    yield from explained(subject, "NK401", _suspected_roots(subject))


def _suspected_roots(subject: Subject) -> Iterator[Observation]:
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
        The smallest probability seen in this step; from `audit_loss` logits at which it fails.

    Example
        ```python
        import torch

        def loss(z, max_depth=80.0):
            return -torch.log(max_depth * torch.sigmoid(z)).mean()
        ```

        Also `torch.log(torch.softmax(z, 1))` and `torch.log(1 - torch.sigmoid(z))`.

    Use instead
        ```python
        import math

        import torch.nn.functional as F

        def stable_loss(z, max_depth=80.0):
            return -(F.logsigmoid(z) + math.log(max_depth)).mean()
        ```

        `F.log_softmax(z, 1)`, `F.logsigmoid(-z)`; for binary cross entropy on a sigmoid `F.binary_cross_entropy_with_logits` (with the
        sigmoid apart the logarithm is clamped: no NaN, but a saturated pixel gets no gradient, and CUDA autocast refuses to run it).

    Fix and its safety
        Advice only: the logits are needed where the probability is used now. `pl_normkit.nn.SILogLoss(max_depth=...)` takes logits.

    Source
        Published: the cause (abstract of arXiv 2311.03938). Derived: thresholds and criterion.
    """
    yield from explained(subject, "NK402", _suspected_logs(subject))
    clamped = [node for node in subject.once(read_loss_graph).named("BinaryCrossEntropy") if fed_by_saturating(node) is not None]
    if clamped:
        yield Observation(
            "binary cross entropy is taken of a sigmoid: no NaN, but no gradient where that saturates, and CUDA autocast refuses it",
            tuple(dict.fromkeys(map(place_of, clamped))),
            "use binary_cross_entropy_with_logits on the logits",
            severity=Severity.NOTE,
            cause="binary cross entropy",
        )


def _suspected_logs(subject: Subject) -> Iterator[Observation]:
    graph = subject.once(read_loss_graph)
    yield from observations(
        _log_cases(graph),
        "the logarithm of a {what} is taken: it is -inf where the {what} rounds to 0, and the gradient there is NaN",
        "use F.logsigmoid(z), F.logsigmoid(-z) or F.log_softmax(z, dim) on the logits (in half precision cast them to float32 first)",
        "smallest probability seen",
        "never computed: work on the logits",
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
            yield Case(node, base(origin).lower(), seen)


@rule(
    "NK404",
    "division-by-zero",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/rules/test_suspicions.py",
    needs=(Needs.LOSS,),
)
def division_by_zero(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds logarithms, divisions (also by a norm) and negative powers of something that can be 0, without an epsilon or a clamp.

    Why it hurts
        log(0) is -inf with an infinite gradient, x / 0 is inf or NaN; one pixel is enough for the whole step.

    Evidence
        The smallest argument seen in this step; from `audit_loss` arguments at which it fails.

    Example
        ```python
        import torch

        def loss(logits, y):
            p = logits.sigmoid()
            return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())
        ```

        Also `x / x.norm()`, `torch.log(torch.relu(x))`, `1 / torch.sigmoid(z)`.

    Use instead
        ```python
        def stable_loss(logits, y):
            p = logits.sigmoid()
            return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        ```

        `F.normalize(x)`, `torch.log(x.clamp_min(1e-6))`, `1 + torch.exp(-z)`. What cannot reach 0 (clamped, where- or
        epsilon-guarded) stays quiet, and so does everything whose sign is not known, unless it was 0 in this step or the search
        drives it there.

    Fix and its safety
        Advice only.

    Source
        Derived: the criterion and its fixtures.
    """
    yield from explained(subject, "NK404", _suspected_divisions(subject))


def _suspected_divisions(subject: Subject) -> Iterator[Observation]:
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


@rule(
    "NK407",
    "border-of-domain",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/losses/test_witness.py",
    needs=(Needs.LOSS,),
)
def border_of_domain(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds acos, asin, acosh, atanh, logit and erfinv that the search drives to the border of their domain or beyond it.

    Why it hurts
        The derivative of acos(c) is infinite at c = 1, which a cosine of equal vectors is, and beyond 1, where it may round to, the
        value is NaN. A clamp to [-1, 1] fixes the value and not the gradient.

    Evidence
        Arguments of the loss at which its value or gradient is not finite.

    Example
        ```python
        import torch
        import torch.nn.functional as F

        def loss(a, b):
            return torch.acos(F.cosine_similarity(a, b, dim=1)).mean()
        ```

    Use instead
        ```python
        def stable_loss(a, b):
            return torch.acos(F.cosine_similarity(a, b, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)).mean()
        ```

        `torch.logit(p, eps=1e-6)`, `torch.acosh(x.clamp_min(1 + 1e-6))`. In bfloat16 1 - 1e-6 is 1: compute in float32.

    Fix and its safety
        Advice only.

    Source
        Derived: the criterion and its fixtures.
    """
    yield from explained(subject, "NK407")


@rule(
    "NK410",
    "not-finite-somewhere",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/losses/test_witness.py",
    needs=(Needs.LOSS,),
)
def not_finite_somewhere(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Names any other operation that is not finite at arguments which the search has found: a decomposition of a matrix with equal
        singular values, CTC with a target longer than its input, a product, a Kullback-Leibler divergence through a zero.

    Why it hurts
        One such batch makes every weight NaN.

    Evidence
        Arguments of the loss at which its value or gradient is not finite.

    Example
        ```python
        import torch

        def loss(x):
            u, s, v = torch.linalg.svd(x)
            return u.sum() + s.sum()
        ```

    Use instead
        ```python
        def stable_loss(x):
            return torch.linalg.svdvals(x).sum()
        ```

    Fix and its safety
        Advice only.

    Source
        Derived: the witness itself.
    """
    yield from explained(subject, "NK410")
