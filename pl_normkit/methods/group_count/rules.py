"""NK811: group norms of very few channels, and batch norms that see very few samples."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterator, Sequence

from torch import nn

from pl_normkit.findings import Evidence, FixSafety, Place, Severity
from pl_normkit.graph import Norm
from pl_normkit.methods.group_count.fix import convert_small_batches
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

FEW_CHANNELS = 4
"""Channels per group below which the gradient's ratio moves by more than 10 % either way (derived: first-order formula, c = 1 / pi)."""
SMALL_BATCH = 2


@rule(
    "NK811",
    "few-values-per-norm",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/group_count/test_measure.py",
    needs=(Needs.GRAPH,),
    severity=Severity.NOTE,
    fix=convert_small_batches,
    fix_safety=FixSafety.UNSAFE,
    preview=True,
)
def few_values_per_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds group norms with fewer than 4 channels per group, and batch norms that are trained on 1 or 2 samples per device. As many groups
    as channels are an instance norm by another name and left out, unless the network has as many groups on more channels elsewhere: then
    it is a fixed number of groups that met a narrow layer.

    Why it hurts
    With few channels per group the norm removes much of the gradient that is constant in space, and all of it at one channel per group;
    the part that varies in space grows. A batch norm on one or two samples per device trains on statistics that evaluation does not use.

    Evidence
    Channels per group; samples in the batch that was given.

    Example
    ```python
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(32, 64))  # 2 channels per group
    ```

    Use instead
    ```python
    from pl_normkit import num_groups

    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(num_groups(64, "16 channels per group"), 64))
    ```

    Fix and its safety
    convert_to_group_norm puts group norms in the place of batch norms; unsafe: the function changes and running statistics go. The number
    of groups of a group norm is yours to choose: measure_isometry shows what each does.

    Source
    Derived. The abstract of arXiv 2302.03193 states that the number of groups influences the gradient; its formula is not known to us.
    What batch size makes the conversion worth while is not claimed: compare on your own data.
    """
    assert subject.graph is not None
    groups = [norm for norm in subject.graph.norms if norm.kind == "group"]
    narrow = [(norm, _channels_per_group(norm)) for norm in groups if _channels_per_group(norm) < FEW_CHANNELS]
    narrow = [(norm, size) for norm, size in narrow if size > 1 or not _is_instance_norm(norm, groups)]
    if narrow:
        yield Observation(
            message=f"Group norms have fewer than {FEW_CHANNELS} channels per group",
            places=[Place(norm.node.module, norm.node.source) for norm, _ in narrow],
            evidence=[
                Evidence("fewest channels per group", min(size for _, size in narrow), f"at least {FEW_CHANNELS}", is_measured=False)
            ],
            advice="Choose fewer groups: num_groups(channels, target) rounds to a divisor, measure_isometry shows what each does",
            fix_safety=FixSafety.DISPLAY,
            cause="group norm",
        )
    small = [norm for norm in subject.graph.norms if norm.kind == "batch" and norm.node.inputs[0].shape[0] <= SMALL_BATCH]
    if small and _batch_was_given(subject):
        yield Observation(
            message="Batch norms are trained on very few samples per device",
            places=[Place(norm.node.module, norm.node.source) for norm in small],
            evidence=[Evidence("samples per device", small[0].node.inputs[0].shape[0], f"more than {SMALL_BATCH}", is_measured=False)],
            advice="Convert them: pl_normkit.convert_to_group_norm(model); or give torch.nn.SyncBatchNorm more samples",
            cause="batch norm",
        )


def _channels_per_group(norm: Norm) -> int:
    return int(norm.node.inputs[0].shape[1] // _num_groups(norm))


def _num_groups(norm: Norm) -> int:
    return int(norm.node.argument("num_groups", 1, 1))


def _is_instance_norm(norm: Norm, norms: Sequence[Norm]) -> bool:
    """Whether a norm of one channel per group was meant as such (wav2vec 2.0, MedNeXt)."""
    return all(_channels_per_group(other) == 1 for other in norms if _num_groups(other) == _num_groups(norm))


def _batch_was_given(subject: Subject) -> bool:
    """Inputs that are made up (the command line's, on the meta device) say nothing of the batch size in training."""
    return subject.measure and isinstance(subject.model, nn.Module) and subject.optimizers != ()
