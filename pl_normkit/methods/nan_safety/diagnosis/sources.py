"""Which line and which module made an autograd node: written into the node's own metadata while a forward pass runs."""

from __future__ import annotations

__all__ = ["SourceRecorder", "notes_of", "place_of", "scalar_of"]

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from pl_normkit.findings import Place
from pl_normkit.graph.autograd import source_line, tensors_in

PLACE, SCALAR = "pl_normkit.place", "pl_normkit.scalar"


def notes_of(node: Node) -> dict[str, Any]:
    """The free dict that autograd keeps with each node."""
    return cast(dict[str, Any], node.metadata)


def place_of(node: Node) -> Place:
    """Where `node` was made; Place("loss") where nothing was recorded."""
    place: Place = notes_of(node).get(PLACE, Place("loss"))
    return place


def scalar_of(node: Node) -> float | None:
    """The Python number added to or subtracted from a tensor by `node`, where it was recorded."""
    number: float | None = notes_of(node).get(SCALAR)
    return number


class SourceRecorder(TorchFunctionMode):
    """While active, every autograd node made learns its source line, module path and added number.

    It costs Python time per operation: use it for one example or one step, not for training.

    Args:
        model: the module whose paths are reported; None reports "loss" as the place.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._names = {} if model is None else {module: name for name, module in model.named_modules()}
        self._stack: list[str] = []

    @property
    def module(self) -> str:
        return self._stack[-1] if self._stack else "loss"

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen(func, args, kwargs or {}, output)
        return output

    def seen(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Called after each operation."""
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None and PLACE not in notes_of(tensor.grad_fn):
                place = Place(self.module, source_line(sys._getframe(2)))
                _tag(tensor.grad_fn, place)
                numbers = [value for value in args if isinstance(value, (int, float)) and not isinstance(value, bool)]
                if len(numbers) == 1:
                    notes_of(tensor.grad_fn)[SCALAR] = float(numbers[0])

    @contextmanager
    def watching(self) -> Iterator[SourceRecorder]:
        """The recorder, with module paths followed by forward hooks of `model`."""
        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()


def _tag(node: Node, place: Place) -> None:
    """Tag `node` and the untagged nodes behind it: those of one composite operation."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if PLACE in notes_of(current) or not current.name().rstrip("0123456789").endswith("Backward"):
            continue
        notes_of(current)[PLACE] = place
        waiting += [following for following, _ in current.next_functions if following is not None]
