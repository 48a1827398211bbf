"""Reading or measuring a model must change nothing: save what a forward pass may touch, and put it back."""

from __future__ import annotations

__all__ = ["preserved"]

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, *, buffers: bool = False) -> Iterator[None]:
    """Restore training flags, plain attributes, RNG states and, with `buffers`, buffer values when the block ends.

    Args:
        model: the module whose state is kept.
        buffers: also copy and restore buffer values; needed when real data runs through the model, not for tracing.
    """
    with ExitStack() as stack:
        for restore in (_attributes(model), _random_states()):
            stack.callback(restore)
        if buffers:
            stack.callback(_buffer_values(model))
        yield


def _attributes(model: nn.Module) -> Callable[[], None]:
    """Forward passes set plain attributes (caches, counters) and `train()` sets flags; both live in `vars(module)`."""
    before = [(module, dict(vars(module)), _copies(vars(module))) for module in model.modules()]

    def restore() -> None:
        for module, attributes, contents in before:
            current = vars(module)
            for name in current.keys() - attributes.keys():
                del current[name]
            current.update(attributes)
            for container, content in contents:
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)

    return restore


def _copies(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in attributes.values() if isinstance(value, (list, dict, set))]


def _random_states() -> Callable[[], None]:
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return restore


def _buffer_values(model: nn.Module) -> Callable[[], None]:
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)

    return restore
