"""The page's account of a fit, on runs whose scores are written down beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.recipes.history import FitHistory
from pl_normkit.recipes.module import RecipeModule
from pl_normkit.recipes.run_result import result_of
from pl_normkit.report.landmarks import RunResult, Score, Table


class Scripted(RecipeModule):
    """Scores what it was told, epoch by epoch; its training loss is 10 minus the step."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.class_names, self.ema_decay = ["sky", "road"], 0.0
        self.scores = scores
        self.layer = nn.Linear(1, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)

    val_dataloader = train_dataloader

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("train_loss", 10.0 - self.global_step)
        return self.layer(batch[0]).mean() * 0

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        score = self.scores[self.current_epoch]
        self.log_dict({"val_score": score, "val_error": 1 - score, "val_part/sky": score})

    def score_tables(self) -> Mapping[str, Mapping[str, float]]:
        return {"Each class": {"sky": self.scores[self.current_epoch], "road": math.nan}}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, scores: list[float], *, checkpoints: bool = True, **options: Any) -> RunResult:
    """Two steps an epoch."""
    keeper = [ModelCheckpoint(folder, monitor="val_score", mode="max")] if checkpoints else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": checkpoints}
    trainer = L.Trainer(max_epochs=len(scores), callbacks=[FitHistory(), *keeper], accelerator="cpu", **quiet, **options)
    trainer.fit(Scripted(scores))
    return result_of(trainer)


def test_the_best_checkpoint_stands_beside_the_last_state(tmp_path: Path) -> None:
    result = fit(tmp_path, [0.5, 0.75, 0.25])
    best, last = "best checkpoint, step 4", "last state, step 6"
    assert result.scores == [Score("val_score", 0.75, best), Score("val_score", 0.25, last)]
    assert Path(result.checkpoint).name == "epoch=1-step=4.ckpt"
    assert result.tables == [
        Table("Scores on the validation data", ["metric", best, last], [["val_score", "0.75", "0.25"], ["val_error", "0.25", "0.75"]]),
        Table("Each class", ["", best, last], [["sky", "0.75", "0.25"], ["road", "-", "-"]]),
    ]
    assert result.curves == {
        "val_score": [(2, 0.5), (4, 0.75), (6, 0.25)],
        "train_loss": [(step, 11.0 - step) for step in range(1, 7)],
        "val_error": [(2, 0.5), (4, 0.25), (6, 0.75)],
    }


def test_a_best_checkpoint_that_is_the_last_state_is_shown_once(tmp_path: Path) -> None:
    assert fit(tmp_path, [0.5, 0.75]).scores == [Score("val_score", 0.75, "best checkpoint and last state, step 4")]


def test_scores_of_a_validation_before_the_last_step_say_so(tmp_path: Path) -> None:
    (score,) = fit(tmp_path, [0.5, 0.75], max_steps=3).scores
    assert score == Score("val_score", 0.5, "best checkpoint and step 2, the last validation of 3 steps")


@pytest.mark.parametrize("validates", [True, False])
def test_without_checkpoints_or_validation_there_is_less_to_say(tmp_path: Path, validates: bool) -> None:
    result = fit(tmp_path, [0.5], checkpoints=False, limit_val_batches=1.0 if validates else 0)
    titles = ["Scores on the validation data", "Each class"] if validates else []
    assert ([*result.scores], result.checkpoint, [table.title for table in result.tables]) == ([], "", titles)
    assert set(result.curves) == {"train_loss"}


def test_of_a_long_fit_evenly_spread_steps_are_kept() -> None:
    history = FitHistory()
    for step in range(1, 3000):
        trainer = SimpleNamespace(global_step=step, is_global_zero=True, callback_metrics={"train_loss": torch.tensor(0.0)}, optimizers=[])
        history.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert [step for step, _ in history.learning_curves()["train_loss"]] == list(range(8, 3000, 8))
