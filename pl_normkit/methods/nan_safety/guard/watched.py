"""Which parameters and which optimizer state a step looks at. Derived here."""

from __future__ import annotations

__all__ = ["Watched"]

import math
from collections.abc import Sequence, Set

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_normkit.methods.nan_safety.guard.causes import state_tensors
from pl_normkit.methods.nan_safety.guard.decision import has_values, local, total_of

PER_STEP = 2**20
"""Entries of optimizer state that each step looks at, or an eighth of it where that is more: all of it at least every eighth step."""


class Watched:
    """Parameters of the optimizers, but those that were not finite when a healthy run began.

    Attributes:
        excused: ids of parameters that may be not finite: frozen masks of -inf, and what the first good step had in it.
        suspects: those of other parameters that were not finite from the start, before a good step.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        held = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
        odd = [
            parameter
            for parameter in dict.fromkeys([*module.parameters(), *held])
            if has_values(parameter) and not _is_finite(local(parameter))
        ]
        self.excused = {id(p) for p in odd if not p.requires_grad and not bool(torch.isnan(local(p)).any())}
        self.suspects = {id(parameter) for parameter in odd} - self.excused
        self._places: dict[int, int] = {}

    def parameters(self, optimizer: Optimizer, kept: Set[int] = frozenset()) -> list[Tensor]:
        """What `optimizer` moves, as far as it is to be finite; not the parameters of the ids `kept`."""
        left_out = self.excused | self.suspects | kept
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return [local(parameter) for parameter in parameters if id(parameter) not in left_out]

    def states(self, optimizer: Optimizer) -> list[Tensor]:
        """The next part of its state."""
        state = [tensor for _, _, tensor in state_tensors(optimizer)]
        if not state:
            return []
        wanted = max(PER_STEP, sum(tensor.numel() for tensor in state) // 8)
        place, chosen = self._places.get(id(optimizer), 0) % len(state), []
        for offset in range(len(state)):
            if wanted <= 0:
                break
            chosen.append(state[(place + offset) % len(state)])
            wanted -= chosen[-1].numel()
        self._places[id(optimizer)] = place + len(chosen)
        return chosen

    def healthy(self) -> int:
        """A step was good: what was not finite from the start does no harm. Returns how many parameters that are."""
        count = len(self.suspects)
        self.excused |= self.suspects
        self.suspects.clear()
        return count


def _is_finite(tensor: Tensor) -> bool:
    return math.isfinite(total_of([tensor]).item())
