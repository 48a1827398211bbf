"""Call a loss once on example tensors, so that the rules can read its graph; nothing is trained and no model is needed."""

from __future__ import annotations

__all__ = ["audit_loss", "example_arguments"]

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ModelSpecError
from pl_normkit.importing import import_object
from pl_normkit.methods.nan_safety.sources import SourceRecorder, tensors_in

SHAPE = (2, 1, 8, 8)


def audit_loss(
    loss: str | Callable[..., Any], example: str | Callable[[], Any] | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The loss on example tensors, with its graph and with source lines in it, ready for `audit(..., loss=...)`.

    Args:
        loss: "package.module:name" or the object itself: a function, a loss module, or a loss class that needs no arguments.
        example: "package.module:name" or a function without arguments that returns the arguments of the loss: a tuple
            (positional), a dict (keywords) or a single tensor. Without it `name_example` next to the loss is taken if it is
            there; else arguments are made from the signature (see `example_arguments`).
        dtype: floating dtype of the arguments made from the signature.

    Returns:
        The scalar loss (a loss that is not a scalar is summed), before any backward.

    Raises:
        ModelSpecError: the loss or the example cannot be found or called, or its result has no gradient.
    """
    function = _as_function(_resolve(loss) if isinstance(loss, str) else loss, str(loss))
    provider = _resolve(example) if isinstance(example, str) else example
    if provider is None:
        provider = _neighbour(loss)
    arguments = provider() if provider is not None else example_arguments(function, dtype)
    positional, keywords = _split(arguments)
    if provider is not None and not any(tensor.requires_grad for tensor in tensors_in([positional, keywords])):
        _require_gradient(positional, keywords)
    with SourceRecorder().watching(), torch.enable_grad():
        try:
            value = function(*positional, **keywords)
        except Exception as error:
            raise ModelSpecError(
                "the loss cannot be called on its example arguments",
                where=str(loss),
                evidence=f"{type(error).__name__}: {error}",
                mend="give --example package.module:function, a function without arguments that returns the loss's arguments",
            ) from error
        value = value.sum() if isinstance(value, Tensor) and value.dim() else value
    if not isinstance(value, Tensor) or value.grad_fn is None:
        raise ModelSpecError("the loss has no gradient on its example arguments", where=str(loss), evidence=repr(value)[:80])
    return value


def example_arguments(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments made from the names of the required parameters of `function`, all `(2, 1, 8, 8)`, from a fixed seed.

    A name with "mask" or "valid" gets a boolean tensor (three quarters true), a name with "target", "label", "gt" or "true" (and
    the second parameter, whatever its name) values in [0.05, 0.95], every other a tensor of such values that requires a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    required = [
        parameter.name.lower()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    made: list[Tensor] = []
    for position, name in enumerate(required):
        values = torch.rand(SHAPE, generator=generator)
        if "mask" in name or "valid" in name:
            made.append(values < 0.75)
            continue
        tensor = (0.05 + 0.9 * values).to(dtype)
        is_target = position == 1 or any(word in name for word in ("target", "label", "gt", "true"))
        made.append(tensor if is_target and position else tensor.requires_grad_())
    return tuple(made)


def _resolve(spec: str) -> Any:
    if ":" not in spec:
        raise ModelSpecError(f"{spec!r} is no loss", mend='write it as "package.module:name"')
    return import_object(spec)


def _as_function(found: Any, spec: str) -> Callable[..., Any]:
    if inspect.isclass(found):
        try:
            found = found()
        except TypeError as error:
            raise ModelSpecError(
                "the loss class needs arguments", where=spec, evidence=str(error), mend="point at an instance or at a function"
            ) from error
    if isinstance(found, nn.Module):
        return found.forward
    if not callable(found):
        raise ModelSpecError("the loss cannot be called", where=spec, evidence=type(found).__name__)
    return found  # type: ignore[no-any-return]


def _neighbour(loss: str | Callable[..., Any]) -> Callable[[], Any] | None:
    if isinstance(loss, str):
        module_name, _, name = loss.partition(":")
    else:
        module_name, name = getattr(loss, "__module__", ""), getattr(loss, "__name__", "")
    return getattr(sys.modules.get(module_name), f"{name}_example", None)


def _split(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(arguments, dict):
        return (), arguments
    return (tuple(arguments) if isinstance(arguments, (tuple, list)) else (arguments,)), {}


def _require_gradient(positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    for tensor in tensors_in([positional, keywords]):
        if tensor.is_floating_point():
            tensor.requires_grad_()
            return
