"""What NaNGuard says and writes: reports never end a run, files are whole, counts are kept, samples are named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.callbacks.nan_guard import NaNGuard
from pl_normkit.errors import NormkitWarning
from pl_normkit.methods.nan_safety.diagnosis.replay import replay
from tests.callbacks.guarded import Batches, Module, equal, fit, state_of
from tests.callbacks.guarded_losses import BAD, OPTIMIZERS, STYLES, SelectsNothing, made
from tests.callbacks.test_nan_guard_ends import scaler_plugin

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


class HidesAnIterator(Module):
    """In a container of an object."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.helper = Reader()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert next(self.helper.streams["numbers"]) == batch_idx
        return super().training_step(batch, batch_idx)


class Reader:
    def __init__(self) -> None:
        self.streams = {"numbers": iter(range(1000))}


class Leaves(Module):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if getattr(self, "last_index", -1) == batch_idx:
            raise SystemExit(0)
        self.last_index = batch_idx
        return super().training_step(batch, batch_idx)


class RunsOnce(Module):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if getattr(self, "last_index", -1) == batch_idx:
            raise RuntimeError("this batch was seen before")
        self.last_index = batch_idx
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor", "ignore:Found `dataloader_iter` argument")
@pytest.mark.parametrize("cls", [ReadsAnIterator, HoldsAnIterator, HidesAnIterator, Leaves, RunsOnce])
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
