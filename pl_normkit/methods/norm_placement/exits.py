"""Which modules hand each residual addition its branch and its shortcut: by the identity of tensors in one forward pass."""

from __future__ import annotations

__all__ = ["Exit", "find_exits", "find_post_norm_exits"]

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pl_normkit.graph import call_arguments
from pl_normkit.graph.export import place_arguments
from pl_normkit.preserve import preserved

_ADDS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__))


class Exit(NamedTuple):
    """The end of a branch.

    Attributes:
        path: of the module whose output, as it is, is added to the shortcut.
        norm: path of the norm that made the shortcut, where a post-norm block was asked about.
        dropout: path of a dropout between that norm and the addition, "" without one.
    """

    path: str
    norm: str = ""
    dropout: str = ""


def find_exits(model: nn.Module, example_inputs: Any, norms: Sequence[str]) -> dict[str, Exit]:
    """For norms at the entry of branches: the module whose output, as it is, a sum adds to the very tensor that the norm got.

    The model runs once in training mode, in which a dropout that drops nothing hands on what it got, so that a module that other
    branches use too is not taken for an exit where it does nothing. Norms without such a module are left out. The model stays as it is.
    """
    watch, inputs = _watched(model, example_inputs, norms)
    return {path: Exit(found) for path in norms if path in inputs and (found := watch.exit_of(inputs[path])) is not None}


def find_post_norm_exits(model: nn.Module, example_inputs: Any, post_norms: Sequence[str], norms: Sequence[str]) -> dict[str, Exit]:
    """For norms behind sums: the end of the branch that the sum has, and which of `norms` made what the branch is added to.

    The model runs as in `find_exits`. Norms whose sum has no such parts are left out.
    """
    watch, inputs = _watched(model, example_inputs, post_norms)
    found = {path: watch.parts_of(inputs[path], norms) for path in post_norms if path in inputs}
    return {path: exit_of for path, exit_of in found.items() if exit_of is not None}


def _watched(model: nn.Module, example_inputs: Any, norms: Sequence[str]) -> tuple[_Additions, dict[str, Tensor]]:
    """What was added, and what each of the norms got, in one run."""
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
    return watch, inputs


def _keep_first(inputs: dict[str, Tensor], path: str) -> Callable[..., None]:
    def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs[path] = (*arguments, *keywords.values())[0]

    return keep


class _Additions(TorchFunctionMode):
    """Remembers what was added to what, and which modules gave out a tensor. Tensors are kept alive, so that their ids stay theirs.

    A tensor that was changed in place (`out += other`) is no longer what the module gave out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: list[tuple[Tensor, Tensor, Tensor]] = []
        self._makers: dict[int, list[str]] = {}
        self._versions: dict[int, int] = {}
        self._dropped: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._kept: list[Any] = []

    def recorder(self, path: str) -> Callable[..., Any]:
        def record(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            self._calls[path] += 1
            if isinstance(module, nn.Dropout) and module.p == 0 and arguments:
                output = arguments[0]
            elif isinstance(module, nn.Dropout) and arguments:
                self._dropped[path] = arguments[0]
                self._kept.append(arguments[0])
            runs_children = type(module).forward is nn.Sequential.forward  # an edit at it would become one of them
            if isinstance(output, Tensor) and not runs_children:
                self._kept.append(output)
                self._forget_if_changed(output)
                self._makers.setdefault(id(output), []).append(path)
            return output

        return record

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_sum = func in _ADDS and len(args) == 2 and all(isinstance(operand, Tensor) for operand in args)
        for operand in args if is_sum else ():
            self._forget_if_changed(operand)
        result = func(*args, **kwargs or {})
        if is_sum:
            self._sums.append((args[0], args[1], result))
            self._kept += [*args, result]
        return result

    def _forget_if_changed(self, value: Tensor) -> None:
        """Forget who made a value that was changed in place since."""
        version = value._version
        if self._versions.setdefault(id(value), version) != version:
            self._makers.pop(id(value), None)
            self._versions[id(value)] = version

    def exit_of(self, stream: Tensor) -> str | None:
        """The last module that gave out what was added to `stream`, and was called once; None where none or several sums have it."""
        others = [b if a is stream else a for a, b, _ in self._sums if (a is stream) != (b is stream)]
        return self._single_maker(others[0]) if len(others) == 1 else None

    def parts_of(self, total: Tensor, norms: Sequence[str]) -> Exit | None:
        """The parts of a sum, one of which a norm has made; None where they are not told apart."""
        sums = [(a, b) for a, b, result in self._sums if result is total and a is not b]
        found = []
        for branch, shortcut in [order for a, b in sums for order in ((a, b), (b, a))]:
            path, made_by = self._single_maker(branch), self._norm_of(shortcut, norms)
            if path is not None and made_by is not None and self._norm_of(branch, norms) is None:
                found.append(Exit(path, *made_by))
        return found[0] if len(found) == 1 else None

    def _single_maker(self, value: Tensor) -> str | None:
        single = [path for path in self._makers.get(id(value), []) if path and self._calls[path] == 1]
        return single[-1] if single else None

    def _norm_of(self, value: Tensor, norms: Sequence[str]) -> tuple[str, str] | None:
        """The norm that made a value, and the dropout that stands between."""
        for path in self._makers.get(id(value), []):
            if self._calls[path] == 1 and path in norms:
                return path, ""
            if self._calls[path] == 1 and path in self._dropped:
                made_by = self._norm_of(self._dropped[path], norms)
                return (made_by[0], path) if made_by is not None and not made_by[1] else None
        return None
