"""Run a training step on corner batches made from a real one: one sample, constant inputs, one class, all ignored, empty masks."""

from __future__ import annotations

__all__ = ["StepCall", "Stressed", "stress_step"]

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis
from pl_normkit.methods.nan_safety.diagnosis.replay import RandomState
from pl_normkit.methods.nan_safety.diagnosis.rerun import Batch, diagnose_batches
from pl_normkit.methods.nan_safety.losses.arguments import Arguments, Role
from pl_normkit.methods.nan_safety.losses.search import IgnoredIndices

Context = Callable[[], AbstractContextManager[Any]]
Make = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepCall:
    """A module with the batch that its training step is to be stressed with; `Subject.loss_call` takes one."""

    module: nn.Module
    batch: Any
    batch_index: int = 0
    context: Context = nullcontext


@dataclass(frozen=True)
class Stressed:
    """A corner batch that a training step does not survive.

    Attributes:
        batch: that batch.
        changed: how it differs from the real one.
        diagnosis: the first tensor that was not finite; None where the step raised.
        error: what it raised, "" where the loss or a gradient is not finite.
    """

    batch: Any
    changed: str
    diagnosis: Diagnosis | None
    error: str = ""

    @property
    def cause(self) -> tuple[str, str, str]:
        found = self.diagnosis
        return (self.error, "", "") if found is None else (found.kind, found.op, found.source)


def stress_step(module: nn.Module, batch: Any, *, batch_index: int = 0, context: Context = nullcontext) -> list[Stressed]:
    """Run `module.training_step` on corner batches made from `batch`, at most one failure for each cause.

    Not more than nine steps are run: the real batch (where that fails itself nothing else is tried), one sample, floating tensors at
    their smallest, largest and mean value, labels of one class, labels that the loss ignores, and empty masks. Nothing is logged and no
    optimizer steps; buffers, attributes, gradients and every RNG are put back.

    Args:
        module: a LightningModule, or any module with `training_step(batch, batch_idx)`.
        batch: a real batch, a nest of tensors on the module's device.
        batch_index: passed to the step.
        context: the precision context of a training step.

    >>> import torch
    >>> from pl_normkit import stress_step
    >>> class Masked(torch.nn.Linear):
    ...     def training_step(self, batch, batch_idx):
    ...         return self(batch["x"])[batch["mask"]].mean()
    >>> batch = {"x": torch.rand(4, 3), "mask": torch.tensor([True, False, True, True])}
    >>> [failure.changed for failure in stress_step(Masked(3, 1), batch)]
    ["batch['mask'] := nothing"]
    """
    failures: dict[tuple[str, str, str], Stressed] = {}
    random_state = RandomState.now()
    ignored = IgnoredIndices()

    def run(values: Any, words: str) -> Stressed | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found, _, _ = diagnose_batches(module, [Batch(values, batch_index, random_state)], context)
            except Exception as error:  # a crash on a corner batch is what this looks for
                return Stressed(values, words, None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            finally:
                random_state.use()
        return None if found.kind == "unknown" else Stressed(values, words, found)

    with ignored:
        real = run(batch, "the real batch")
    if real is not None:
        return [real] if not real.error else []
    for words, values in _corners(batch, sorted(ignored.found)):
        failure = run(values, words)
        if failure is not None:
            failures.setdefault(failure.cause, failure)
    return list(failures.values())


def _corners(batch: Any, ignored: list[int]) -> Iterator[tuple[str, Any]]:
    arguments = Arguments.read(_named, (batch,), {}, {}, ())
    roles = {role: [p for p in arguments.tensors if arguments.roles[p] is role] for role in Role}
    values, labels, masks = roles[Role.VALUES] + roles[Role.FREE], roles[Role.LABELS], roles[Role.MASK]
    changes: list[tuple[str, list[int], Make]] = [
        ("one sample", _batched(arguments), lambda t: t[:1]),
        (":= its smallest value", values, lambda t: t.amin().expand_as(t)),
        (":= its largest value", values, lambda t: t.amax().expand_as(t)),
        (":= its mean", values, lambda t: t.mean().expand_as(t)),
        (":= one class", labels, lambda t: t.flatten()[:1].view([1] * t.dim()).expand_as(t)),
        *((f":= {index} (ignored)", labels, lambda t, index=index: torch.full_like(t, index)) for index in ignored[:1]),
        (":= nothing", masks, torch.zeros_like),
    ]
    for words, positions, make in changes:
        if positions:
            moved = arguments.replaced({p: make(arguments.tensor(p).detach()).contiguous() for p in positions})
            names = "" if words == "one sample" else f"{' and '.join(arguments.names[p] for p in positions)} "
            yield names + words, moved.plain()[0]


def _named(batch: Any) -> None:
    """Gives the argument its name."""


def _batched(arguments: Arguments) -> list[int]:
    """Tensors as long as most of them are, where that is more than one."""
    lengths = [len(arguments.tensor(p)) for p in arguments.tensors if arguments.tensor(p).dim()]
    size = max(set(lengths), key=lengths.count, default=0)
    return [p for p in arguments.tensors if size > 1 and arguments.tensor(p).dim() and len(arguments.tensor(p)) == size]
