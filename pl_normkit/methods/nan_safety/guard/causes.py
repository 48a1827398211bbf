"""What makes every later step bad: a parameter or optimizer state that is not finite, and the setting that did it. Derived here."""

from __future__ import annotations

__all__ = ["bad_gradient", "lasting_cause", "settings_of", "state_tensors", "unusable_settings"]

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis, statistics
from pl_normkit.methods.nan_safety.guard.decision import has_values, local

SHOWN = ("lr", "eps", "weight_decay", "momentum", "betas", "alpha", "rho")
MEANT_POSITIVE = ("eps",)


def state_tensors(optimizer: Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Parameter, name and value of each entry of the optimizer's state that counts like a weight: counters and scalars do not."""
    for parameter, entry in optimizer.state.items():
        if isinstance(parameter, Tensor) and isinstance(entry, dict):
            for name, value in entry.items():
                for tensor in _tensors(value):
                    if (tensor.is_floating_point() or tensor.is_complex()) and (tensor.dim() > 0 or tensor.shape == parameter.shape):
                        yield parameter, str(name), local(tensor)


def _tensors(value: Any) -> list[Tensor]:
    return (
        [value]
        if isinstance(value, Tensor)
        else [item for item in value if isinstance(item, Tensor)]
        if isinstance(value, (list, tuple))
        else []
    )


def lasting_cause(module: nn.Module, optimizers: Sequence[Optimizer], excused: Collection[int]) -> Diagnosis | None:
    """The first parameter, else optimizer state, that is not finite; None where all are. Waits for the device.

    Args:
        module: names its parameters.
        optimizers: their settings and state are looked at.
        excused: ids of parameters that were not finite at the start of a healthy run.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    updated = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in _all_parameters(module, optimizers):
        if id(parameter) not in excused and _is_bad(local(parameter)):
            name = names.get(id(parameter), "a parameter outside the module")
            why = (
                _why(optimizers, parameter)
                if id(parameter) in updated
                else "no optimizer holds it: other code wrote to it, or it was loaded so"
            )
            return Diagnosis("parameter", name, detail=f"{name} is not finite; {why}", inputs=[statistics(local(parameter))])
    for optimizer in optimizers:
        for parameter, key, tensor in state_tensors(optimizer):
            if _is_bad(tensor):
                name = f"{key} of {names.get(id(parameter), 'a parameter')}"
                why = f"{type(optimizer).__name__}'s state: {_why([optimizer], parameter)}"
                return Diagnosis("state", name, detail=f"{name} is not finite; {why}", inputs=[statistics(tensor)])
    return None


def bad_gradient(module: nn.Module, optimizer: Optimizer) -> str:
    """ "; the gradient of NAME is not finite" for the first such parameter of `optimizer`, "" where there is none. Waits for the device."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and _is_bad(local(parameter.grad)):
                return f"; the gradient of {names.get(id(parameter), 'a parameter outside the module')} is not finite"
    return ""


def _all_parameters(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    held = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in dict.fromkeys([*module.parameters(), *held]) if has_values(parameter)]


def _is_bad(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all())


def _why(optimizers: Iterable[Optimizer], parameter: Tensor) -> str:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(parameter is held for held in group["params"]):
                unusable = unusable_settings(group)
                state = [key for found, key, tensor in state_tensors(optimizer) if found is parameter and _is_bad(tensor)]
                held = f", whose state {state[0]} for it is not finite either" if state else ""
                if unusable:
                    return f"{type(optimizer).__name__} updates it with {unusable}{held}"
                return f"{type(optimizer).__name__}({settings_of(group)}) updates it{held}, or other code wrote to it"
    return "other code wrote to it"


def unusable_settings(group: dict[str, Any]) -> str:
    """Settings of a parameter group that turn finite gradients into other weights: not finite, or `eps=0`; "" where there are none."""
    found = []
    for name, value in group.items():
        numbers = (
            [float(part) for part in (value if isinstance(value, (list, tuple)) else [value]) if _is_number(part)]
            if name != "params"
            else []
        )
        if any(not math.isfinite(number) for number in numbers) or (name in MEANT_POSITIVE and any(number == 0 for number in numbers)):
            found.append(f"{name}={_shown(value)}")
    return ", ".join(found)


def settings_of(group: dict[str, Any]) -> str:
    """The settings that an update depends on, in words."""
    return ", ".join(f"{name}={_shown(group[name])}" for name in SHOWN if group.get(name) is not None)


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.numel() == 1)


def _shown(value: Any) -> str:
    return f"{float(value):g}" if _is_number(value) else str(value)
