"""NaNGuard where steps are special: scalers, budgets, rollbacks, schedulers, validation, replay files, compiled modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from pl_normkit.callbacks.nan_guard import NaNGuard
from pl_normkit.errors import ConfigError, NonFiniteError
from pl_normkit.methods.nan_safety.diagnosis.replay import replay
from tests.callbacks.guarded import BAD, KINDS, Batches, Module, equal, fit, make, state_of


def scaler_plugin() -> Any:
    from lightning.pytorch.plugins.precision import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


class HalfOverflow(Module):
    """Batches of kind "gradient" overflow in float16 under the loss scale, and only there."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        kind = KINDS[int(batch["kind"])]
        if kind != "gradient":
            return super().loss(batch)
        out = self(batch["x"])
        return (out.half() * 100.0).float().mean()


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_overflows_are_normal_and_bad_losses_are_not(fused: bool, tmp_path: Path) -> None:
    bad = {4: "loss", 8: "gradient", 12: "input"}
    module = make(lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused), HalfOverflow)
    guard, plugin = NaNGuard(), scaler_plugin()
    trainer = fit(module, Batches(16, bad), tmp_path, guard, plugins=[plugin])
    assert [event["batch_index"] for event in guard.events] == [4, 12]
    assert guard.overflows == 1
    assert plugin.scaler.get_scale() == 2.0**9
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state_of(module, trainer))


@pytest.mark.parametrize(
    ("options", "bad", "batch"),
    [
        ({"policy": "raise"}, {2: "loss"}, 2),
        ({"max_skips": 2}, {1: "loss", 4: "loss", 5: "input", 6: "gradient"}, 6),
        ({"max_skips_per_1000": 3}, dict.fromkeys((1, 3, 5, 7), "loss"), 7),
    ],
)
def test_the_run_stops_with_a_report(options: dict[str, Any], bad: dict[int, str], batch: int, tmp_path: Path) -> None:
    module, guard = make(), NaNGuard(**options)
    with pytest.raises(NonFiniteError, match=f"batch {batch}") as caught:
        fit(module, Batches(12, bad), tmp_path, guard)
    assert "pl-normkit replay" in caught.value.fix
    assert all(bool(torch.isfinite(tensor).all()) for tensor in module.state_dict().values())


def test_a_budget_of_two_in_a_row_forgives_two(tmp_path: Path) -> None:
    guard = NaNGuard(max_skips=2)
    fit(make(), Batches(12, {1: "loss", 2: "loss", 4: "loss", 5: "loss"}), tmp_path, guard)
    assert guard.budget.skips == 4


class WithScheduler(Module):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recorder(pl.Callback):
    """State after each batch."""

    def __init__(self) -> None:
        self.states: list[list[Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.states.append(state_of(pl_module, trainer))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_rollback_goes_back_to_the_snapshot_and_lowers_the_rate(tmp_path: Path) -> None:
    module, recorder = make(cls=WithScheduler), Recorder()
    fit(module, Batches(12, {9: "loss"}), tmp_path, recorder, NaNGuard("rollback", snapshot_every=4, lr_factor=0.5))
    assert equal(recorder.states[7], recorder.states[9])
    assert recorder.rates[7] == pytest.approx(0.001)
    assert recorder.rates[9] == pytest.approx(0.0005)


def test_schedulers_advance_on_skipped_steps(tmp_path: Path) -> None:
    module, recorder = make(cls=WithScheduler), Recorder()
    trainer = fit(module, Batches(12, {3: "loss"}), tmp_path, recorder, NaNGuard())
    assert trainer.global_step == 12
    assert recorder.rates[4] == pytest.approx(0.001)


class NoLoss(Module):
    """Returns None for batches of kind "statistics", after the harm is done to the statistics."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        loss = self.loss(batch)
        return None if KINDS[int(batch["kind"])] == "statistics" else loss


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.*")
def test_a_step_without_a_loss_does_not_leave_bad_statistics(tmp_path: Path) -> None:
    module, guard = make(cls=NoLoss), NaNGuard()
    fit(module, Batches(6, {5: "statistics"}), tmp_path, guard)
    assert bool(torch.isfinite(module.norm.running_mean).all())


class ValidatesInTheWindow(Module):
    seen: list[bool]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(bool(torch.isfinite(self.norm.running_mean).all()))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Batches(1, {}), batch_size=None)


def test_validation_in_an_open_window_sees_finite_statistics(tmp_path: Path) -> None:
    module = make(cls=ValidatesInTheWindow)
    module.seen = []
    fit(module, Batches(8, {4: "input"}), tmp_path, NaNGuard(), accumulate_grad_batches=4, val_check_interval=1, num_sanity_val_steps=0)
    assert module.seen == [True] * 8


class Metric(Module):
    """Keeps its own counters, which the diagnosis must not touch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        self.noise = torch.rand(1) + F.dropout(torch.ones(3))[0]
        return super().training_step(batch, batch_idx)


def test_the_diagnosis_leaves_nothing_behind(tmp_path: Path) -> None:
    plain, diagnosed = make(cls=Metric), make(cls=Metric)
    torch.manual_seed(5)
    fit(plain, Batches(30, BAD), tmp_path, NaNGuard(diagnose=False))
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(diagnosed, Batches(30, BAD), tmp_path, NaNGuard())
    assert torch.equal(expected, torch.rand(3))
    assert (diagnosed.count, len(diagnosed.losses)) == (30, 30)
    assert equal(list(plain.parameters()), list(diagnosed.parameters()))
    assert "log" not in vars(diagnosed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind])
def test_replay_files(kind: str, tmp_path: Path) -> None:
    guard = NaNGuard(folder=tmp_path / "files", save_weights=True)
    fit(make(), Batches(4, {2: kind}), tmp_path, guard)
    file = guard.events[0]["file"]
    fresh = make()
    before = [value.clone() for value in fresh.state_dict().values()]
    whole = replay(file, fresh)
    assert whole.reproduced
    assert whole.again is not None
    assert (whole.again.kind, whole.again.module) == (whole.saved.kind, whole.saved.module)
    assert equal(before, list(fresh.state_dict().values()))
    alone = replay(file)
    assert alone.how == {"input": "batch", "activation": "operation", "loss": "operation"}.get(kind, alone.how)
    assert alone.reproduced or kind not in ("input", "activation", "loss")
    assert str(alone).startswith(alone.saved.kind)


def test_replay_files_are_small_and_few(tmp_path: Path) -> None:
    guard = NaNGuard(folder=tmp_path / "files", max_files=2)
    fit(make(), Batches(30, BAD), tmp_path, guard)
    files = list((tmp_path / "files").iterdir())
    assert len(files) == 2
    assert all(file.stat().st_size < 50_000 for file in files)
    assert sum(bool(event["file"]) for event in guard.events) == 2


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute:UserWarning")
def test_compiled_modules(whole: bool, tmp_path: Path) -> None:
    module, guard = make(), NaNGuard()
    if whole:
        module.compile(backend="aot_eager")
    else:
        module.last = torch.compile(module.last, backend="aot_eager")  # type: ignore[assignment]
    bad = {3: "input", 7: "activation"}
    trainer = fit(module, Batches(10, bad), tmp_path, guard)
    assert [event["batch_index"] for event in guard.events] == list(bad)
    assert [event["first"].kind for event in guard.events] == ["batch", "forward"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state_of(module, trainer))


def test_a_strategy_is_given_back(tmp_path: Path) -> None:
    trainer = fit(make(), Batches(3, {}), tmp_path, NaNGuard())
    assert "optimizer_step" not in vars(trainer.strategy)
    with pytest.raises(NonFiniteError):
        fit(make(), Batches(3, {1: "loss"}), tmp_path, guard := NaNGuard("raise"))
    assert guard._guard._undo == []


@pytest.mark.parametrize("options", [{"policy": "ignore"}, {"snapshot_every": 0}, {"lr_factor": 0.0}, {"lr_factor": 1.5}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        NaNGuard(**options)


def test_counts_survive_a_checkpoint() -> None:
    guard = NaNGuard(max_skips=1)
    for skipped in (False, True, True):
        guard.budget.count(skipped=skipped)
    other = NaNGuard(max_skips=1)
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()
    assert other.budget.exceeded() == guard.budget.exceeded() != ""
