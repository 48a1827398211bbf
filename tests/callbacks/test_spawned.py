"""Callbacks are copied and sent to other processes (`ddp_spawn`, notebooks, deepcopy of a Trainer's list): before, in and after a fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pl_normkit.callbacks as callbacks
from tests.callbacks.test_model_audit import RIGHT, fit
from tests.callbacks.test_model_audit import Module as Audited

ARGUMENTS: dict[str, tuple[Any, ...]] = {"NormPlacement": ("peri",), "NormSchedule": (4,), "SwapNorms": ("groupnorm",)}
"""Of those that have arguments without a default."""
COPIES: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback)))


class Module(pl.LightningModule):
    """Has something to do for those that edit norms, dropouts and pools."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(2, 3, 8, 8)
        self.first, self.norm, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.second, self.pool, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.drop(torch.relu(self.norm(self.first(x)))))
        out: Tensor = self.last(self.pool(x).flatten(1))
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=0.01)


class Copying(pl.Callback):
    """Copies another callback in each hook of a fit where that may be in the middle of something."""

    def __init__(self, callback: pl.Callback) -> None:
        self.callback = callback

    def copies(self) -> list[Any]:
        return [make(self.callback) for make in COPIES]

    def on_fit_start(self, *_: Any) -> None:
        self.copies()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.copies()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.copies()


def run(*used: pl.Callback) -> None:
    data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))), batch_size=4)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=list(used), num_sanity_val_steps=0, **options)
    trainer.fit(Module(), data, data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", callbacks.__all__)
def test_a_copy_can_be_made_at_any_time_and_starts_anew(name: str) -> None:
    callback = getattr(callbacks, name)(*ARGUMENTS.get(name, ()))
    copying = Copying(callback)
    for before in (copying.copies(), run(callback, copying)):
        assert before is None or [type(copied) for copied in before] == [type(callback)] * 2
    for copied in copying.copies():
        assert str(getattr(copied, "changes", "")) == str(getattr(callback, "changes", ""))
        run(copied)


def test_counts_go_with_a_copy() -> None:
    used = [callbacks.NaNGuard(), callbacks.ModelAudit(), callbacks.GammaDecay(weight_decay=0.1), callbacks.GradientHealth()]
    fit(Audited(RIGHT, example=True), *used)
    sent = pickle.loads(pickle.dumps(used))
    assert [type(callback) for callback in sent] == [type(callback) for callback in used]
    assert sent[0].budget.steps == used[0].budget.steps == 2
