"""Parameters and optimizer state as they were: for one step (Transaction) and for many (Snapshot). Derived here."""

from __future__ import annotations

__all__ = ["Snapshot", "Transaction", "accepts_device_flag", "steps_once"]

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

from pl_normkit.methods.nan_safety.guard.decision import has_values, local, values_in


def steps_once(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` is known to evaluate its closure once and to leave alone what has no gradient."""
    return type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, LBFGS)


def accepts_device_flag(optimizer: Optimizer) -> bool:
    """Whether the fused kernel of `optimizer` takes `found_inf` and then changes nothing.

    SGD with momentum that has made no step yet is excluded: its kernel would leave the new momentum uninitialized.
    """
    if not isinstance(optimizer, (Adam, AdamW, SGD, Adagrad)) or not all(group.get("fused") for group in optimizer.param_groups):
        return False
    fresh = isinstance(optimizer, SGD) and not optimizer.state
    return not (fresh and any(group["momentum"] for group in optimizer.param_groups))


def _is_finite(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


class Transaction:
    """Parameters and state of an optimizer as they were, for optimizers that move parameters before they know the gradient.

    Costs a copy of both on their device, for LBFGS, SAM and other optimizers that are not known to step once.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizers = [optimizer, *(held for held in vars(optimizer).values() if isinstance(held, Optimizer))]
        parameters = (p for found in self._optimizers for group in found.param_groups for p in group["params"])
        self._parameters = [parameter for parameter in dict.fromkeys(parameters) if has_values(parameter)]
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._states = [self._copied(dict(found.state)) for found in self._optimizers]

    def holds(self) -> bool:
        """Whether parameters and state are finite now. Waits for the device."""
        tensors = [parameter.detach() for parameter in self._parameters]
        tensors += [value for found in self._optimizers for entry in found.state.values() for value in values_in(entry)]
        return all(_is_finite(local(tensor)) for tensor in tensors)

    def was_finite(self) -> bool:
        """Whether the parameters were finite when it was opened. Waits for the device."""
        return all(_is_finite(local(value)) for value in self._values)

    def moved(self) -> bool:
        """Whether a parameter has another value now. Waits for the device."""
        return any(not torch.equal(local(p), local(value)) for p, value in zip(self._parameters, self._values, strict=True))

    def take_back(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._values, strict=True):
                parameter.copy_(value)
        for found, state in zip(self._optimizers, self._states, strict=True):
            found.state.clear()
            found.state.update(state)

    def _copied(self, state: dict[Any, Any]) -> dict[Any, Any]:
        """A deep copy that keeps the parameters themselves as keys and values."""
        return copy.deepcopy(state, {id(parameter): parameter for parameter in self._parameters})


class Snapshot:
    """Parameters, buffers, optimizers and schedulers, copied to the CPU, to go back to.

    Attributes:
        step: the step after which it was taken.
        uses_for_cause: how often it was gone back to for a cause that stays.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any] = (), step: int = 0) -> None:
        self.step, self.uses_for_cause = step, 0
        self._parameters = [
            (parameter, parameter.detach().to("cpu", copy=True)) for parameter in module.parameters() if has_values(parameter)
        ]
        self._buffers = [
            (owner, name, None if buffer is None else buffer.detach().to("cpu", copy=True))
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is None or has_values(buffer)
        ]
        self._optimizers = [(optimizer, _to_cpu(optimizer.state_dict())) for optimizer in optimizers]
        self._schedulers = [(scheduler, copy.deepcopy(scheduler.state_dict())) for scheduler in schedulers]

    def restore(self, lr_factor: float = 1.0) -> None:
        """Go back. `lr_factor` multiplies every learning rate and those the schedulers start from, in the snapshot too."""
        with torch.no_grad():
            for parameter, value in self._parameters:
                parameter.copy_(value)
            for owner, name, kept in self._buffers:
                _set_buffer(owner, name, kept)
        if lr_factor != 1.0:
            self._scale(lr_factor)
        for optimizer, state in self._optimizers:
            optimizer.load_state_dict(copy.deepcopy(state))
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(copy.deepcopy(state))

    def _scale(self, factor: float) -> None:
        for _, state in self._optimizers:
            for group in state["param_groups"]:
                for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if key in group:
                        group[key] = group[key] * factor
        for _, state in self._schedulers:
            for key in ("base_lrs", "_last_lr"):
                if key in state:
                    state[key] = [rate * factor for rate in state[key]]


def _set_buffer(owner: nn.Module, name: str, kept: Tensor | None) -> None:
    """Into the tensor that is there, where it has the same shape; else a new one."""
    current = owner._buffers.get(name)
    if kept is None or current is None or current.shape != kept.shape or current.dtype != kept.dtype or current.layout != torch.strided:
        device = current.device if current is not None else next((p.device for p in owner.parameters()), torch.device("cpu"))
        owner._buffers[name] = None if kept is None else kept.clone().to(device)
    else:
        current.copy_(kept)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value
