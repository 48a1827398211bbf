"""Runs in which more than an optimizer moves things: checkpoints, codebooks, teachers, passes that train nothing, steps by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pl_normkit.callbacks import GradientHealth, ModelAudit, NaNGuard
from pl_normkit.errors import NonFiniteError
from tests.callbacks.guarded import Batches, Module, equal, fit, make, state_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*log_every_n_steps.*",
    "ignore:.*isinstance.treespec.*",
    "ignore:.*cannot be read by torch.export.*",
    "ignore:.*configure_optimizers. returned .None.*",
    "ignore:Swapping scheduler",
)
BAD = {4: "input", 6: "activation"}


class Checkpointed(Module):
    def forward(self, x: Tensor, kind: str = "") -> Tensor:
        if kind:
            return super().forward(x, kind)
        hidden: Tensor = checkpoint(lambda h: self.norm(h).relu(), self.first(x), use_reentrant=False)
        return self.last(hidden)


class Codebook(Module):
    """Its entries are parameters without a gradient, which the forward pass writes to."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.entries, self.counts = (nn.Parameter(t, requires_grad=False) for t in (torch.randn(600, 8), torch.ones(600)))

    def forward(self, x: Tensor, kind: str = "") -> Tensor:
        hidden = self.norm(self.first(x) / (0.0 if kind else 1.0))
        chosen = torch.cdist(hidden.detach(), self.entries).argmin(1)
        ones = F.one_hot(chosen, 600).float()
        self.counts.data.mul_(0.9).add_(ones.sum(0))
        self.entries.data.copy_(0.9 * self.entries + 0.1 * ones.T @ hidden.detach() / self.counts[:, None])
        return self.last(hidden + (self.entries[chosen] - hidden).detach())


class Lazy(Module):
    """Its norm gets parameters and statistics in the first forward pass; no optimizer holds them."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.norm = nn.LazyBatchNorm1d()  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return self.make([*self.first.parameters(), *self.last.parameters()])


class Teacher(Module):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.teacher = copy.deepcopy(self.first).requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        for slow, fast in zip(self.teacher.parameters(), self.first.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1 + loss.detach() * 0.01
        return loss + 0.1 * F.mse_loss(self.first(batch["y"].expand(8, 4)), self.teacher(batch["y"].expand(8, 4)))


STYLES = [Checkpointed, Codebook, Lazy, Teacher]


@pytest.mark.parametrize("style", STYLES)
def test_a_healthy_run_is_not_changed(style: type[Module], tmp_path: Path) -> None:
    plain, watched, guard = make(cls=style), make(cls=style), NaNGuard()
    expected = state_of(plain, fit(plain, Batches(6, {}), tmp_path))
    assert equal(expected, state_of(watched, fit(watched, Batches(6, {}), tmp_path, guard, ModelAudit(), GradientHealth())))
    assert guard.events == []


@pytest.mark.parametrize("style", STYLES)
def test_a_bad_batch_leaves_no_trace(style: type[Module], tmp_path: Path) -> None:
    clean, guarded, guard = make(cls=style), make(cls=style), NaNGuard()
    expected = state_of(clean, fit(clean, Batches(8, BAD, drop=True), tmp_path))
    assert equal(expected, state_of(guarded, fit(guarded, Batches(8, BAD), tmp_path, guard)))
    assert [event["batch_index"] for event in guard.events] == list(BAD)


def test_statistics_renewed_in_a_pass_that_trains_nothing_leave_out_the_bad_batch(tmp_path: Path) -> None:
    """The last epoch of stochastic weight averaging runs without a backward, to average batch-norm statistics."""
    states = []
    for drop in (True, False):
        module = make(cls=Module)
        callbacks = [NaNGuard(diagnose=False), StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
        fit(module, Batches(6, {2: "input"}, drop=drop), tmp_path, *callbacks, epochs=3)
        states.append([tensor for name, tensor in module.state_dict().items() if "num_batches" not in name])
    assert equal(*states)


class ByHand(Module):
    """No optimizer makes a step; the parameters are written to."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        parameters = list(self.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(self.loss(batch), parameters), strict=True):
            parameter.data -= 0.01 * gradient


def test_weights_that_no_optimizer_moved_are_looked_at(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"first\.weight is not finite"):
        fit(make(cls=ByHand), Batches(8, BAD), tmp_path, NaNGuard())


class GradientsByHand(ByHand):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        parameters = list(self.parameters())
        gradients = torch.autograd.grad(self.loss(batch), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * (math.inf if batch_idx == 2 and parameter is self.last.bias else 1.0)
        self.optimizers().step()  # type: ignore[union-attr]


def test_a_gradient_that_no_backward_made_is_named(tmp_path: Path) -> None:
    guard = NaNGuard()
    fit(make(cls=GradientsByHand), Batches(4, {}), tmp_path, guard)
    (event,) = guard.events
    assert event["first"].detail.endswith("the gradient of last.bias is not finite")


class NoOptimizer(Module):
    def configure_optimizers(self) -> None:
        return None


def test_a_run_without_an_optimizer(tmp_path: Path) -> None:
    module, guard = make(cls=NoOptimizer), NaNGuard()
    fit(module, Batches(4, {}), tmp_path, guard, ModelAudit())
    assert guard.events == []
    assert isinstance(module.trainer, pl.Trainer)
