"""Run the training step of one batch again for its diagnosis: no logging, no optimizer step, nothing left behind.

Written for the interface of a LightningModule, without importing Lightning.
"""

from __future__ import annotations

__all__ = ["Batch", "diagnose_batches"]

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pl_normkit.methods.nan_safety.diagnosis import Diagnosis, Record, diagnose, is_bad
from pl_normkit.methods.nan_safety.replay import RandomState
from pl_normkit.preserve import preserved


@dataclass(frozen=True)
class Batch:
    """A batch as the training step got it, and the RNG it started from."""

    values: Any
    index: int
    random_state: RandomState


def diagnose_batches(
    module: nn.Module, batches: Sequence[Batch], context: Callable[[], AbstractContextManager[Any]]
) -> tuple[Diagnosis, Record | None, Batch]:
    """The first batch whose re-run is not finite, with its diagnosis; the last batch with kind "unknown" where all are finite.

    Args:
        module: has `training_step(batch, batch_idx)`; with `automatic_optimization` false its steps are left out of the re-run.
        batches: those whose gradients were summed.
        context: the precision context of a training step.
    """
    found: tuple[Diagnosis, Record | None, Batch] | None = None
    for batch in batches:
        diagnosis, record = _diagnose_one(module, batch, context)
        if found is None or found[0].kind == "unknown":
            found = (diagnosis, record, batch)
    assert found is not None
    return found


def _diagnose_one(module: nn.Module, batch: Batch, context: Callable[[], AbstractContextManager[Any]]) -> tuple[Diagnosis, Record | None]:
    losses: list[Tensor] = []

    def run() -> Tensor | None:
        batch.random_state.use()
        with context():
            outcome = _call_training_step(module, batch)
        if losses:
            return next((loss for loss in losses if is_bad(loss)), losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]))
        outcome = outcome.get("loss") if isinstance(outcome, Mapping) else outcome
        return outcome if isinstance(outcome, Tensor) else None

    with preserved(module):
        _silence(module, losses)
        return diagnose(run, module, batch.values)


def _call_training_step(module: nn.Module, batch: Batch) -> Any:
    step: Any = module.training_step
    parameters = inspect.signature(step).parameters
    takes_index = "batch_idx" in parameters or len(parameters) > 1
    return step(batch.values, batch.index) if takes_index else step(batch.values)


def _silence(module: nn.Module, losses: list[Tensor]) -> None:
    """Put harmless stand-ins before the methods of `module` that reach outside it; `preserved` takes them away."""
    stand_ins: dict[str, Any] = {
        "log": _nothing,
        "log_dict": _nothing,
        "manual_backward": lambda loss, *args, **kwargs: losses.append(loss),
    }
    if not getattr(module, "automatic_optimization", True):
        optimizers: Any = module.optimizers
        schedulers: Any = module.lr_schedulers
        stand_ins["optimizers"] = lambda *args, **kwargs: _idle(optimizers(*args, **kwargs))
        stand_ins["lr_schedulers"] = lambda *args, **kwargs: _idle(schedulers(*args, **kwargs))
    for name, stand_in in stand_ins.items():
        object.__setattr__(module, name, stand_in)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _idle(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_Idle(item) for item in value]
    return None if value is None else _Idle(value)


class _Idle:
    """An optimizer or scheduler that runs closures and does nothing else."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, *args: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> None:
        closure = closure or next((argument for argument in args if callable(argument)), None)
        if closure is not None:
            closure()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return _nothing if inspect.ismethod(value) and name not in ("toggle_model", "state_dict") else value
