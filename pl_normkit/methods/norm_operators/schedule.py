"""How far norms that turn into others have turned: the share of the old norm at an optimizer step."""

from __future__ import annotations

__all__ = ["Turning", "turning_norms"]

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pl_normkit.methods.norm_operators.operators.fixed_std import FixedStdNorm
from pl_normkit.methods.norm_operators.operators.prepbn import ProgressiveBatchNorm
from pl_normkit.methods.norm_operators.operators.sigma_reparam import SigmaLinear

Turned = ProgressiveBatchNorm | SigmaLinear


@dataclass(frozen=True)
class Turning:
    """The norms of a model that turn, in the order of its modules.

    Attributes:
        progressive: batch norms, and linear layers divided by their sigma, whose share falls on a line, all together.
        switching: norms that become constant one after another, evenly over the steps.
    """

    progressive: dict[str, Turned]
    switching: dict[str, FixedStdNorm]

    @torch.no_grad()
    def turn(self, step: int, start: int, steps: int) -> None:
        """Set every share to what it is after `step` optimizer steps of a schedule of `steps` that begins at `start`."""
        done = min(max((step - start) / steps, 0.0), 1.0)
        for progressive in self.progressive.values():
            progressive.share.fill_(1 - done)
        for number, switching in enumerate(self.switching.values(), 1):
            switching.share.fill_(0.0 if done * len(self.switching) >= number else 1.0)

    @property
    def share(self) -> float:
        """Mean share of the old norms."""
        norms: list[Turned | FixedStdNorm] = [*self.progressive.values(), *self.switching.values()]
        return sum(float(norm.share) for norm in norms) / len(norms)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Every norm as it is at the end of the schedule, within the block."""
        norms: list[Turned | FixedStdNorm] = [*self.progressive.values(), *self.switching.values()]
        saved = [norm.share.clone() for norm in norms]
        try:
            for norm in norms:
                norm.share.zero_()
            yield
        finally:
            for norm, share in zip(norms, saved, strict=True):
                norm.share.copy_(share)


def turning_norms(model: nn.Module) -> Turning:
    """The norms of `swap_norms(model, to="prepbn")`, `to="fixed_std"` and `to="sigma_reparam", gain="one"`; both dicts are empty where
    there are none. A layer whose share is 0 already has turned."""
    modules = dict(model.named_modules())
    progressive: dict[str, Turned] = {
        path: module
        for path, module in modules.items()
        if isinstance(module, ProgressiveBatchNorm) or (isinstance(module, SigmaLinear) and float(module.share) > 0)
    }
    return Turning(progressive, {path: module for path, module in modules.items() if isinstance(module, FixedStdNorm)})
