"""Run the training step of one batch again for its diagnosis: no logging, no optimizer step, nothing left behind.

Written for the interface of a LightningModule, without importing Lightning.
"""

from __future__ import annotations

__all__ = ["Batch", "diagnose_batches"]

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pl_normkit.errors import DataError
from pl_normkit.methods.nan_safety.diagnosis.alone import alone, own_generators_kept, world_size
from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis, Record, diagnose, is_bad
from pl_normkit.methods.nan_safety.diagnosis.replay import RandomState
from pl_normkit.preserve import preserved

_LIBRARIES = {"builtins", "lightning", "pytorch_lightning", "torch"}


@dataclass(frozen=True)
class Batch:
    """A batch as the training step got it, and the RNG it started from."""

    values: Any
    index: int
    random_state: RandomState


def diagnose_batches(
    module: nn.Module,
    batches: Sequence[Batch],
    context: Callable[[], AbstractContextManager[Any]],
    step: Callable[[Any], Tensor] | None = None,
) -> tuple[Diagnosis, Record | None, Batch]:
    """The first batch whose re-run is not finite, with its diagnosis; the last batch with kind "unknown" where all are finite.

    No collective is called: a rank may diagnose what the others do not.

    Args:
        module: has `training_step(batch, batch_idx)`; with `automatic_optimization` false its steps are left out of the re-run.
        batches: those whose gradients were summed.
        context: the precision context of a training step.
        step: computes the loss of a batch, in place of `training_step`.

    Raises:
        DataError: a second run would take what the next batch needs, or is not possible.
    """
    _refuse_iterators(module, batches, step)
    found: tuple[Diagnosis, Record | None, Batch] | None = None
    for batch in batches:
        with alone(), own_generators_kept(module):
            diagnosis, record = _diagnose_one(module, batch, context, step)
        found = (diagnosis, record, batch)
        if diagnosis.kind != "unknown":
            break
    assert found is not None
    return found


def _refuse_iterators(module: nn.Module, batches: Sequence[Batch], step: Callable[[Any], Tensor] | None) -> None:
    training_step = getattr(module, "training_step", None)
    if step is None and training_step is None:
        raise DataError("there is no step to run again", fix="give `step=` to the guard")
    if step is None and training_step is not None and "dataloader_iter" in inspect.signature(training_step).parameters:
        raise DataError("training_step takes its batches from dataloader_iter, which a second run would advance")
    for batch in batches:
        if _iterators_in(batch.values):
            raise DataError("the batch is an iterator, which can be read once")
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if _iterators_in(value):
                raise DataError(f"{path or 'the module'} holds the iterator {name!r}, which a second run would advance")


def _iterators_in(value: Any, depth: int = 3) -> bool:
    """Also in containers and in objects of the user's own classes; those of libraries are their own affair."""
    if hasattr(value, "__next__"):
        return True
    if depth == 0 or isinstance(value, type):
        return False
    if isinstance(value, (list, tuple, Mapping)):
        return any(_iterators_in(item, depth - 1) for item in (value.values() if isinstance(value, Mapping) else value))
    is_library = type(value).__module__.partition(".")[0] in _LIBRARIES
    return not is_library and any(_iterators_in(item, depth - 1) for item in getattr(value, "__dict__", {}).values())


def _diagnose_one(
    module: nn.Module, batch: Batch, context: Callable[[], AbstractContextManager[Any]], step: Callable[[Any], Tensor] | None
) -> tuple[Diagnosis, Record | None]:
    losses: list[Tensor] = []

    def run() -> Tensor | None:
        batch.random_state.use()
        with context(), _backwards_into(losses):
            outcome = _call_training_step(module, batch) if step is None else step(batch.values)
        if losses:
            return next((loss for loss in losses if is_bad(loss)), losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]))
        outcome = outcome.get("loss") if isinstance(outcome, Mapping) else outcome
        return outcome if isinstance(outcome, Tensor) else None

    with preserved(module):
        if step is None:
            _silence(module, losses)
        return diagnose(run, module, batch.values)


def _call_training_step(module: nn.Module, batch: Batch) -> Any:
    step: Any = module.training_step
    parameters = inspect.signature(step).parameters
    takes_index = "batch_idx" in parameters or len(parameters) > 1
    return step(batch.values, batch.index) if takes_index else step(batch.values)


@contextmanager
def _backwards_into(losses: list[Tensor]) -> Iterator[None]:
    """A backward that the step runs by hand only tells its loss: the diagnosis runs it, watched."""
    original = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        losses.extend(tensor for tensor in ([tensors] if isinstance(tensors, Tensor) else tensors) if tensor.numel() == 1)

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


def _silence(module: nn.Module, losses: list[Tensor]) -> None:
    """Put harmless stand-ins before the methods of `module` that reach outside it; `preserved` takes them away."""
    stand_ins: dict[str, Any] = {
        "log": _nothing,
        "log_dict": _nothing,
        "all_gather": _one_of_each,
        "manual_backward": lambda loss, *args, **kwargs: losses.append(loss),
    }
    if not getattr(module, "automatic_optimization", True):
        optimizers: Any = module.optimizers
        schedulers: Any = module.lr_schedulers
        stand_ins["optimizers"] = lambda *args, **kwargs: _idle(optimizers(*args, **kwargs))
        stand_ins["lr_schedulers"] = lambda *args, **kwargs: _idle(schedulers(*args, **kwargs))
    for name, stand_in in stand_ins.items():
        object.__setattr__(module, name, stand_in)


def _one_of_each(data: Any, *args: Any, **kwargs: Any) -> Any:
    """What `all_gather` gives where every rank has the same."""
    ranks = world_size()
    return tree_map_only(Tensor, lambda tensor: tensor if ranks == 1 else tensor.expand(ranks, *tensor.shape), data)


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
