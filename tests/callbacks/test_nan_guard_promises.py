"""What NaNGuard promises beyond finite gradients: losses that lose their NaN on the way back, buffers, lasting causes, quiet reports."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.callbacks.nan_guard import NaNGuard
from pl_normkit.errors import NonFiniteError, NormkitWarning
from pl_normkit.methods.nan_safety.diagnosis.replay import replay
from tests.callbacks.test_nan_guard import Batches, Module, equal, fit, scaler_plugin, state_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*", "ignore:.*isinstance.treespec.*", "ignore:Checkpoint directory"
)

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
        optimizer = self.optimizers(use_pl_optimizer="step" not in self.past and "closure" not in self.past)

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


STYLES: dict[str, type[Module]] = {"automatic": SelectsNothing, "dict": AsDict, "manual": Manual} | {
    f"past Lightning: {past}": type(f"Past{index}", (Manual,), {"past": past})
    for index, past in enumerate(("backward", "step", "backward and step", "closure"))
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def made(cls: type[Module], optimizer: str = "adamw") -> Module:
    torch.manual_seed(0)
    return cls(OPTIMIZERS[optimizer])


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


# -- reports


class ReadsAnIterator(Module):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class HoldsAnIterator(Module):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.numbers = iter(range(1000))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert next(self.numbers) == batch_idx
        return super().training_step(batch, batch_idx)


class RunsOnce(Module):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if getattr(self, "last_index", -1) == batch_idx:
            raise RuntimeError("this batch was seen before")
        self.last_index = batch_idx
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor", "ignore:Found `dataloader_iter` argument")
@pytest.mark.parametrize("cls", [ReadsAnIterator, HoldsAnIterator, RunsOnce])
def test_a_step_that_cannot_run_again_is_skipped_and_unknown(cls: type[Module], tmp_path: Path) -> None:
    module, guard = made(cls), NaNGuard()
    with pytest.warns(NormkitWarning, match="could not be diagnosed") as seen:
        trainer = fit(module, Batches(12, {3: "loss", 7: "input"}), tmp_path, guard)
    assert [event["first"].kind for event in guard.events] == ["unknown"] * 2
    assert sum(found.category is NormkitWarning for found in seen) == 1
    assert (trainer.global_step, guard.budget.skips) == (12, 2)


@pytest.mark.parametrize("folder", ["/proc/self/nowhere", "file", "/dev/full"])
def test_a_folder_that_cannot_be_written_is_one_warning(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    guard = NaNGuard(folder=tmp_path / folder)
    with pytest.warns(NormkitWarning, match="could not be written") as seen:
        fit(made(Module), Batches(12, {3: "loss", 7: "input"}), tmp_path, guard)
    assert sum(found.category is NormkitWarning for found in seen) == 1
    assert [event["file"] for event in guard.events] == ["", ""]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(document: Any, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.warns(NormkitWarning, match="No space left"):
        fit(made(Module), Batches(6, {3: "loss"}), tmp_path, NaNGuard(folder=tmp_path / "files"))
    assert list((tmp_path / "files").iterdir()) == []


def test_files_of_raw_steps_do_not_overwrite_each_other(tmp_path: Path) -> None:
    guard = NaNGuard()
    fit(made(STYLES["past Lightning: step"]), Batches(10, BAD), tmp_path, guard)
    assert len({event["file"] for event in guard.events}) == 3
    assert all(Path(event["file"]).exists() for event in guard.events)


def test_the_warning_names_the_file_and_the_count_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = NaNGuard()
    with caplog.at_level(logging.WARNING, "pl_normkit"):
        trainer = fit(made(Module), Batches(10, {3: "loss", 7: "input"}), tmp_path, guard)
    assert len(caplog.messages) == 2
    assert all(f"pl-normkit replay {event['file']}" in text for event, text in zip(guard.events, caplog.messages, strict=True))
    assert float(trainer.callback_metrics["normkit/skipped"]) == 2.0


def test_counts_on_the_device_are_in_the_checkpoint(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def __init__(self) -> None:
            self.found: dict[int, Any] = {}

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]["NaNGuard"]["budget"]
            self.found[batch_idx] = (saved["steps"], saved["skips"])

    torch.manual_seed(0)
    module = SelectsNothing(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True))
    saves = Saves()
    fit(module, Batches(8, BAD), tmp_path, NaNGuard(device_side=True), saves, enable_checkpointing=True)
    assert saves.found == {index: (index + 1, sum(bad <= index for bad in BAD)) for index in range(8)}


def test_the_guilty_samples_are_in_the_event_and_in_the_file(tmp_path: Path) -> None:
    guard = NaNGuard()
    fit(made(Module), Batches(6, {3: "input"}), tmp_path, guard)
    assert guard.events[0]["samples"] == [2]
    assert replay(guard.events[0]["file"]).saved.samples == [2]


class Spikes(Module):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = F.mse_loss(self(batch["x"]), batch["y"])
        return loss * 40 if int(batch["kind"]) else loss


@pytest.mark.parametrize("plugins", [False, True])
def test_finite_spikes_are_skipped_and_counted_apart(plugins: bool, tmp_path: Path) -> None:
    bad = {13: "loss", 17: "loss"}
    states = []
    for drop in (True, False):
        module, guard = made(Spikes), NaNGuard(spike_factor=8.0)
        options = {"plugins": [scaler_plugin()]} if plugins else {}
        states.append(state_of(module, fit(module, Batches(24, bad, drop=drop), tmp_path, guard, **options)))
    assert equal(*states)
    assert (guard.spikes, guard.budget.skips, guard.overflows) == (2, 0, 0)
    assert [(event["batch_index"], event["first"].kind) for event in guard.events] == [(13, "spike"), (17, "spike")]


def test_modules_of_pytorch_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")
    names = ("forward", "loss", "configure_optimizers", "training_step")

    def build(self: Any) -> None:
        other.LightningModule.__init__(self)
        self.first, self.norm, self.last, self.losses = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1), []
        self.make = OPTIMIZERS["adamw"]

    module = type("Other", (other.LightningModule,), {"__init__": build, **{name: getattr(Module, name) for name in names}})()
    guard = NaNGuard()
    trainer = other.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[guard],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Batches(6, {3: "loss"}), batch_size=None))
    assert [event["batch_index"] for event in guard.events] == [3]
