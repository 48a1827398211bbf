"""NK1xx: dropout that stands where it shifts the variance a batch norm sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pl_normkit.findings import Evidence, FixSafety, Place, Severity
from pl_normkit.graph import Dropout, ModelGraph, Node, Norm
from pl_normkit.methods.dropout_placement.find import (
    BranchDropout,
    Verdict,
    find_always_on,
    read_branch_dropouts,
    read_free_dropouts,
    read_head_dropouts,
)
from pl_normkit.methods.dropout_placement.fix import place_dropout
from pl_normkit.methods.dropout_placement.measure import measure_variance_shift
from pl_normkit.rules import Mark, Observation, Subject, rule

PAPER = "arXiv 2302.06112, abstract"
_FIX = "the DropoutPlacement callback or pl_normkit.methods.dropout_placement.place_dropout does it"
_MOVE = f"Keep one dropout in the branch, just before its last weight layer; {_FIX}"
_NEGLIGIBLE = 0.05
_REMOVE = "Remove it: the branch has no admissible slot, since no last weight layer follows its last batch norm"


def _graph(subject: Subject) -> ModelGraph:
    assert subject.graph is not None
    return subject.graph


def _branch_dropouts(subject: Subject) -> list[BranchDropout]:
    """Dropouts in branches with batch norm; those that always drop are left out where a rule would speak of any."""
    found = read_branch_dropouts(_graph(subject))
    ends = [item.branch.end for item in found]
    if all(item.verdict is Verdict.ADMISSIBLE for item in found) and len(set(ends)) == len(ends):
        return found
    always_on = _always_on(subject, [item.dropout for item in found])
    return [item for item in found if item.dropout.node not in always_on]


def _always_on(subject: Subject, dropouts: Sequence[Dropout]) -> frozenset[Node]:
    if subject.model is None or not dropouts:
        return frozenset()
    return find_always_on(subject.model, subject.example_inputs, dropouts)


def _variance_shift(subject: Subject) -> dict[str, float]:
    """The measured ratio per norm; empty where the subject holds no real batch of two or more (zeros have no variance to shift).

    Also where the training pass could not be read whole: it may not run with these inputs alone.
    """
    tensors = [leaf for leaf in tree_leaves(subject.example_inputs) if isinstance(leaf, Tensor)]
    if subject.model is None or not subject.measure or any(t.is_meta or t.dim() == 0 or t.shape[0] < 2 for t in tensors):
        return {}
    if _graph(subject).unseen:
        return {}
    if tensors and all(bool((tensor == tensor.flatten()[:1]).all()) for tensor in tensors):
        return {}
    return measure_variance_shift(subject.model, subject.example_inputs)


def _evidence(subject: Subject, norms: Sequence[Norm]) -> list[Evidence]:
    ratios = subject.once(_variance_shift)
    measured = {norm.module: ratios[norm.module] for norm in norms if norm.module in ratios}
    if not measured:
        return []
    worst = min(measured, key=lambda path: measured[path])
    return [Evidence(f"variance of the input of {worst}, eval over train", measured[worst], expected="1")]


def _place(node: Node) -> Place:
    return Place(node.module, node.source)


def _observe(subject: Subject, found: Sequence[BranchDropout], message: str) -> Iterator[Observation]:
    """One observation for the dropouts that can be moved, one for those that have nowhere to go."""
    for has_slot in (True, False):
        group = [item for item in found if (item.slot is not None) is has_slot]
        if group:
            yield Observation(
                message=message,
                places=[_place(item.dropout.node) for item in group],
                evidence=_evidence(subject, [item.norm_after for item in group if item.norm_after is not None]),
                advice=_MOVE if has_slot else _REMOVE,
                fix_safety=None if has_slot else FixSafety.DISPLAY,
                cause="" if has_slot else "no admissible slot",
            )


@rule(
    "NK101",
    "dropout-before-batch-norm",
    mark=Mark.PUBLISHED,
    source=PAPER,
    fix=place_dropout,
    fix_safety=FixSafety.SAFE,
)
def dropout_before_batch_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an active dropout in a residual branch that a batch norm of the same branch reads, directly or through layers.

    Why it hurts
    Dropout raises the variance of what the batch norm sees in training and not in evaluation, so the running variance
    is wrong for evaluation. With keep probability 0.5 the variance in evaluation is 0.40 to 0.50 of that in training at
    the batch norms behind it (derived, checked numerically); after the last batch norm it is 1.

    Size and limits (docs/value.md, 8 seeds, a pre-activation network of six blocks on 300 digits): with p = 0.5 moving the dropout lowered
    the held-out loss from 0.144 to 0.120, by 0.024 (95 % interval 0.005 to 0.043), and accuracy rose by half a point; with p = 0.3 by 0.015
    (0.001 to 0.030). New running statistics alone win most of it back: the gap they close fell from 0.018 to 0.001. No dropout did as well
    as the moved one, so this is what misplaced dropout costs, not what dropout gains. Larger networks were not measured.

    Evidence
    The variance of the norm's input in eval over train mode, measured on this model and batch with dropout off and on.

    Example
    The branch of a WideResNet block:

    ```python
    from torch import nn

    branch = nn.Sequential(
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Dropout(0.3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
    )  # beside a shortcut
    ```

    Use instead
    One dropout after the last batch norm and before the last weight layer:

    ```python
    branch = nn.Sequential(
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(64, 64, 3, padding=1),
    )
    ```

    Fix and its safety
    place_dropout moves it there and keeps p; safe: the output in eval mode is the same. A branch that ends in a batch
    norm (post-activation blocks, MBConv) has no admissible slot: the dropout is reported and left alone.

    Source
    Published: the placement is stated in the abstract of arXiv 2302.06112. Derived: the test on the traced graph, and
    that a branch ending in a batch norm has no admissible slot.
    """
    found = [item for item in subject.once(_branch_dropouts) if item.verdict is Verdict.BEFORE_NORM]
    yield from _observe(subject, found, "Dropout before a batch norm inside a residual branch")


@rule(
    "NK102",
    "dropout-after-last-weight",
    mark=Mark.PUBLISHED,
    source=PAPER,
    fix=place_dropout,
    fix_safety=FixSafety.SAFE,
)
def dropout_after_last_weight(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an active dropout at the end of a residual branch with batch norm, after its last weight layer.

    Why it hurts
    Its noise enters the trunk undamped and the next block's batch norm sees another variance in training than in
    evaluation. Before the weight layer the shift was smaller or equal in every case we checked: with keep 0.5 and weights
    of mean +-0.02 the variance ratio eval over train is 0.42 to 0.43 before the layer and 0.25 to 0.27 after it (derived).

    Evidence
    The place in the traced branch: no weight layer and no batch norm follows the dropout before the addition.

    Example
    ```python
    from torch import nn

    branch = nn.Sequential(
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Dropout(0.3),
    )  # beside a shortcut
    ```

    Use instead
    ```python
    branch = nn.Sequential(
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(64, 64, 3, padding=1),
    )
    ```

    Fix and its safety
    place_dropout moves it before the last weight layer and keeps p; safe: the output in eval mode is the same. Where a
    batch norm follows the last weight layer there is no admissible slot and the dropout is left alone.

    Source
    Published: the placement before the last weight layer is stated in the abstract of arXiv 2302.06112. Derived: the
    test on the traced graph and the numbers above.
    """
    found = [item for item in subject.once(_branch_dropouts) if item.verdict is Verdict.AFTER_LAST_WEIGHT]
    yield from _observe(subject, found, "Dropout after the last weight layer of a residual branch")


@rule(
    "NK103",
    "several-dropouts-in-branch",
    mark=Mark.PUBLISHED,
    source=PAPER,
    fix=place_dropout,
    fix_safety=FixSafety.SAFE,
)
def several_dropouts_in_branch(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds more than one active dropout in one residual branch with batch norm.

    Why it hurts
    The paper's advice is one dropout in the branch; a second one stands outside the admissible slot or doubles the
    noise there.

    Size and limits: two dropouts of p = 0.3 behind each other are one of p = 0.51, whose noise p/(1-p) is 1.04 in place of 0.43 (derived).
    One that stands in front of a batch norm costs what NK101 names. What the second one costs alone was not measured, and a network that
    overfits may want the stronger noise: then raise the p of the one.

    Evidence
    The number of active dropouts in the branch.

    Example
    ```python
    from torch import nn

    branch = nn.Sequential(
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(64, 64, 3, padding=1),
    )  # beside a shortcut
    ```

    Use instead
    The one before the last weight layer alone:

    ```python
    branch = nn.Sequential(
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(64, 64, 3, padding=1),
    )
    ```

    Fix and its safety
    place_dropout keeps the one in the admissible slot (or moves the first there) and switches the others off; safe: the
    output in eval mode is the same.

    Source
    Published: "one dropout" is stated in the abstract of arXiv 2302.06112. Derived: the count on the traced graph.
    """
    by_branch: dict[Node, list[BranchDropout]] = {}
    for item in subject.once(_branch_dropouts):
        by_branch.setdefault(item.branch.end, []).append(item)
    crowded = [group for group in by_branch.values() if len(group) > 1]
    if crowded:
        worst = max(len(group) for group in crowded)
        yield Observation(
            message="More than one active dropout in a residual branch",
            places=[_place(item.dropout.node) for group in crowded for item in group],
            evidence=[Evidence("active dropouts in one branch", worst, expected="1", is_measured=False)],
            advice=_MOVE,
        )


@rule(
    "NK104",
    "dropout-after-global-pooling",
    mark=Mark.PUBLISHED,
    source=PAPER,
    fix=place_dropout,
    fix_safety=FixSafety.UNSAFE,
    severity=Severity.NOTE,
)
def dropout_after_global_pooling(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an active dropout between global average pooling and the layer after it, in networks with batch norm before the pooling. Silent
    where the pooling has one position to average, and where an average is joined with a maximum.

    Why it hurts
    Dropping a pooled feature removes it for the whole image. The noise after pooling is (1-keep)/keep E[g^2] with g the
    pooled value, before pooling (1-keep)/keep mean(x^2)/N over N positions, which is never more for x >= 0 (derived;
    16 times less for N = 49 half-normal features at keep 0.8).

    Evidence
    The number of positions that the pooling averages.

    Example
    The head of torchvision's EfficientNet:

    ```python
    from torch import nn

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000))
    ```

    Use instead
    ```python
    head = nn.Sequential(nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))
    ```

    Fix and its safety
    place_dropout puts an element-wise dropout of the same p before the pooling. The output in eval mode is the same, but the noise that
    reaches the classifier is much weaker there (the formulas above): a p that was tuned after the pooling is small before it, and where
    the dropout was needed the network then fits worse (docs/value.md). So the fix is unsafe: it changes what is trained.
    `place_dropout(model, inputs, head_p="equal_strength")` sets the p of equal strength, measured on the inputs with the weights there are;
    set before training it did not do as well as the dropout behind the pool either (docs/value.md).
    Pooling written as a function in the middle of a forward method cannot be reached and is listed as skipped.

    Source
    Published: dropout before global average pooling is stated in the abstract of arXiv 2302.06112; element-wise as in the
    authors' repository. Derived: the noise formulas. A hidden layer between pooling and dropout is not judged.
    """
    found = read_head_dropouts(_graph(subject))
    always_on = _always_on(subject, [item.dropout for item in found])
    found = [item for item in found if item.dropout.node not in always_on]
    if found:
        pool = found[0].head.pool
        positions = pool.inputs[0].numel / max(pool.numel, 1)
        yield Observation(
            message="Dropout after global pooling in the head",
            places=[_place(item.dropout.node) for item in found],
            evidence=[Evidence("positions averaged by the pooling", positions, is_measured=False)],
            advice=f"Move it, element-wise, before the pooling ({_place(pool)}), where the same p is much weaker "
            '(place_dropout(model, example_inputs, head_p="equal_strength") sets a stronger one); or keep it if it regularizes well',
        )


@rule(
    "NK105",
    "dropout-upstream-of-batch-norm",
    mark=Mark.DERIVED,
    source="derived from arXiv 2302.06112: the variance argument without a residual branch",
    preview=True,
)
def dropout_upstream_of_batch_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an active dropout outside residual branches whose output reaches a batch norm, or one in a branch without batch norm whose
    addition a batch norm reads (post-norm blocks). A dropout on a gate is left out: it scales the signal and is not on its way.

    Why it hurts
    The batch norm behind it sees another variance in training than in evaluation, as in NK101; outside a branch no
    shortcut damps the shift, but layers between may.

    Evidence
    The variance of the norm's input in eval over train mode, measured on this model and batch; silent where it is within 0.05 of 1.

    Example
    A VGG with batch norm; drop_rate in a DenseNet:

    ```python
    from torch import nn

    layers = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    )
    ```

    Use instead
    Dropout after the last batch norm of the network, before the global pooling:

    ```python
    layers = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
    )
    ```

    Fix and its safety
    Advice only.

    Source
    Derived: the paper states its advice for residual branches and heads; this rule applies the same variance argument
    elsewhere, and is off until selected.
    """
    found = read_free_dropouts(_graph(subject))
    always_on = _always_on(subject, [dropout for dropout, _ in found])
    ratios = subject.once(_variance_shift) if found else {}
    found = [
        (dropout, norm) for dropout, norm in found if dropout.node not in always_on and abs(ratios.get(norm.module, 0.0) - 1) >= _NEGLIGIBLE
    ]
    if found:
        yield Observation(
            message="Dropout upstream of a batch norm, in no residual branch that holds one",
            places=[_place(dropout.node) for dropout, _ in found],
            evidence=_evidence(subject, [norm for _, norm in found]),
            advice="Move it behind the last batch norm of the network, or remove it",
        )
