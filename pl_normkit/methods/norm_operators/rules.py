"""NK921 to NK925: norms that do not do what they are there for. The others stand in `swap_rules.py`, `weight_rules.py` and
`statistics_rules.py`."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterator

import torch
from torch import nn

from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.graph import Kind, Node
from pl_normkit.methods.norm_operators import statistics_rules as statistics_rules
from pl_normkit.methods.norm_operators import swap_rules as swap_rules
from pl_normkit.methods.norm_operators import weight_rules as weight_rules
from pl_normkit.methods.norm_operators.measure import inputs_of
from pl_normkit.methods.norm_operators.operators.dyt import DynamicTanh
from pl_normkit.methods.norm_operators.operators.prepbn import ProgressiveBatchNorm
from pl_normkit.methods.norm_operators.operators.unified import UnifiedNorm
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

FINISHED = 0.01
"""Share of the layer norm up to which a progressive norm counts as turned (derived)."""
SKIPPED = 0.05
"""Share of steps that unified normalization may leave out (derived)."""
SATURATED = 0.4
"""Share of values beyond 2 in front of a tanh (derived)."""


@rule(
    "NK921",
    "eps-hides-variance",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_rules.py",
    needs=(Needs.GRAPH, Needs.MODEL),
    preview=True,
)
def eps_hides_variance(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds layer norms and RMS norms whose eps is larger than the variance (mean square) of more than half of the rows they get.

    Why it hurts
    The norm then divides by sqrt(eps), not by what the row has: it is a constant factor. A loaded checkpoint with another eps, such as
    torch.nn.RMSNorm's default (the dtype's step) in place of 1e-5, computes another function there.

    Evidence
    The median ratio of eps and variance of the rows, measured on the given inputs.

    Example
    ```python
    from torch import nn

    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, eps=1e12), nn.Linear(8, 2))
    ```

    Use instead
    ```python
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-5), nn.Linear(8, 2))
    ```

    Fix and its safety
    None: scale the input, or give the eps with which the weights were trained.

    Source
    Derived: at a ratio of 1 the output's root mean square is 0.71. arXiv 2409.13710 (code) removes norms by an eps of 1e12 on purpose.
    """
    ratios = subject.once(_eps_ratios) if subject.measure else {}
    found = {path: ratio for path, ratio in ratios.items() if ratio > 1}
    if found:
        yield Observation(
            message="Norms divide by their eps, not by what their rows have",
            places=[Place(path) for path in found],
            evidence=[Evidence("largest median of eps / variance", max(found.values()), "below 0.1")],
            advice="Give the eps with which the weights were trained, or scale the input; ignore it where the norm is off on purpose",
        )


def _eps_ratios(subject: Subject) -> dict[str, float]:
    """For each layer norm or RMS norm that ran, the median of eps over the variance of its rows; rows of zeros hold nothing to divide."""
    assert subject.model is not None
    found: dict[str, float] = {}
    for path, (norm, x) in inputs_of(subject, (nn.LayerNorm, nn.RMSNorm)).items():
        if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) or not x.is_floating_point() or type(norm).__name__.endswith("2d"):
            continue
        rows = x.flatten(-len(norm.normalized_shape)).float()
        power = rows.var(-1, correction=0) if isinstance(norm, nn.LayerNorm) else rows.square().mean(-1)
        eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
        if (power := power[power > 0]).numel():
            found[path] = float((eps / power.clamp(min=1e-38)).median())
    return found


@rule(
    "NK922",
    "progressive-norm-not-finished",
    mark=Mark.DERIVED,
    source="derived from the code of arXiv 2405.11582: tests/methods/norm_operators/test_rules.py",
    needs=(Needs.MODEL,),
)
def progressive_norm_not_finished(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds progressive batch norms of a model in eval mode whose share of the layer norm is still above 0.01.

    Why it hurts
    Training mixes a layer norm and a batch norm; evaluation and the exported model compute the batch norm alone. Until the share is 0 the
    two are different functions, so validation says little and an export changes what was trained.

    Evidence
    The largest share.

    Example
    ```python
    from torch import nn

    from pl_normkit import swap_norms

    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    changes = swap_norms(model, to="prepbn")
    model = model.eval()
    ```

    Use instead
    ```python
    from pl_normkit.callbacks import NormSchedule

    schedule = NormSchedule(steps=1000)  # in the Trainer's callbacks: the share reaches 0 at step 1000
    ```

    Fix and its safety
    None: train on with a schedule. Setting the share by hand changes the function at once.

    Source
    Derived from the official code of SLAB, arXiv 2405.11582, whose evaluation uses the batch norm alone.
    """
    assert subject.model is not None
    shares = {
        path: float(module.share)
        for path, module in subject.model.named_modules()
        if isinstance(module, ProgressiveBatchNorm) and not module.training and not module.share.is_meta
    }
    found = {path: share for path, share in shares.items() if share > FINISHED}
    if found:
        yield Observation(
            message="Progressive norms evaluate as batch norms while they still train as layer norms",
            places=[Place(path) for path in found],
            evidence=[Evidence("largest share of the layer norm", max(found.values()), "0", is_measured=False)],
            advice="Train until the share is 0: NormSchedule(steps=...) in the Trainer's callbacks",
        )


@rule(
    "NK923",
    "unified-norm-skips",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_rules.py",
    needs=(Needs.MODEL,),
    severity=Severity.NOTE,
    preview=True,
)
def unified_norm_skips(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes unified norms that treated more than 5 % of their steps as outliers.

    Why it hurts
    On an outlier the norm uses the batch's own moment in place of the window's mean, and feeds the running moment into the window: it is
    a batch norm without mean there, and its window stands still.

    Evidence
    The largest share of such steps, counted by the norm.

    Example
    ```python
    from torch import nn

    from pl_normkit import swap_norms

    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    changes = swap_norms(model, to="unified", warmup=0)
    model[1].steps.fill_(100)
    model[1].skipped.fill_(20)
    ```

    Use instead
    ```python
    changes.undo()
    changes = swap_norms(model, to="unified", outliers=False)  # what its authors advise for language
    ```

    Fix and its safety
    None: a larger batch, or the option `outliers=False`.

    Source
    Derived; arXiv 2208.01313 (code) counts these steps and names no bound.
    """
    assert subject.model is not None
    found = {}
    for path, module in subject.model.named_modules():
        if isinstance(module, UnifiedNorm) and not module.steps.is_meta and int(module.steps) > 0:
            share = float(module.skipped) / int(module.steps)
            if share > SKIPPED:
                found[path] = share
    if found:
        yield Observation(
            message="Unified norms left out many steps as outliers",
            places=[Place(path) for path in found],
            evidence=[Evidence("largest share of outlier steps", max(found.values()), f"at most {SKIPPED}")],
            advice="Use larger batches, or swap_norms(model, to='unified', outliers=False)",
        )


@rule(
    "NK924",
    "dynamic-tanh-saturates",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_rules.py",
    needs=(Needs.GRAPH, Needs.MODEL),
    preview=True,
)
def dynamic_tanh_saturates(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds dynamic tanh layers more than 40 % of whose values lie beyond 2 in front of the tanh on the given inputs.

    Why it hurts
    Beyond 2 the slope of tanh is below 0.07: these values carry a sign and hardly any gradient.

    Evidence
    The largest share of such values.

    Example
    ```python
    from torch import nn

    from pl_normkit import swap_norms

    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    changes = swap_norms(model, to="dyt", alpha=50.0)
    ```

    Use instead
    ```python
    changes.undo()
    changes = swap_norms(model, to="dyt", alpha=0.5)
    ```

    Fix and its safety
    None: start with a smaller alpha. arXiv 2503.10622, tables 11 and 12, go down to 0.05 at width 8192.

    Source
    Derived; the cut is not tuned.
    """
    if not subject.measure:
        return
    found = {}
    for path, (norm, x) in inputs_of(subject, (DynamicTanh,)).items():
        assert isinstance(norm, DynamicTanh)
        share = float(((norm.alpha * x).abs() > 2).float().mean())
        if share > SATURATED:
            found[path] = share
    if found:
        yield Observation(
            message="Dynamic tanh layers are saturated",
            places=[Place(path) for path in found],
            evidence=[Evidence("largest share of values beyond 2", max(found.values()), f"at most {SATURATED}")],
            advice="Start with a smaller alpha: swap_norms(model, to='dyt', alpha=...)",
        )


_EVONORMS = frozenset(f"EvoNorm2d{kind}" for kind in ("B0", "B1", "B2", "S0", "S1", "S2"))


@rule(
    "NK925",
    "evonorm-misplaced",
    mark=Mark.DERIVED,
    source="derived from timm's code: tests/methods/norm_operators/test_rules.py",
    needs=(Needs.GRAPH, Needs.MODEL),
    preview=True,
)
def evonorm_misplaced(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds timm's EvoNorm layers with `apply_act=False`, which compute gamma x + beta and nothing else, and those that an activation follows.

    Why it hurts
    An EvoNorm is norm and activation in one. Without its activation none of B0 to B2 and S0 to S2 normalizes; with another one behind it
    the network applies two.

    Evidence
    The layers.

    Example
    ```python
    from timm.layers import EvoNorm2dS0
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 32, 3), EvoNorm2dS0(32, apply_act=False), nn.Conv2d(32, 8, 3))
    ```

    Use instead
    ```python
    model = nn.Sequential(nn.Conv2d(3, 32, 3), EvoNorm2dS0(32), nn.Conv2d(32, 8, 3))
    ```

    Fix and its safety
    None: use EvoNorm2dS0a or another norm where no activation is wanted, and take the second activation out.

    Source
    Derived from timm's modules, by running them.
    """
    assert subject.model is not None
    assert subject.graph is not None
    kinds = {path: module for path, module in subject.model.named_modules() if type(module).__name__.startswith("EvoNorm2d")}
    idle = [path for path, module in kinds.items() if type(module).__name__ in _EVONORMS and not module.apply_act]
    if idle:
        yield Observation(
            message="EvoNorm layers without their activation normalize nothing",
            places=[Place(path) for path in idle],
            advice="Use EvoNorm2dS0a, or another norm, where no activation is wanted",
            cause="apply_act",
        )
    last: dict[str, Node] = {node.module: node for node in subject.graph.nodes if node.module in kinds}
    doubled = [node for path, node in last.items() if path not in idle and any(user.kind is Kind.ACTIVATION for user in node.users)]
    if doubled:
        yield Observation(
            message="An activation follows an EvoNorm, which is one already",
            places=[Place(node.module) for node in doubled],
            advice="Take the activation behind it out",
            cause="activation",
        )
