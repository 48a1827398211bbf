"""Modules whose loss is not finite, in every style of optimization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.callbacks.guarded import Module

BAD = {2: "loss", 5: "loss", 6: "loss"}


class SelectsNothing(Module):
    """Batches of kind "loss" select nothing: the loss is NaN, its gradients are zeros."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        out = self(batch["x"])
        chosen = torch.zeros_like(out, dtype=torch.bool) if int(batch["kind"]) else torch.ones_like(out, dtype=torch.bool)
        return F.mse_loss(out[chosen], batch["y"][chosen])


class AsDict(SelectsNothing):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:  # type: ignore[override]
        return {"loss": self.loss(batch), "other": torch.full((), math.nan)}


class Manual(SelectsNothing):
    """One optimizer; `past` is what goes past Lightning: the backward, the step, both, or a closure."""

    past = ""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        found = self.optimizers(use_pl_optimizer="step" not in self.past and "closure" not in self.past)
        optimizer = found[0] if isinstance(found, list) else found  # Lightning gives a list of what is no torch optimizer

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            loss.backward() if "backward" in self.past or "closure" in self.past else self.manual_backward(loss)
            return loss

        if "closure" in self.past:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


class AsksForGradients(Manual):
    """No backward: gradients are asked for, and set by hand."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        held = list(self.parameters())
        for parameter, gradient in zip(held, torch.autograd.grad(self.loss(batch), held), strict=True):
            parameter.grad = gradient
        self.optimizers().step()


class Wrapped:
    """What Lightning takes for an optimizer: no torch class, no hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
        self.state_dict, self.load_state_dict, self.zero_grad = inner.state_dict, inner.load_state_dict, inner.zero_grad

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


STYLES: dict[str, type[Module]] = {"automatic": SelectsNothing, "dict": AsDict, "manual": Manual, "grad": AsksForGradients} | {
    f"past Lightning: {past}": type(f"Past{index}", (Manual,), {"past": past})
    for index, past in enumerate(("backward", "step", "backward and step", "closure"))
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "wrapped": lambda p: Wrapped(torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def made(cls: type[Module], optimizer: str = "adamw") -> Module:
    torch.manual_seed(0)
    return cls(OPTIMIZERS[optimizer])
