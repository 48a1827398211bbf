"""How a loss is called: from a name and an example to one call whose graph the rules read and whose arguments the search moves."""

from __future__ import annotations

__all__ = ["LossCall", "example_arguments", "read_loss_call"]

import copy
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import DataError, ModelSpecError
from pl_normkit.graph.autograd import tensors_in
from pl_normkit.importing import import_object
from pl_normkit.methods.nan_safety.diagnosis.sources import SourceRecorder
from pl_normkit.methods.nan_safety.losses.arguments import Arguments, Domain
from pl_normkit.preserve import preserved

SHAPE = (2, 1, 8, 8)
SEED = 0


@dataclass(frozen=True)
class LossCall:
    """A loss and the example it is called on.

    Attributes:
        function: the loss; takes the arguments and returns a tensor.
        example: its arguments, on the CPU.
        module: the module whose state a call may change; an empty one for a function.
        name: `package.module:name`, or how a reader would call it.
        import_lines: Python that makes it as `loss` in a fresh process, "" where it cannot be imported (a lambda).
        autocast: run every call under autocast to this dtype.
        seconds: how long to search, in processor time.
        folder: where scripts that show a witness are written, None for nowhere.
    """

    function: Callable[..., Any]
    example: Arguments
    module: nn.Module
    name: str
    import_lines: str = ""
    autocast: torch.dtype | None = None
    seconds: float = 1.0
    folder: Path | None = None

    def value(self, arguments: Arguments) -> tuple[Tensor, list[Tensor]]:
        """The loss (summed where it is no scalar) and the tensors whose gradient counts. The same random numbers at every call."""
        positional, keywords, free = arguments.fresh()
        torch.manual_seed(SEED)
        with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            value = self.function(*positional, **keywords)
        value = value[0] if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor) else value
        if not isinstance(value, Tensor):
            raise TypeError(f"the loss returned a {type(value).__name__}, no tensor")
        return (value.sum() if value.dim() else value), [*free, *(p for p in self.module.parameters() if p.requires_grad)]

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Calls within leave nothing behind and warn of nothing."""
        with warnings.catch_warnings(), preserved(self.module, buffers=True), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield

    def recorded(self) -> Tensor:
        """The loss on the example, with source lines in its graph. Raises ModelSpecError where it cannot be called."""
        try:
            with self.quietly(), SourceRecorder().watching():
                value, _ = self.value(self.example)
        except Exception as error:
            raise ModelSpecError(
                "the loss cannot be called on its example arguments",
                where=self.name,
                evidence=f"{type(error).__name__}: {error}",
                fix="give an example (--example package.module:function on the command line): a function without arguments that "
                "returns the loss's arguments",
            ) from error
        if value.grad_fn is None:
            raise ModelSpecError("the loss has no gradient on its example arguments", where=self.name, evidence=repr(value)[:80])
        return value


def read_loss_call(
    loss: str | Callable[..., Any],
    example: Any = None,
    *,
    domain: Domain | None = None,
    fixed: Iterable[str | int] = (),
    autocast: torch.dtype | None = None,
    seconds: float = 1.0,
    folder: Path | None = None,
) -> LossCall:
    """The call that `audit_loss` and `pl-normkit lint --loss` judge; arguments as there.

    Raises:
        ModelSpecError: the loss or the example cannot be found or called.
        ConfigError: `domain` or `fixed` name no argument.
        DataError: there is no such folder.
    """
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise DataError("there is no folder to write witnesses to", where=str(folder), fix="make it, or name another")
    function, module, name = _function(loss)
    provider = _resolve(example) if isinstance(example, str) else _neighbour(loss) if example is None else example
    given = example_arguments(function) if provider is None else provider() if callable(provider) else provider
    positional, keywords = _split(given)
    if not any(tensor.requires_grad for tensor in tensors_in([positional, keywords])):
        positional, keywords = _with_gradient(positional, keywords)
    arguments = Arguments.read(function, positional, keywords, domain or {}, fixed)
    on_cpu = {i: _on_cpu(leaf) for i, leaf in enumerate(arguments.leaves) if isinstance(leaf, Tensor)}
    return LossCall(function, arguments.replaced(on_cpu), module, name, _import_lines(loss, name), autocast, seconds, folder)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A bad index ends a GPU process and raises on the CPU, so all calls are made there."""
    return tensor if tensor.device.type == "cpu" else tensor.detach().cpu().requires_grad_(tensor.requires_grad)


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
        raise ModelSpecError(f"{spec!r} is no loss", fix='write it as "package.module:name"')
    return import_object(spec)


def _function(loss: str | Callable[..., Any]) -> tuple[Callable[..., Any], nn.Module, str]:
    """What to call, the module that holds its state, and its name."""
    found = _resolve(loss) if isinstance(loss, str) else loss
    name = loss if isinstance(loss, str) else f"{getattr(loss, '__module__', '')}:{getattr(loss, '__qualname__', type(loss).__name__)}"
    if inspect.isclass(found):
        try:
            found = found()
        except TypeError as error:
            raise ModelSpecError(
                "the loss class needs arguments", where=name, evidence=str(error), fix="point at an instance or at a function"
            ) from error
    if isinstance(found, nn.Module):
        module = found if all(tensor.device.type == "cpu" for tensor in (*found.parameters(), *found.buffers())) else _copy_on_cpu(found)
        has_own_call = type(module).__call__ is not nn.Module.__call__  # as timm's JsdCrossEntropy has
        return module if has_own_call else module.forward, module, name
    if not callable(found):
        raise ModelSpecError("the loss cannot be called", where=name, evidence=type(found).__name__)
    owner = getattr(found, "__self__", None)
    return found, owner if isinstance(owner, nn.Module) else nn.Module(), name


def _import_lines(loss: str | Callable[..., Any], name: str) -> str:
    source, _, attribute = name.partition(":")
    known: Any = sys.modules.get(source)
    for part in attribute.split("."):
        known = getattr(known, part, None)
    if known is None or source == "__main__" or (not isinstance(loss, str) and known is not loss):
        return ""
    return f"import {source}\nloss = {source}.{attribute}{'()' if inspect.isclass(known) else ''}"


def _copy_on_cpu(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu()


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


def _with_gradient(positional: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first floating tensor gets a gradient, as the prediction that it most likely is; the caller's own tensor is left alone."""
    first = next((tensor for tensor in tensors_in([positional, keywords]) if tensor.is_floating_point()), None)
    if first is None:
        return positional, keywords
    leaf = first.detach().clone().requires_grad_()
    vars(leaf).update(vars(first))
    swapped: tuple[tuple[Any, ...], dict[str, Any]] = torch.utils._pytree.tree_map(
        lambda value: leaf if value is first else value, (positional, keywords)
    )
    return swapped
