"""Optimizer steps that nothing announces: `optimizer.step()` in a plain loop, or past Lightning. Derived here."""

from __future__ import annotations

__all__ = ["RawSteps"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from pl_normkit.methods.nan_safety.guard.decision import Verdict, shared
from pl_normkit.methods.nan_safety.guard.running import Step, device_of, drop_gradients
from pl_normkit.methods.nan_safety.guard.undo import Transaction, steps_once

if TYPE_CHECKING:
    from pl_normkit.methods.nan_safety.guard.step_guard import StepGuard


class RawSteps:
    """The optimizers' own hooks, through which a guard judges such steps."""

    def __init__(self, guard: StepGuard) -> None:
        self._guard = guard
        self._steps: dict[int, Step] = {}

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """`optimizer.step()` itself: judged here, or after each call of its closure."""
        run = self._guard.running
        if run.step is not None:
            return None
        step = self._steps[id(optimizer)] = Step()
        if not steps_once(optimizer) and id(optimizer) not in run.transactions:
            run.transactions[id(optimizer)] = Transaction(optimizer)
        closure = kwargs.get("closure") or next((argument for argument in args[1:] if callable(argument)), None)
        if closure is None:
            self._judge(optimizer, step)
            return None

        def judged() -> Any:
            loss = closure()
            self._judge(optimizer, step)
            return loss

        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": judged}
        return tuple(judged if argument is closure else argument for argument in args), kwargs

    def _judge(self, optimizer: Optimizer, step: Step) -> None:
        step.evaluations += 1
        step.verdict = verdict = self._guard.look_at(optimizer, step)
        step.spoiled = verdict.bad
        step.spike = step.spike or (step.evaluations == 1 and not verdict.bad and self._guard.is_spike(optimizer, verdict))
        if step.spike or (verdict.bad and step.evaluations == 1):
            step.bad = not step.spike
        if step.bad or step.spike or verdict.bad:
            drop_gradients(optimizer)  # torch's optimizers leave alone what has no gradient; others are taken back
        elif id(optimizer) not in self._guard.running.transactions:
            self._guard.running.accept()

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._steps.pop(id(optimizer), None)
        if step is not None:
            self._guard.conclude(optimizer, step)

    def watch_scaler(self, scaler: Any) -> Callable[[], Any]:
        """A `GradScaler` that skips a step does not call the optimizer: the losses of that step are not those of the next one."""
        run, original = self._guard.running, scaler.step

        def scaled_step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            before = run.decisions
            result = original(optimizer, *args, **kwargs)
            if run.decisions == before and any(found is optimizer for found in run.optimizers):
                seen = run.losses.of(optimizer)
                bad = torch.tensor(float(any(found.is_bad() for found in seen) or bool(run.shadow.bad())), device=device_of(optimizer))
                step = Step(seen=seen, verdict=Verdict(loss=True))
                step.bad = bool(shared(bad, distributed=run.around.distributed).item())
                step.overflow = not step.bad
                self._guard.overflows += int(step.overflow)
                self._guard.conclude(optimizer, step)
            return result

        scaler.step = scaled_step
        return lambda: vars(scaler).pop("step", None)
