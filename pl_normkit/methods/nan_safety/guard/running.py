"""What the guard remembers during one run. Plain data. Derived here."""

from __future__ import annotations

__all__ = ["Flag", "Run", "SkipStep", "Step", "Surroundings", "device_of", "drop_gradients"]

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_normkit.methods.nan_safety.guard.buffers import BufferShadow
from pl_normkit.methods.nan_safety.guard.decision import Verdict
from pl_normkit.methods.nan_safety.guard.losses_seen import LossRecorder, Seen
from pl_normkit.methods.nan_safety.guard.undo import Snapshot, Transaction
from pl_normkit.methods.nan_safety.guard.watched import Watched


class SkipStep(Exception):  # noqa: N818 - control flow, no error
    """Unwinds an optimizer's `step` before it has touched anything."""


@dataclass(frozen=True)
class Surroundings:
    """What the guard asks of the loop around it.

    Attributes:
        distributed: other ranks make the same steps, and answers are shared with them.
        sharded: each rank holds a part of the parameters; nothing is diagnosed.
        rank: of this process.
        manual: the step function makes its optimizer steps itself, by any number of optimizers.
        scaler: the float16 gradient scaler.
        schedulers: learning-rate schedulers, for "rollback".
        context: precision context of a step.
        where: step and epoch now.
        step: computes the loss of a batch again; None calls `module.training_step`.
    """

    distributed: bool = False
    sharded: bool = False
    rank: int = 0
    manual: bool = False
    scaler: Any = None
    schedulers: Sequence[Any] = ()
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    where: Callable[[], tuple[int, int]] | None = None
    step: Callable[[Any], Tensor] | None = None


@dataclass
class Step:
    """One optimizer step under way."""

    evaluations: int = 0
    seen: list[Seen] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    bad: bool = False
    spike: bool = False
    spoiled: bool = False
    deferred: bool = False
    overflow: bool = False
    scale_back: bool = False


@dataclass
class Flag:
    """A decision that was left on the device: the answers, when they arrive, and what they are about."""

    answers: Tensor
    arrived: Any
    seen: list[Seen]
    where: tuple[int, int]
    counted: bool = False


class Run:
    """One run under guard: what is watched, and where it stands.

    Attributes:
        decided: an optimizer step was made or skipped since the last window of batches began.
        last_bad: the last decision of this batch was against the step.
        spoiled: bad buffers were put back before the decision; it will be against the step.
        buffer_row: skips in a row for a buffer alone.
        passes: how often each optimizer evaluates its closure.
        bad_gradient: which gradient of the last bad step was not finite, in words.
    """

    def __init__(self, module: nn.Module, optimizers: list[Optimizer], around: Surroundings) -> None:
        self.module, self.optimizers, self.around = module, optimizers, around
        self.shadow = BufferShadow(module)
        self.losses = LossRecorder(optimizers, every_batch=not around.manual)
        self.watched = Watched(module, optimizers)
        self.transactions: dict[int, Transaction] = {}
        self.passes: dict[int, int] = {}
        self.flags: deque[Flag] = deque()
        self.step: Step | None = None
        self.snapshot: Snapshot | None = None
        self.batches = self.decisions = self.buffer_row = 0
        self.decided, self.last_bad, self.spoiled, self.bad_gradient = True, False, False, ""

    def index(self, optimizer: Optimizer) -> int:
        return next((index for index, found in enumerate(self.optimizers) if found is optimizer), 0)

    @property
    def excused(self) -> set[int]:
        """Ids of parameters that are not looked at as such: not finite from the start, or kept with the buffers."""
        return self.watched.excused | self.shadow.parameters

    def accept(self) -> int:
        """The step is good. Returns how many parameters were not finite from the start and do no harm."""
        self.shadow.accept()
        return self.watched.healthy()


def device_of(optimizer: Optimizer) -> torch.device:
    """Where its parameters are, and so the device of the collectives that go with its steps."""
    held = (parameter.device for group in optimizer.param_groups for parameter in group["params"])
    return next(held, torch.device("cpu"))


def drop_gradients(optimizer: Optimizer) -> None:
    """Leave the optimizer nothing to move its parameters by."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
