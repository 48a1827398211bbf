"""Which losses went into the gradients of which optimizer since its last step. Derived here."""

from __future__ import annotations

__all__ = ["LossRecorder", "Seen"]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pl_normkit.methods.nan_safety.diagnosis.rerun import Batch

MOST = 64
"""Losses kept for an optimizer that does not step; older ones are folded into one."""
OPAQUE = ("CheckpointFunctionBackward",)
"""Autograd nodes that hide which parameters are behind them."""


@dataclass(frozen=True)
class Seen:
    """A loss whose gradients are in the sum, and the batch it came from."""

    loss: Tensor | None
    batch: Batch | None

    def is_bad(self) -> bool:
        return self.loss is not None and not bool(torch.isfinite(self.loss).all())


class LossRecorder:
    """The losses of each optimizer since its last step, each with its batch.

    With several optimizers a loss counts for those whose parameters its graph reaches (a discriminator's NaN does not cost the generator
    its step), and for all of them where that cannot be seen.

    Attributes:
        heard: a loss was seen since `heard` was last set to False.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, every_batch: bool) -> None:
        self._waiting: dict[int, list[Seen]] = {id(optimizer): [] for optimizer in optimizers}
        self._optimizers = list(optimizers)
        self._every_batch = every_batch
        self._batch: Batch | None = None
        self._announced: Tensor | None = None
        self._listens = True
        self.heard = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in the block (a step run again) is not what is trained."""
        self._listens = False
        try:
            yield
        finally:
            self._listens = True

    def begin(self, batch: Batch | None) -> None:
        """A new batch, whose losses are to come."""
        self._batch = batch
        if self._every_batch and batch is not None:
            for waiting in self._waiting.values():
                waiting.append(Seen(None, batch))

    def saw(self, loss: Tensor) -> None:
        """Called before the backward of `loss`."""
        if not self._listens:
            return
        self._announced, self.heard = loss, True
        seen = Seen(loss.detach(), self._batch)
        for optimizer in self._reached(loss):
            waiting = self._waiting[id(optimizer)]
            waiting.append(seen)
            if len(waiting) > MOST and not self._every_batch:
                first, second, *_ = waiting
                waiting[:2] = [second if first.loss is None else first if second.loss is None else _folded(first.loss, second)]

    def of(self, optimizer: Optimizer) -> list[Seen]:
        """The losses in the gradients of `optimizer`, which makes its step now."""
        seen = self._waiting.get(id(optimizer), [])
        self._waiting[id(optimizer)] = []
        return seen or [Seen(None, self._batch)]

    def may_be_bad(self) -> bool:
        """Whether the last losses are not finite, or none was seen. Waits for the device."""
        return not self.heard or any(seen.is_bad() for waiting in self._waiting.values() for seen in waiting[-1:])

    def watch(self) -> Callable[[], None]:
        """See every loss whose backward is run by hand, or whose gradients are asked for; returns what ends that."""
        original, original_grad = torch.autograd.backward, torch.autograd.grad

        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            if grad_tensors is None and kwargs.get("grad_variables") is None and len(args) < 3:
                for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
                    if tensor is not self._announced and tensor.numel() == 1:
                        self.saw(tensor)
            self._announced = None
            original(tensors, grad_tensors, *args, **kwargs)

        def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
            if grad_outputs is None and self._are_trained(inputs):
                for tensor in [outputs] if isinstance(outputs, Tensor) else outputs:
                    if isinstance(tensor, Tensor) and tensor.numel() == 1:
                        self.saw(tensor)
            return original_grad(outputs, inputs, grad_outputs, *args, **kwargs)

        def undo() -> None:
            if torch.autograd.backward is backward:
                torch.autograd.backward = original
            if torch.autograd.grad is grad:
                torch.autograd.grad = original_grad

        torch.autograd.backward, torch.autograd.grad = backward, grad
        return undo

    def _are_trained(self, inputs: Any) -> bool:
        """Whether gradients of parameters are asked for: those of inputs are a penalty, not what is trained on."""
        asked = {id(tensor) for tensor in ([inputs] if isinstance(inputs, Tensor) else inputs)}
        return any(id(p) in asked for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"])

    def _reached(self, loss: Tensor) -> list[Optimizer]:
        if len(self._optimizers) == 1:
            return self._optimizers
        found = _leaves(loss)
        reached = [o for o in self._optimizers if found and any(id(p) in found for group in o.param_groups for p in group["params"])]
        return reached or self._optimizers


def _leaves(loss: Tensor) -> set[int]:
    """Ids of the parameters behind `loss`; empty where its graph hides some."""
    waiting, seen, found = [loss.grad_fn], {loss.grad_fn}, set()
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() in OPAQUE:
            return set()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _folded(loss: Tensor, second: Seen) -> Seen:
    """One loss that is finite where both are."""
    assert second.loss is not None
    return Seen((loss * 0).sum() + (second.loss * 0).sum().to(loss.device), second.batch)
