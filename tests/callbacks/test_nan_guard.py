"""NaNGuard on real Lightning runs: what is skipped, what is kept, what is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pl_normkit.callbacks.nan_guard import NaNGuard
from pl_normkit.errors import ConfigError, NonFiniteError
from pl_normkit.methods.nan_safety.diagnosis.replay import replay

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*", "ignore:.*isinstance.treespec.*", "ignore:Checkpoint directory"
)


class Batches(Dataset[dict[str, Tensor]]):
    """`count` batches of (8, 4) inputs; `bad` maps a batch index to what is wrong with it."""

    def __init__(self, count: int, bad: dict[int, str], drop: bool = False) -> None:
        self.indices = [index for index in range(count) if not (drop and index in bad)]
        self.bad = bad

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        index = self.indices[position]
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(8, 4, generator=generator)
        y = x.sum(1, keepdim=True).tanh()
        kind = self.bad.get(index, "")
        if kind == "input":
            x[2, 1] = math.nan
        return {"x": x, "y": y, "kind": torch.tensor(KINDS.index(kind))}


KINDS = ["", "input", "activation", "loss", "gradient", "statistics", "overflow", "huge"]


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient.view(-1)[0] = ctx.value
        return gradient, None


class Module(pl.LightningModule):
    """Linear, batch norm, linear; its step does the harm that the batch asks for."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 1)
        self.make = optimizer or (lambda p: torch.optim.AdamW(p, lr=0.01))
        self.losses: list[float] = []

    def forward(self, x: Tensor, kind: str = "") -> Tensor:
        hidden = self.first(x)
        if kind == "activation":
            hidden = hidden / torch.zeros(())
        if kind == "overflow":
            hidden = hidden + 1e25 * torch.arange(8.0)[:, None]
        return self.last(self.norm(hidden).relu())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        kind = KINDS[int(batch["kind"])]
        out = self(batch["x"], kind)
        if kind == "gradient":
            out = _BadGradient.apply(out, -math.inf)
        loss = F.mse_loss(out, batch["y"])
        if kind == "loss":
            loss = loss + torch.zeros(()).log()
        if kind == "huge":
            loss = loss * 1e21
        if kind == "statistics":
            self.norm(torch.full((4, 8), math.nan))
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def fit(
    module: pl.LightningModule,
    data: Dataset[Any],
    folder: Path,
    *callbacks: pl.Callback,
    epochs: int = 1,
    **kwargs: Any,
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=kwargs.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **kwargs,
    )
    trainer.fit(module, DataLoader(data, batch_size=None, shuffle=False))
    return trainer


def state_of(module: pl.LightningModule, trainer: pl.Trainer) -> list[Tensor]:
    tensors = [tensor.detach().clone() for tensor in module.state_dict().values()]
    for optimizer in trainer.optimizers:
        for entry in optimizer.state.values():
            tensors += [value.detach().clone() for value in entry.values() if isinstance(value, Tensor)]
    return tensors


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def make(optimizer: Any = None, cls: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return cls(optimizer)


BAD = {3: "input", 7: "activation", 11: "loss", 12: "gradient", 17: "statistics", 21: "overflow", 25: "huge"}

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
    assert first[11].source.endswith(f"test_nan_guard.py:{_line_of('torch.zeros(()).log()')}")
    assert first[3].inputs[0]["nan"] == 1


def _line_of(text: str) -> int:
    return next(number for number, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


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
