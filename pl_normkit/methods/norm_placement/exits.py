"""Which module hands each residual addition the output of its branch: by the identity of tensors in one forward pass."""

from __future__ import annotations

__all__ = ["find_exits"]

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pl_normkit.graph import call_arguments
from pl_normkit.graph.export import place_arguments
from pl_normkit.preserve import preserved

_ADDS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__))


def find_exits(model: nn.Module, example_inputs: Any, norms: Sequence[str]) -> dict[str, str]:
    """For norms at the entry of branches: the module whose output, as it is, a sum adds to the very tensor that the norm got.

    The model runs once in training mode, in which a dropout that drops nothing hands on what it got, so that a module that other
    branches use too is not taken for an exit where it does nothing. Norms without such a module are left out. The model stays as it is.
    """
    watch = _Additions()
    inputs: dict[str, Tensor] = {}
    with preserved(model, buffers=True), ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_hook(watch.recorder(path)).remove)
        for path in norms:
            hooks.callback(model.get_submodule(path).register_forward_pre_hook(_keep_first(inputs, path), with_kwargs=True).remove)
        model.train()
        arguments, keywords = place_arguments(model, call_arguments(example_inputs))
        with watch:
            model(*arguments, **keywords)
    return {path: exit_of for path in norms if path in inputs and (exit_of := watch.exit_of(inputs[path])) is not None}


def _keep_first(inputs: dict[str, Tensor], path: str) -> Callable[..., None]:
    def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs[path] = (*arguments, *keywords.values())[0]

    return keep


class _Additions(TorchFunctionMode):
    """Remembers what was added to what, and which modules gave out a tensor. Tensors are kept alive, so that their ids stay theirs."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._makers: dict[int, list[str]] = {}
        self._calls: Counter[str] = Counter()
        self._kept: list[Any] = []

    def recorder(self, path: str) -> Callable[..., Any]:
        def record(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            self._calls[path] += 1
            if isinstance(module, nn.Dropout) and module.p == 0 and arguments:
                output = arguments[0]
            runs_children = type(module).forward is nn.Sequential.forward  # an edit at it would become one of them
            if isinstance(output, Tensor) and not runs_children:
                self._kept.append(output)
                self._makers.setdefault(id(output), []).append(path)
            return output

        return record

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ADDS and len(args) == 2 and all(isinstance(operand, Tensor) for operand in args):
            self._sums.append((args[0], args[1]))
            self._kept += args
        return func(*args, **kwargs or {})

    def exit_of(self, stream: Tensor) -> str | None:
        """The last module that gave out what was added to `stream`, and was called once; None where none or several sums have it."""
        others = [b if a is stream else a for a, b in self._sums if (a is stream) != (b is stream)]
        if len(others) != 1:
            return None
        single = [path for path in self._makers.get(id(others[0]), []) if path and self._calls[path] == 1]
        return single[-1] if single else None
