"""The first validation batch of a fit as `ModelAudit` sees it: modules in training mode, dropout that drops all the same."""

from __future__ import annotations

__all__ = ["EvaluationHooks", "WatchedEvaluation"]

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._fit import Fit
from pl_normkit.callbacks._lightning import Callback
from pl_normkit.callbacks._watched_run import can_record
from pl_normkit.first_step import EvaluationRecorder
from pl_normkit.report import Report
from pl_normkit.run_audit import RunAudit
from pl_normkit.selection import Selection

if TYPE_CHECKING:
    import lightning.pytorch as pl


class WatchedEvaluation:
    """Watches one batch, the sanity check's where there is one; nothing more runs, and later batches cost nothing.

    Args:
        fit: what our callbacks share.
        selection: the rules.
    """

    def __init__(self, fit: Fit, selection: Selection) -> None:
        self._module, self._selection = fit.pl_module, selection
        self._recorder = EvaluationRecorder(fit.pl_module) if can_record(fit) else None
        self._found = Report()

    def start(self) -> None:
        if self._recorder is not None:
            self._recorder.start()

    def stop(self) -> bool:
        """Whether something was found."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return False
        recorder.stop()
        run = RunAudit(self._module, self._selection)
        if recorder.facts is not None:
            run.parts["step"] = recorder.facts
            run.judge_parts()
        if recorder.failure is not None:
            run.note_failure("the first validation batch was not read", recorder.failure)
        self._found = run.report
        return bool(self._found.findings or self._found.notes)

    def added_to(self, report: Report) -> Report:
        """`report` with what was found."""
        new = [finding for finding in self._found.findings if finding not in report.findings]
        findings = sorted([*report.findings, *new], key=lambda finding: (-finding.severity.rank, finding.code))
        return replace(report, findings=findings, notes=list(dict.fromkeys([*report.notes, *self._found.notes])))


class EvaluationHooks(Callback):
    """The hooks of validation; what is found in the sanity check waits for the report of the first step."""

    report: Report | None = None
    _evaluation: WatchedEvaluation | None = None

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.start()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._evaluation is not None and self._evaluation.stop() and self.report is not None:
            self._tell(trainer, self.report)

    def _tell(self, trainer: pl.Trainer, report: Report) -> None:
        raise NotImplementedError
