"""NK403 and NK408: variances and means of too few elements."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Iterator

from torch import Tensor

from pl_normkit.graph.autograd import base, saved
from pl_normkit.methods.nan_safety.losses.cases import Case, explained, observations
from pl_normkit.methods.nan_safety.losses.loss_graph import LossGraph, cancelling_differences, masked_origin, read_loss_graph
from pl_normkit.rules import Mark, Observation, rule
from pl_normkit.subject import Needs, Subject

PAPER = "Analysis of NaN Divergence in Training Monocular Depth Estimation Model, arXiv 2311.03938"


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
        Finds variances and standard deviations with torch's default correction of as few as one element, such as those picked by a
        boolean mask; separately, differences mean(x^2) - mean(x)^2 under a root or logarithm.

    Why it hurts
        With one element the unbiased variance is 0 / 0 = NaN, value and gradient. The difference of two large squares rounds to a
        negative number, whose root is NaN (612 of 2000 trials at mean 3, standard deviation 1e-4, float32).

    Evidence
        The number of elements that entered the variance in this step; from `audit_loss` arguments at which it fails.

    Example
        ```python
        import torch

        def loss(g, mask):
            return torch.var(g[mask])
        ```

    Use instead
        ```python
        from pl_normkit.nn import stable_variance

        def stable_loss(g, mask):
            return stable_variance(g, mask)
        ```

        Or `torch.var(g[mask], correction=0)` after testing that the mask is not empty.

    Fix and its safety
        `replace_unsafe_losses(module)` swaps known loss modules; loss functions are advice only.

    Source
        Published: the variance (abstract, and the repository's README for its reading). Derived here, not the paper's: the
        cancelling difference.
    """
    yield from explained(subject, "NK403", _suspected_variances(subject))


def _suspected_variances(subject: Subject) -> Iterator[Observation]:
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


def _variance_cases(graph: LossGraph) -> Iterator[Case]:
    for node in graph.named("Var", "Std", "VarMean", "StdMean"):
        correction = saved(node, "correction")
        if (correction is None or correction > 0) and masked_origin(node) is not None:
            values = saved(node, "self")
            outputs = max(1, math.prod(node._input_metadata[0].shape))
            yield Case(node, base(node).lower().replace("mean", ""), values.numel() / outputs if isinstance(values, Tensor) else None)


@rule(
    "NK408",
    "mean-of-nothing",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/losses/test_witness.py",
    needs=(Needs.LOSS,),
)
def mean_of_nothing(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Finds means over no element: an empty selection in a mean or in a loss of torch.nn.functional, a cross entropy of which every
        label is ignored or weighs 0, a softmax row that is masked whole.

    Why it hurts
        The mean of nothing is 0 / 0 = NaN. One batch without a valid pixel is enough.

    Evidence
        The number of elements seen in this step; from `audit_loss` the mask or labels at which it fails.

    Example
        ```python
        import torch.nn.functional as F

        def loss(prediction, target, mask):
            return F.l1_loss(prediction[mask], target[mask])
        ```

    Use instead
        ```python
        def stable_loss(prediction, target, mask):
            return ((prediction - target).abs() * mask).sum() / mask.sum().clamp_min(1)

        def stable_cross_entropy(logits, labels):
            total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
            return total / (labels != 255).sum().clamp_min(1)
        ```

    Fix and its safety
        Advice only.

    Source
        Derived: the criterion and its fixtures.
    """
    yield from explained(
        subject,
        "NK408",
        observations(
            _empty_means(subject.once(read_loss_graph)),
            "{what} was taken over no element in this step",
            "skip the term when nothing is valid, for example prediction.sum() * 0",
            "elements seen",
            "1 or more",
        ),
    )


def _empty_means(graph: LossGraph) -> Iterator[Case]:
    for node in graph.named("Mean"):
        if saved(node, "self_sym_numel") == 0:
            yield Case(node, "a mean", 0.0)
    for node in graph.named("NllLoss", "NllLoss2D"):
        weight = saved(node, "total_weight")
        if saved(node, "reduction") == 1 and isinstance(weight, Tensor) and float(weight) == 0:
            yield Case(node, "a cross entropy", 0.0)
