"""NaNGuard on real Lightning runs: what is skipped, what is kept, what is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.callbacks.nan_guard import NaNGuard
from tests.callbacks.guarded import BAD, Batches, Module, equal, fit, make, state_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*", "ignore:.*isinstance.treespec.*", "ignore:Checkpoint directory"
)

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trajectory_equals_a_run_without_the_bad_batches(name: str, tmp_path: Path) -> None:
    clean = make(OPTIMIZERS[name])
    expected = state_of(clean, fit(clean, Batches(30, BAD, drop=True), tmp_path))
    guarded, guard = make(OPTIMIZERS[name]), NaNGuard()
    actual = state_of(guarded, fit(guarded, Batches(30, BAD), tmp_path, guard))
    assert equal(expected, actual)
    assert [event["batch_index"] for event in guard.events] == list(BAD)


def test_without_the_guard_the_same_run_is_lost(tmp_path: Path) -> None:
    module = make()
    fit(module, Batches(30, BAD), tmp_path)
    assert not torch.isfinite(module.first.weight).all()


def test_a_clean_run_is_bit_equal_with_and_without_the_guard(tmp_path: Path) -> None:
    bare, guarded = make(), make()
    expected = state_of(bare, fit(bare, Batches(20, {}), tmp_path, gradient_clip_val=0.5))
    guard = NaNGuard()
    assert equal(expected, state_of(guarded, fit(guarded, Batches(20, {}), tmp_path, guard, gradient_clip_val=0.5)))
    assert (guard.budget.steps, guard.budget.skips) == (20, 0)


def test_the_first_producer_is_named(tmp_path: Path) -> None:
    module, guard = make(), NaNGuard()
    fit(module, Batches(30, BAD), tmp_path, guard)
    first = {event["batch_index"]: event["first"] for event in guard.events}
    assert (first[3].kind, first[3].module) == ("batch", "batch['x']")
    assert (first[7].kind, first[7].op, first[7].module) == ("forward", "torch.Tensor.div", "")
    assert (first[11].kind, first[11].op) == ("forward", "torch.Tensor.log")
    assert first[12].kind == "backward"
    assert (first[17].kind, first[17].module) == ("buffer", "norm.running_mean")
    assert (first[21].kind, first[21].module) == ("buffer", "norm.running_var")
    assert first[25].kind in ("overflow", "backward")
    assert first[11].source.endswith(f"guarded.py:{_line_of('torch.zeros(()).log()')}")
    assert first[3].inputs[0]["nan"] == 1


def _line_of(text: str) -> int:
    return next(number for number, line in enumerate(Path(__file__).with_name("guarded.py").read_text().splitlines(), 1) if text in line)


def test_an_accumulation_window_is_skipped_as_a_whole(tmp_path: Path) -> None:
    bad = {5: "input", 10: "gradient", 18: "statistics"}
    dropped = {index: "" for window in (4, 8, 16) for index in range(window, window + 4)}
    clean, guarded, guard = make(), make(), NaNGuard()
    expected = state_of(clean, fit(clean, Batches(24, dropped, drop=True), tmp_path, accumulate_grad_batches=4))
    assert equal(expected, state_of(guarded, fit(guarded, Batches(24, bad), tmp_path, guard, accumulate_grad_batches=4)))
    assert [event["batch_index"] for event in guard.events] == list(bad)


class TwoOptimizers(Module):
    """Manual optimization: the second optimizer alone sees the bad batch's loss when `kind` is "loss"."""

    raw = False

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.other = nn.Linear(4, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        one, two = self.optimizers(use_pl_optimizer=not self.raw)
        self.manual_backward(F.mse_loss(self.other(batch["x"]), batch["y"]))
        two.step()
        two.zero_grad()
        self.manual_backward(self.loss(batch))
        one.step()
        one.zero_grad()

    def configure_optimizers(self) -> Any:
        ours = [*self.first.parameters(), *self.norm.parameters(), *self.last.parameters()]
        return torch.optim.AdamW(ours, lr=0.01), torch.optim.SGD(self.other.parameters(), lr=0.01, momentum=0.9)


class RawOptimizers(TwoOptimizers):
    raw = True


@pytest.mark.parametrize("cls", [TwoOptimizers, RawOptimizers])
def test_several_optimizers_in_manual_optimization(cls: type[Module], tmp_path: Path) -> None:
    bad = {3: "loss", 5: "activation", 9: "statistics", 11: "gradient"}
    clean, guarded, guard = make(cls=cls), make(cls=cls), NaNGuard()
    fit(clean, Batches(16, bad, drop=True), tmp_path)
    trainer = fit(guarded, Batches(16, bad), tmp_path, guard)
    kept = {name: value for name, value in guarded.state_dict().items() if not name.startswith("other")}
    expected = {name: value for name, value in clean.state_dict().items() if not name.startswith("other")}
    assert equal(list(expected.values()), list(kept.values()))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state_of(guarded, trainer))
    assert [event["batch_index"] for event in guard.events] == list(bad)
    steps = 32 if not cls.raw else 0
    assert (guard.budget.steps, guard.budget.skips, trainer.global_step) == (32, 4, steps)
    assert guarded.other.weight.abs().sum() != clean.other.weight.abs().sum()


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization with a closure; moves the weights by `-=`, so a NaN would stay without the guard."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(list(parameters), {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=0.05, momentum=0.9)

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["shift"] = p.grad * group["rho"] / norm
                p.add_(self.state[p]["shift"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["shift"])
        self.base.step()

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss


def test_sam_with_a_closure(tmp_path: Path) -> None:
    clean, guarded, guard = make(SAM), make(SAM), NaNGuard()
    expected = state_of(clean, fit(clean, Batches(30, BAD, drop=True), tmp_path))
    assert equal(expected, state_of(guarded, fit(guarded, Batches(30, BAD), tmp_path, guard)))
    assert [event["batch_index"] for event in guard.events] == list(BAD)


class SecondPassFails(Module):
    """The loss is infinite only in the second pass of batches of kind "loss"."""

    calls = 0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        SecondPassFails.calls += 1
        loss = super().loss({**batch, "kind": torch.zeros((), dtype=torch.int)})
        bad = int(batch["kind"]) and SecondPassFails.calls % 2 == 0
        return loss * math.inf if bad else loss


def test_sam_whose_second_pass_fails_is_taken_back(tmp_path: Path) -> None:
    bad = {4: "loss", 9: "loss"}
    SecondPassFails.calls = 0
    clean, guarded, guard = make(SAM), make(SAM, SecondPassFails), NaNGuard(diagnose=False)
    expected = [p.detach() for p in (fit(clean, Batches(12, bad, drop=True), tmp_path), clean)[1].parameters()]
    fit(guarded, Batches(12, bad), tmp_path, guard)
    assert equal(expected, [p.detach() for p in guarded.parameters()])
    assert guard.budget.skips == 2


class ManualSAM(Module):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.first_step()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.second_step()
        optimizer.zero_grad()


def test_sam_by_hand_past_lightning(tmp_path: Path) -> None:
    bad = {3: "loss", 6: "activation"}
    clean, guarded, guard = make(SAM, ManualSAM), make(SAM, ManualSAM), NaNGuard()
    fit(clean, Batches(12, bad, drop=True), tmp_path)
    fit(guarded, Batches(12, bad), tmp_path, guard)
    assert equal(list(clean.parameters()), list(guarded.parameters()))
    assert [event["batch_index"] for event in guard.events] == list(bad)


@pytest.mark.parametrize("name", ["fused", "fused sgd"])
def test_the_decision_on_the_device_gives_the_same_trajectory(name: str, tmp_path: Path) -> None:
    clean, guarded, guard = make(OPTIMIZERS[name]), make(OPTIMIZERS[name]), NaNGuard(device_side=True)
    bad = {0: "input"} | BAD
    expected = state_of(clean, fit(clean, Batches(30, bad, drop=True), tmp_path))
    assert equal(expected, state_of(guarded, fit(guarded, Batches(30, bad), tmp_path, guard)))
    assert [event["batch_index"] for event in guard.events] == list(bad)
    assert (guard.budget.steps, guard.budget.skips) == (30, len(bad))


def test_a_loop_driven_by_hand_after_the_fit_goes_on(tmp_path: Path) -> None:
    module, guard = make(), NaNGuard()
    trainer = fit(module, Batches(2, {}), tmp_path, guard)
    guard.on_before_backward(trainer, module, torch.tensor(math.nan))
    guard.on_before_optimizer_step(trainer, module, trainer.optimizers[0])
    assert guard.events == []
