"""Calls a model with the leaves of its inputs, always from the same random state."""

from __future__ import annotations

__all__ = ["Runner", "differ"]

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pl_normkit.first_step import ForwardWatch, Seen
from pl_normkit.graph import call_arguments
from pl_normkit.graph.autograd import tensors_in
from pl_normkit.preserve import preserved

_TOLERANCE = 1e-4


class Runner:
    """Calls the model with the leaves of its inputs, always from the same random state."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        self.leaves, self._spec = tree_flatten(call_arguments(inputs))
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.tensor_positions = [position for position, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def _arguments(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], self._spec)
        return args, kwargs

    def run(self, leaves: list[Any]) -> list[Tensor]:
        args, kwargs = self._arguments(leaves)
        with _same_randomness(), preserved(self.model, buffers=True):
            return list(tensors_in(self.model(*args, **kwargs)))

    def watched(
        self, leaves: list[Any], each: Callable[[Seen], None] | None = None, *, within: AbstractContextManager[Any] | None = None
    ) -> tuple[ForwardWatch, list[Tensor]]:
        args, kwargs = self._arguments(leaves)
        watch = ForwardWatch(self.model, (args, kwargs), each=each)
        with _same_randomness(), preserved(self.model, buffers=True), within or nullcontext(), watch.watching():
            results = list(tensors_in(self.model(*args, **kwargs)))
        if watch.failure is not None:
            raise watch.failure
        return watch, results


@contextmanager
def _same_randomness() -> Iterator[None]:
    torch.manual_seed(0)  # the caller restores every RNG
    yield


def differ(before: Tensor, after: Tensor, rows: list[int] | slice) -> bool:
    """Whether any of these rows (along dimension 0) changed by more than rounding."""
    if before.shape != after.shape:
        return False
    a, b = before[rows].double(), after[rows].double()
    scale = float(a.abs().amax()) if a.numel() else 0.0
    gap = float((a - b).abs().amax()) if a.numel() else 0.0
    return math.isfinite(gap) and math.isfinite(scale) and gap > _TOLERANCE * scale
