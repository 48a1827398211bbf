"""The hooks by which an audit follows a run: its first steps, and its first validation."""

from __future__ import annotations

__all__ = ["AuditHooks"]

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._lightning import Callback
from pl_normkit.callbacks._report_of_run import conclude
from pl_normkit.callbacks._watched_evaluation import WatchedEvaluation
from pl_normkit.callbacks._watched_run import WatchedRun
from pl_normkit.findings import Severity
from pl_normkit.report import Report

if TYPE_CHECKING:
    import lightning.pytorch as pl


class AuditHooks(Callback):
    """What is found in the sanity check waits for the report of the first step."""

    report: Report | None = None
    output: Path | None = None
    fail_on: Severity | None = None
    _watched: WatchedRun | None = None
    _evaluation: WatchedEvaluation | None = None

    def stop_watching(self) -> None:
        """Watch neither steps nor validations any more."""
        self._stop_steps()
        if self._evaluation is not None:
            self._evaluation.stop()
        self._evaluation = None

    def _stop_steps(self) -> None:
        if self._watched is not None:
            self._watched.stop()
        self._watched = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._watched is not None:
            self._watched.start_batch(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        if self._watched is not None:
            self._watched.before_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watched is not None:
            self._watched.after_backward()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._watched is not None and self._watched.before_optimizer_step():
            self._tell(trainer, self._watched.audit.report)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._watched is not None and self._watched.end_batch():
            self._tell(trainer, self._watched.audit.report)
            if self._watched.is_over:
                self._stop_steps()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watched is not None and self._watched.end_epoch():
            self._tell(trainer, self._watched.audit.report)
        self._watched = None

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.start()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._evaluation is not None and self._evaluation.stop() and self.report is not None:
            self._tell(trainer, self.report)

    def _tell(self, trainer: pl.Trainer, report: Report) -> None:
        shown, self.report = self.report, report if self._evaluation is None else self._evaluation.added_to(report)
        conclude(trainer, self.report, shown, self.output, self.fail_on)
