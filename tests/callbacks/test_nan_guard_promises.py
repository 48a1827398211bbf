"""What NaNGuard promises beyond finite gradients: losses that lose their NaN on the way back, buffers, lasting causes, quiet reports."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_normkit.callbacks.nan_guard import NaNGuard
from pl_normkit.errors import NonFiniteError
from tests.callbacks.guarded import Batches, Module, equal, fit, state_of
from tests.callbacks.guarded_losses import BAD, OPTIMIZERS, STYLES, Manual, SelectsNothing, made
from tests.callbacks.test_nan_guard_ends import scaler_plugin

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*", "ignore:.*isinstance.treespec.*", "ignore:Checkpoint directory"
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loss_that_is_not_finite_costs_its_step_whatever_its_gradients(style: str, optimizer: str, tmp_path: Path) -> None:
    if optimizer == "lbfgs" and style not in ("automatic", "dict", "past Lightning: closure"):
        pytest.skip("LBFGS needs a closure")
    clean, guarded, guard = made(STYLES[style], optimizer), made(STYLES[style], optimizer), NaNGuard(diagnose=False)
    expected = state_of(clean, fit(clean, Batches(10, BAD, drop=True), tmp_path))
    assert equal(expected, state_of(guarded, fit(guarded, Batches(10, BAD), tmp_path, guard)))
    assert [event["batch_index"] for event in guard.events] == list(BAD)
    assert (guard.budget.steps, guard.budget.skips) == (10, 3)


@pytest.mark.parametrize("options", [{"device_side": True}, {"plugins": "scaler"}, {"plugins": "scaler", "fused": True}])
def test_such_a_loss_on_the_device_and_under_a_scaler(options: dict[str, Any], tmp_path: Path) -> None:
    fused = options.get("fused", "device_side" in options)
    states = []
    for drop in (True, False):
        torch.manual_seed(0)
        module = SelectsNothing(lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused))
        guard = NaNGuard(device_side=options.get("device_side"))
        plugins = {"plugins": [scaler_plugin()]} if "plugins" in options else {}
        states.append(state_of(module, fit(module, Batches(10, BAD, drop=drop), tmp_path, guard, **plugins)))
    assert equal(*states)
    assert [event["batch_index"] for event in guard.events] == list(BAD)
    assert (guard.budget.skips, guard.overflows) == (3, 0)
    assert {event["first"].detail for event in guard.events} == {
        "its input is empty (nothing was selected), and the mean of nothing is 0/0"
    }


@pytest.mark.parametrize("position", range(4))
def test_each_micro_batch_of_a_window_counts(position: int, tmp_path: Path) -> None:
    bad = {4 + position: "loss"}
    clean, guarded, guard = made(SelectsNothing), made(SelectsNothing), NaNGuard()
    dropped = dict.fromkeys(range(4, 8), "")
    expected = state_of(clean, fit(clean, Batches(12, dropped, drop=True), tmp_path, accumulate_grad_batches=4))
    assert equal(expected, state_of(guarded, fit(guarded, Batches(12, bad), tmp_path, guard, accumulate_grad_batches=4)))
    assert [event["batch_index"] for event in guard.events] == list(bad)


class ManualWindow(Manual):
    """Steps with every third batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("position", range(3))
def test_each_micro_batch_of_a_window_by_hand_counts(position: int, tmp_path: Path) -> None:
    clean, guarded, guard = made(ManualWindow), made(ManualWindow), NaNGuard()
    dropped = dict.fromkeys((3, 4, 5), "")
    expected = state_of(clean, fit(clean, Batches(9, dropped, drop=True), tmp_path))
    assert equal(expected, state_of(guarded, fit(guarded, Batches(9, {3 + position: "loss"}), tmp_path, guard)))
    assert [(event["batch_index"], event["first"].kind) for event in guard.events] == [(3 + position, "forward")]


class TwoLosses(Manual):
    """Two networks and optimizers; both backwards before both steps; batches of kind "loss" are bad for the first network alone."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.other = nn.Linear(4, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        one, two = self.optimizers()
        self.manual_backward(self.loss(batch))
        self.manual_backward(F.mse_loss(self.other(batch["x"]), batch["y"]))
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        ours = [*self.first.parameters(), *self.norm.parameters(), *self.last.parameters()]
        return torch.optim.AdamW(ours, lr=0.01), torch.optim.AdamW(self.other.parameters(), lr=0.01)


def test_a_loss_counts_for_the_optimizer_whose_parameters_it_reaches(tmp_path: Path) -> None:
    dropped, healthy, guarded, guard = made(TwoLosses), made(TwoLosses), made(TwoLosses), NaNGuard()
    fit(dropped, Batches(8, BAD, drop=True), tmp_path)
    fit(healthy, Batches(8, {}), tmp_path)
    fit(guarded, Batches(8, BAD), tmp_path, guard)
    assert torch.equal(guarded.first.weight, dropped.first.weight)
    assert torch.equal(guarded.other.weight, healthy.other.weight)
    assert (guard.budget.steps, guard.budget.skips) == (16, 3)


def test_policy_raise_sees_it_too(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="batch 2"):
        fit(made(SelectsNothing), Batches(10, BAD), tmp_path, NaNGuard("raise"))


# -- buffers


class SpoilsLate(Manual):
    """Its buffer is written after the optimizer step, by NaN with batches of kind "loss" (good steps) or "input" (skipped steps)."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.register_buffer("q", torch.zeros(2))
        self.values: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        self.values.append(self.q.clone())
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        F.mse_loss(self(batch["x"]), batch["y"]).backward()
        optimizer.step()
        self.q = self.q + (math.nan if int(batch["kind"]) == 3 else 1.0)


def test_buffers_written_after_a_raw_step(tmp_path: Path) -> None:
    module, guard = made(SpoilsLate), NaNGuard()
    fit(module, Batches(6, {1: "loss", 3: "input"}), tmp_path, guard)
    assert [float(value[0]) for value in [*module.values, module.q]] == [0, 1, 1, 2, 2, 3, 4]
    assert [(event["batch_index"], event["first"].kind, event["skipped"]) for event in guard.events] == [
        (-1, "buffer", False),
        (3, "batch", True),
    ]
    assert (guard.budget.steps, guard.budget.skips) == (6, 1)


class PerClass(Module):
    """Keeps a score for each class, which is 0/0 for classes it has not seen: a healthy run with NaN in a buffer."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.register_buffer("score", torch.zeros(3))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.score = torch.tensor([0.0, batch_idx, 1.0]) / torch.tensor([0.0, 1.0, 2.0])
        return super().training_step(batch, batch_idx)


def test_a_healthy_run_is_not_ended_by_its_own_buffer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = NaNGuard()
    with caplog.at_level(logging.WARNING, "pl_normkit"):
        trainer = fit(made(PerClass), Batches(40, {}), tmp_path, guard)
    assert (trainer.global_step, guard.budget.steps, guard.budget.skips) == (40, 40, 8)
    assert sum("takes the non-finite values of buffer score for normal" in message for message in caplog.messages) == 1


# -- causes that stay


class Breaks(Module):
    """At batch 3 `harm` is done to the module or its optimizer."""

    harm: Callable[[Module, torch.optim.Optimizer], None]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 3:
            with torch.no_grad():
                type(self).harm(self, self.optimizers(use_pl_optimizer=False))
        return super().training_step(batch, batch_idx)


def _set(key: str, value: float) -> Callable[[Module, torch.optim.Optimizer], None]:
    return lambda module, optimizer: optimizer.param_groups[0].update({key: value})


def _state(key: str, value: float) -> Callable[[Module, torch.optim.Optimizer], None]:
    return lambda module, optimizer: optimizer.state[module.last.weight][key].fill_(value)


def _freeze_nan(module: Module, optimizer: torch.optim.Optimizer) -> None:
    module.extra = nn.Parameter(torch.full((2,), math.nan), requires_grad=False)
    module.last.register_forward_hook(lambda part, args, out: out + module.extra.sum())


HARMS: dict[str, tuple[Callable[[Module, torch.optim.Optimizer], None], str]] = {
    "parameter": (lambda m, o: m.last.weight[0, 0].fill_(math.inf), "last.weight is not finite"),
    "unused entry": (lambda m, o: m.first.weight[7].fill_(math.nan), "first.weight is not finite"),
    "frozen parameter": (_freeze_nan, "extra is not finite; no optimizer holds it"),
    "lr nan": (_set("lr", math.nan), "AdamW updates it with lr=nan"),
    "lr inf": (_set("lr", math.inf), "AdamW updates it with lr=inf"),
    "decay": (_set("weight_decay", math.inf), "AdamW updates it with weight_decay=inf"),
    "second moment": (_state("exp_avg_sq", math.inf), "exp_avg_sq of last.weight is not finite; AdamW's state"),
    "first moment": (_state("exp_avg", math.nan), "exp_avg of last.weight is not finite"),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_cause_that_stays_ends_the_run_at_once_and_is_named(harm: str, policy: Any, tmp_path: Path) -> None:
    cls = type("Breaking", (Breaks,), {"harm": staticmethod(HARMS[harm][0])})
    module = made(cls)
    with pytest.raises(NonFiniteError, match=HARMS[harm][1]):
        fit(module, Batches(40, {}), tmp_path, guard := NaNGuard(policy))
    assert guard.budget.steps in (4, 5)
    assert len(guard.events) == 1


def _overflow(module: Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 3e38
    module.last.weight.register_hook(lambda gradient: gradient * 0 + 10.0)


def test_an_overflow_of_the_optimizer_itself_is_named(tmp_path: Path) -> None:
    module = made(type("Breaking", (Breaks,), {"harm": staticmethod(_overflow)}), "sgd")
    with pytest.raises(NonFiniteError, match=r"last.weight is not finite; SGD\(lr=3e\+38"):
        fit(module, Batches(40, {}), tmp_path, guard := NaNGuard())
    assert guard.budget.steps == 5


@pytest.mark.parametrize("rate_ends_at", [6, 9])
def test_weights_that_the_last_step_spoils_end_the_run_and_reach_no_checkpoint(rate_ends_at: int, tmp_path: Path) -> None:
    """A learning rate that becomes NaN before the last of ten steps, or before a checkpoint after the seventh."""

    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.nan if step == rate_ends_at else 1.0)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    saved = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_on_train_epoch_end=False)
    with pytest.raises(NonFiniteError, match=rf"step {rate_ends_at + 1}, ranks(.|\n)*first.weight is not finite"):
        fit(Scheduled(), Batches(10, {}), tmp_path, NaNGuard(), saved, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == (rate_ends_at == 9)


def test_statistics_that_the_last_validation_spoils_come_back(tmp_path: Path) -> None:
    class Spoils(Module):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.norm.train()
            self.norm(torch.full((8, 8), math.nan))

        def val_dataloader(self) -> Any:
            return DataLoader(Batches(1, {}), batch_size=None)

    module, guard = Spoils(), NaNGuard()
    state = state_of(module, fit(module, Batches(4, {}), tmp_path, guard, num_sanity_val_steps=0))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state)
    assert [event["first"].module for event in guard.events] == ["norm.running_mean", "norm.running_var"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_eps_of_zero_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Module(lambda p: torch.optim.AdamW(p, lr=0.01, eps=0.0))
    module.last.register_forward_hook(lambda part, args, out: out + 0 * part.bias)
    module.idle = nn.Parameter(torch.ones(1))
    module.norm.register_forward_hook(lambda part, args, out: out + 0 * module.idle)
    with pytest.raises(NonFiniteError, match="idle is not finite; AdamW updates it with eps=0"):
        fit(module, Batches(10, {}), tmp_path, guard := NaNGuard())
    assert guard.budget.steps == 2


@pytest.mark.parametrize("harm", ["parameter", "lr nan", "second moment"])
def test_rollback_survives_a_cause_that_a_snapshot_does_not_have(harm: str, tmp_path: Path) -> None:
    cls = type("Breaking", (Breaks,), {"harm": staticmethod(HARMS[harm][0])})
    module, guard = made(cls), NaNGuard("rollback", snapshot_every=2)
    trainer = fit(module, Batches(12, {}), tmp_path, guard)
    assert trainer.global_step == 12
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state_of(module, trainer))
    assert len(guard.events) == 1


def test_rollback_gives_up_where_the_cause_comes_back(tmp_path: Path) -> None:
    class Scheduled(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx >= 3:
                self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"] = math.nan

    with pytest.raises(NonFiniteError, match="lr=nan"):
        fit(made(Scheduled), Batches(60, {}), tmp_path, NaNGuard("rollback", snapshot_every=100))


def test_masks_among_the_parameters_are_no_cause(tmp_path: Path) -> None:
    module = made(Module)
    module.mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
    module.idle = nn.Parameter(torch.tensor([math.nan]))
    guard = NaNGuard()
    assert fit(module, Batches(6, {2: "loss"}), tmp_path, guard).global_step == 6
    assert guard.budget.skips == 1


def test_there_is_a_limit_by_default(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="51 steps in a row were skipped"):
        fit(made(Module), Batches(80, dict.fromkeys(range(10, 80), "input")), tmp_path, guard := NaNGuard(diagnose=False))
    assert guard.budget.skips == 51
