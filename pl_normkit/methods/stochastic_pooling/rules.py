"""NK106: a dropout on pooled features, which stochastic average pooling could replace."""

from __future__ import annotations

from collections.abc import Iterator

from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.graph import Kind, Node
from pl_normkit.methods.stochastic_pooling.fix import POOL_OPS
from pl_normkit.rules import Mark, Observation, Subject, rule


@rule(
    "NK106",
    "dropout-after-average-pool",
    mark=Mark.DERIVED,
    source="arXiv 2409.16630 for stochastic average pooling; the criterion is derived here",
    severity=Severity.NOTE,
    preview=True,
)
def dropout_after_average_pool(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes every active dropout that acts directly on globally average-pooled features (only reshapes stand between). It
    proposes stochastic average pooling in place of the two; nothing is wrong with the network as it is.

    Why it hurts
    Dropout removes whole features after the pool has averaged the map, so none of the map's redundancy is used, and a
    zeroed feature raises the variance of the pooled vector by 1 / keep. Leaving out map positions instead regularizes
    where the average would hide it.

    Evidence
    The drop probability as read from the trace.

    Example
    ```python
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10))
    ```

    Use instead
    Stochastic pooling without the dropout. `measure_second_moments` says which scale suits the features; after a ReLU the default sqrt
    scale about halves their second moment.

    ```python
    import torch

    from pl_normkit import measure_second_moments, stochastic_pooling

    model[3].p = 0.0
    changes = stochastic_pooling(model, keep=0.1)
    moments = measure_second_moments(model, torch.rand(2, 3, 32, 32))
    ```

    Fix and its safety
    None is made: it changes what is trained, and which of the two regularizes better differs from task to task
    (docs/stochastic_pooling.md has a small comparison).

    Source
    Derived: arXiv 2409.16630 proposes pooling over random subsets as a replacement for average pooling; that a dropout after
    the pool is the place to try it is our own conclusion.
    """
    assert subject.graph is not None
    found = [item for item in subject.graph.dropouts if item.p > 0 and _average_pool_before(item.node) is not None]
    if found:
        strongest = max(found, key=lambda item: item.p)
        yield Observation(
            message=f"dropout acts on globally average-pooled features in {len(found)} place{'s' if len(found) > 1 else ''}",
            places=[Place(item.node.module, item.node.source) for item in found],
            evidence=[Evidence(f"drop probability of {strongest.module}", strongest.p, is_measured=False)],
            advice="try stochastic_pooling(model, keep=0.1) without this dropout",
        )


def _average_pool_before(dropout: Node) -> Node | None:
    """The global average pool, of several positions, whose output reaches the dropout through reshapes alone."""
    node = dropout
    while len(node.inputs) == 1 and (node is dropout or node.kind is Kind.VIEW):
        node = node.inputs[0]
    averages = POOL_OPS.fullmatch(node.op) is not None and node.is_global_pool and node.inputs[0].numel > node.numel
    return node if averages else None
