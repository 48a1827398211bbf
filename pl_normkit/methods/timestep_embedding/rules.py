"""NK801 to NK804: norms that take a time away which enters just before them."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pl_normkit.findings import Evidence, FixSafety, Place, Severity
from pl_normkit.graph import Kind, ModelGraph, call_arguments
from pl_normkit.methods.timestep_embedding.find import TimeInjection, TimeNorm, find_time_injections
from pl_normkit.methods.timestep_embedding.fix import CHANNELS_PER_GROUP, apply_fewer_groups, apply_positional_time
from pl_normkit.methods.timestep_embedding.measure import VANISHED, WEAKENED, NormAwareness, compare_calls
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

SOURCE = "arXiv 2405.14126, abstract; thresholds derived here: tests/methods/timestep_embedding/test_rules.py"


@dataclass(frozen=True)
class _Judged:
    """A norm that takes something of a time: the share that is left, and what was measured (None for a share by the settings)."""

    injection: TimeInjection
    norm: TimeNorm
    share: float
    measured: NormAwareness | None

    @property
    def place(self) -> Place:
        return Place(self.norm.module, self.norm.norm.node.source)


@rule(
    "NK801",
    "time-vanishes",
    mark=Mark.PUBLISHED,
    source=SOURCE,
    needs=(Needs.GRAPH,),
    fix=apply_positional_time,
    fix_safety=FixSafety.UNSAFE,
)
def time_vanishes(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds norms that leave less than a tenth of a time, class or noise level that is added or concatenated before them.

    Why it hurts
    An instance norm takes away every offset that is constant in space, and a batch norm one that the whole batch shares too. What follows
    cannot tell one time from another; only what zero padding leaks at the border of the image is left.

    Evidence
    The share of the time signal behind the norm, measured with circular padding; without weights or inputs it follows from the settings.

    Example
    ```python
    import torch
    from torch import nn


    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.time, self.norm = nn.Conv2d(3, 64, 3), nn.Linear(16, 64), nn.InstanceNorm2d(64)

        def forward(self, x, time):
            return self.norm(self.conv(x) + self.time(time)[:, :, None, None])
    ```

    Use instead
    ```python
    from pl_normkit.nn import PositionalTimeEmbedding


    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.time, self.norm = nn.Conv2d(3, 64, 3), PositionalTimeEmbedding(16, 64), nn.InstanceNorm2d(64)

        def forward(self, x, time):
            h = self.conv(x)
            return self.norm(h + self.time(time, h))
    ```

    Fix and its safety
    apply_positional_time lets the time vary over positions; unsafe: the function changes. Injection behind the norm helps as well:
    pl_normkit.nn.TimeAfterNorm and FiLMNorm, or resnet_time_scale_shift="scale_shift" of a diffusers UNet.

    Source
    Published: the abstract of arXiv 2405.14126 states that batch norm and, depending on channels and groups, group norm remove the time.
    The threshold is derived.
    """
    found = [judged for judged in _judged(subject) if judged.share < VANISHED]
    if found:
        yield Observation(
            message="The time vanishes in the norm right behind it",
            places=[judged.place for judged in found],
            evidence=[_evidence(min(found, key=lambda judged: judged.share), VANISHED)],
            advice="Let the time vary over positions (pl_normkit.apply_positional_time), or bring it in behind the norm",
        )


@rule(
    "NK802",
    "time-weakened",
    mark=Mark.DERIVED,
    source=SOURCE,
    needs=(Needs.GRAPH,),
    severity=Severity.NOTE,
    fix=apply_positional_time,
    fix_safety=FixSafety.UNSAFE,
)
def time_weakened(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds norms that leave between a tenth and six tenths of a time that is added or concatenated before them.

    Why it hurts
    A group norm takes the mean of each group from the time: of two channels per group half of its variance is lost.

    Evidence
    The share of the time signal behind the norm, measured with circular padding; without weights or inputs 1 - groups / channels.

    Example
    ```python
    import torch
    from torch import nn


    class Block(nn.Module):
        def __init__(self, groups=32):
            super().__init__()
            self.conv, self.time, self.norm = nn.Conv2d(3, 64, 3), nn.Linear(16, 64), nn.GroupNorm(groups, 64)

        def forward(self, x, time):
            return self.norm(self.conv(x) + self.time(time)[:, :, None, None])
    ```

    Use instead
    ```python
    block = Block(groups=8)
    ```

    Fix and its safety
    apply_positional_time lets the time vary over positions; apply_fewer_groups keeps more of the constant part. Both are unsafe: the
    function changes.

    Source
    Derived. The abstract of arXiv 2405.14126 states the mechanism.
    """
    found = [judged for judged in _judged(subject) if VANISHED <= judged.share < WEAKENED]
    if found:
        yield Observation(
            message="The norm right behind the time takes much of it away",
            places=[judged.place for judged in found],
            evidence=[_evidence(min(found, key=lambda judged: judged.share), WEAKENED)],
            advice="Use fewer groups (pl_normkit.apply_fewer_groups), or let the time vary over positions (apply_positional_time)",
        )


@rule(
    "NK803",
    "few-channels-per-group",
    mark=Mark.DERIVED,
    source=SOURCE,
    needs=(Needs.GRAPH,),
    severity=Severity.NOTE,
    fix=apply_fewer_groups,
    fix_safety=FixSafety.UNSAFE,
    preview=True,
)
def few_channels_per_group(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds group norms behind a time with fewer than 8 channels per group, where NK801 and NK802 have nothing to say.

    Why it hurts
    The mean of each group goes: of m channels per group 1 / m of the variance of the time is lost, more than an eighth below 8.
    A preview: 4 channels per group keep three quarters of it, many published diffusion networks have as few (32 groups of 128
    channels), and no gain of fewer groups was measured here.

    Evidence
    Channels per group.

    Example
    ```python
    import torch
    from torch import nn


    class Block(nn.Module):
        def __init__(self, groups=32):
            super().__init__()
            self.conv, self.time, self.norm = nn.Conv2d(3, 128, 3), nn.Linear(16, 128), nn.GroupNorm(groups, 128)

        def forward(self, x, time):
            return self.norm(self.conv(x) + self.time(time)[:, :, None, None])
    ```

    Use instead
    ```python
    block = Block(groups=16)
    ```

    Fix and its safety
    apply_fewer_groups sets num_groups; weights stay, the statistics are others: retrain. In diffusers: norm_num_groups=.

    Source
    Derived. arXiv 2405.14126 lists fewer groups among its remedies; the number 8 is ours.
    """
    found = [
        judged
        for judged in _judged(subject)
        if judged.share >= WEAKENED and judged.norm.norm.kind == "group" and judged.norm.channels_per_group < CHANNELS_PER_GROUP
    ]
    if found:
        fewest = min(judged.norm.channels_per_group for judged in found)
        yield Observation(
            message="Group norms right behind the time have few channels per group",
            places=[judged.place for judged in found],
            evidence=[Evidence("fewest channels per group", fewest, f"at least {CHANNELS_PER_GROUP}", is_measured=False)],
            advice=f"Use fewer groups, so that each has {CHANNELS_PER_GROUP} channels or more: pl_normkit.apply_fewer_groups",
        )


@rule(
    "NK804",
    "time-train-and-eval-differ",
    mark=Mark.DERIVED,
    source=SOURCE,
    needs=(Needs.GRAPH,),
    fix=apply_positional_time,
    fix_safety=FixSafety.UNSAFE,
)
def train_and_eval_differ(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds batch norms behind a time that the whole batch shares: it cancels in training and not in evaluation.

    Why it hurts
    In training the mean of the batch takes the time away, so the layers behind learn without it. In evaluation running statistics stand
    for that mean, and the time comes through to layers that never saw it. Evaluation statistics in training are no way out.

    Evidence
    The share of the time signal behind the norm with the statistics of the batch and, where it was measured, with the running ones.

    Example
    ```python
    import torch
    from torch import nn


    class ConcatConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, t, x):  # t: one number
            return self.norm(self.conv(torch.cat([t * torch.ones_like(x[:, :1]), x], dim=1)))
    ```

    Use instead
    ```python
    from pl_normkit import apply_positional_time

    model = ConcatConv()
    apply_positional_time(model, (torch.tensor(0.0), torch.randn(2, 3, 8, 8)))
    ```

    Fix and its safety
    apply_positional_time lets the time vary over positions; unsafe: the function changes. A group norm of few groups keeps the time
    alike in training and evaluation.

    Source
    Derived. The abstract of arXiv 2405.14126 states that the batch norm cancels the time.
    """
    found = [judged for judged in _judged(subject) if judged.norm.norm.kind == "batch"]
    if found:
        evidence = [_evidence(found[0], WEAKENED)]
        measured = [judged.measured.evaluation for judged in found if judged.measured is not None]
        evidence += [Evidence("share of the time behind the norm, in evaluation", share) for share in measured[:1] if math.isfinite(share)]
        yield Observation(
            message="A time that the batch shares cancels in batch norm in training, and not in evaluation",
            places=[judged.place for judged in found],
            evidence=evidence,
            advice="Let the time vary over positions (pl_normkit.apply_positional_time), or use a group norm of few groups",
        )


def _evidence(judged: _Judged, least: float) -> Evidence:
    what = f"share of the time behind {judged.norm.module or 'the norm'}"
    return Evidence(what, judged.share, f"at least {least:g}", is_measured=judged.measured is not None)


def _judged(subject: Subject) -> list[_Judged]:
    return subject.once(_judge)


def _judge(subject: Subject) -> list[_Judged]:
    """Norms that take something of a time. Where the model can be run, the share is measured; a norm that no time reaches is left out."""
    assert subject.graph is not None
    reached = {
        norm.norm.node: (injection, norm)
        for injection in find_time_injections(subject.graph)
        for norm in injection.norms
        if norm.kept < 1  # a norm behind several times is judged once
    }
    measured = _measure(subject, subject.graph, [injection for injection, _ in reached.values()]) if reached else {}
    found = []
    for injection, norm in reached.values():
        numbers = measured.get(norm.module)
        share = norm.kept if numbers is None else numbers.circular
        if not math.isnan(share):
            found.append(_Judged(injection, norm, share, numbers))
    return found


def _measure(subject: Subject, graph: ModelGraph, injections: list[TimeInjection]) -> dict[str, NormAwareness]:
    """Two calls that differ in the inputs behind the time; empty where the model cannot be run on inputs that are known."""
    if not subject.measure or not isinstance(subject.model, nn.Module) or subject.example_inputs is None:
        return {}
    first = call_arguments(subject.example_inputs)
    tensors = [leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)]
    inputs = [node for node in graph.nodes if node.kind is Kind.INPUT and isinstance(node.target.meta.get("val"), Tensor)]
    if [tensor.shape[1:] for tensor in tensors] != [node.shape[1:] for node in inputs] or any(tensor.is_meta for tensor in tensors):
        return {}
    times = {source for injection in injections for source in injection.sources}
    device = next((tensor.device for tensor in (*subject.model.parameters(), *subject.model.buffers())), torch.device("cpu"))
    second = _replaced(first, [_other_time(t) if node in times else t for t, node in zip(tensors, inputs, strict=True)], device)
    found = compare_calls(subject.model, _replaced(first, tensors, device), second)
    return {norm.module: norm for norm in found.norms}


def _replaced(arguments: Any, tensors: list[Tensor], device: torch.device) -> Any:
    leaves, structure = tree_flatten(arguments)
    left = iter(tensors)
    return tree_unflatten([next(left).to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def _other_time(time: Tensor) -> Tensor:
    """Another value that the model accepts wherever it accepts this one: never larger than the largest, but for 0, which becomes 1."""
    if time.dtype is torch.bool:
        return ~time
    if not time.is_floating_point():
        return torch.where(time > 1, time // 2, 1 - time)
    return torch.where(time.abs() >= 1, time / 2, torch.where(time < 0.5, time + 0.5, time - 0.5))
