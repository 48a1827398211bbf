"""Decisions that stay on the device: fused optimizers take the flag as `found_inf`, and no step waits for it. Derived here."""

from __future__ import annotations

__all__ = ["DeviceFlags"]

from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from pl_normkit.methods.nan_safety.guard.decision import Verdict
from pl_normkit.methods.nan_safety.guard.running import Flag, Step

if TYPE_CHECKING:
    from pl_normkit.methods.nan_safety.guard.step_guard import StepGuard

LAG = 2
"""Steps after which ranks read their flags: the same number on all, so that they report together."""


class DeviceFlags:
    """The flags of the steps of one guard, from the device to the report."""

    def __init__(self, guard: StepGuard) -> None:
        self._guard = guard

    def count_all(self) -> None:
        """Count what is decided, reported or not. Waits for the device."""
        for flag in self._guard.running.flags:
            self._count(flag)

    def offer(self, optimizer: Optimizer, step: Step) -> None:
        """Hand `found_inf` to the fused optimizer; its value is read when it has arrived here."""
        run = self._guard.running
        answers = self._guard.measured(optimizer, step)
        bad = (answers[:5].sum() > 0).float()
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        run.shadow.settle(bad)
        arrived = torch.cuda.Event() if answers.is_cuda else None  # type: ignore[no-untyped-call]
        run.flags.append(Flag(answers.to("cpu", non_blocking=True), arrived, step.seen, self._guard.where()))
        if arrived is not None:
            arrived.record()
        step.deferred = True

    def read(self, *, wait: bool = False) -> None:
        """Report the flags that have arrived; waits for none unless asked to, or where ranks have to report together."""
        run = self._guard.running
        while run.flags:
            flag = run.flags[0]
            if run.around.distributed:
                if len(run.flags) <= LAG and not wait:
                    return
            elif not wait and flag.arrived is not None and not flag.arrived.query():
                return
            run.flags.popleft()
            verdict = self._count(flag)
            if verdict.bad:
                self._guard.report(verdict, flag.seen, flag.where)
            else:
                run.buffer_row = 0

    def _count(self, flag: Flag) -> Verdict:
        if flag.arrived is not None:
            flag.arrived.synchronize()
        verdict = Verdict.of(flag.answers)
        if not flag.counted:
            flag.counted = True
            self._guard.budget.count(skipped=verdict.bad)
        return verdict
