"""`ModelAudit`: lint the networks, loss and optimizers of a training run, once, before the first optimizer step."""

from __future__ import annotations

__all__ = ["ModelAudit"]

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pl_normkit.callbacks._fit import after, fit_of, how_to_load, say_changes
from pl_normkit.callbacks._lightning import say
from pl_normkit.callbacks._report_of_run import check_options, check_output, conclude
from pl_normkit.callbacks._watched_evaluation import EvaluationHooks, WatchedEvaluation
from pl_normkit.callbacks._watched_run import StepHooks, WatchedRun
from pl_normkit.report import Report
from pl_normkit.restoring import KEY, fix_records, restore_records
from pl_normkit.selection import Selection
from pl_normkit.surgery import Changes

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ModelAudit(StepHooks, EvaluationHooks):
    """Lints the networks of a run, its loss, optimizers and loaders; one report, before the first optimizer step.

    Every network is read that the first training step calls, or whose parameters an optimizer holds, as the other callbacks of this
    library have edited it. What it is called with is `example_inputs`, `example_input_array` if it fits, else caught in that step
    (nothing runs twice); for fixes it is taken from two training samples in `setup`. What is called after the first optimizer step is
    added to the report when it comes. Every rank audits, rank zero speaks. A checkpoint's fixes are in force wherever this callback is.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the LightningModule's forward.
        select: rules to run instead of the configured or default set.
        ignore: rules not to run, besides the configured ones.
        per_module_ignore: module-path pattern (of the LightningModule) -> rules silenced there.
        fail_on: severity at which the run is stopped before its first optimizer step, with all findings.
        fix: "safe" applies fixes that keep the function now or in eval mode, "unsafe" the others too. Checkpoints store them.
        measure: whether rules may run the inputs through the network, on every rank, to put numbers to their findings.
        stress: whether the first training step is also run on corner batches: one sample, empty masks, all labels ignored.
        config: whether `[tool.pl-normkit]` of pyproject.toml applies.
        output: file the report is also written to, as its ending says: .sarif, .json or .html.

    Attributes: `report`, the last one, None before the audit; `changes`, what the fixes changed, with `undo()`.

    Raises: ConfigError for an unknown rule, pattern or option; AuditFailedError when a finding reaches `fail_on`.
    """

    _of_a_run = ("_watched", "_evaluation", "_stop_waiting")

    def __init__(
        self,
        example_inputs: Any = None,
        *,
        select: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        per_module_ignore: Mapping[str, Sequence[str]] | None = None,
        fail_on: Literal["note", "warning", "error"] | None = None,
        fix: Literal["none", "safe", "unsafe"] = "none",
        measure: bool = False,
        stress: bool = False,
        config: bool = True,
        output: str | Path | None = None,
    ) -> None:
        self.example_inputs = example_inputs
        self.selection = (Selection.from_pyproject() if config else Selection()).override(select, ignore, per_module_ignore)
        self.selection.rules()
        self.fix, self.measure, self.stress = fix, measure, stress
        self.fail_on, self.output = check_options(fix, fail_on), check_output(output)
        self.report: Report | None = None
        self.changes, self._has_said = Changes(), False
        self._watched: WatchedRun | None = None
        self._records: list[dict[str, Any]] = []
        self._stop_waiting: Callable[[], None] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit = fit_of(self, trainer, pl_module)
        self._stop_waiting = after(pl_module, "on_load_checkpoint", lambda checkpoint: self._restore(pl_module, checkpoint))
        if stage == "fit":
            self.report = None
            options: dict[str, Any] = {"measure": self.measure, "fix": self.fix, "stress": self.stress}
            self._watched = WatchedRun(fit, self.selection, self.example_inputs, **options)
            self._evaluation = WatchedEvaluation(fit, self.selection)
            if self.fix != "none":
                fit.fix(self._fix)

    def _fix(self) -> None:
        assert self._watched is not None
        self._records += self._watched.fix()
        if changes := self._watched.audit.changes:
            self.changes = changes
            say_changes(self, self.changes.made, how_to_load=how_to_load(self))

    def _restore(self, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """What a checkpoint's weights were trained with counts, not what `fix` would do now."""
        records = fix_records(checkpoint)
        if records and records != self._records:
            self.changes.undo()
            self.changes, self._records = restore_records(pl_module, records), records
            if self._watched is not None:
                self._watched.audit.changes = self.changes

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Any) -> None:
        if self._stop_waiting is not None:
            self._stop_waiting()
        if self._evaluation is not None:
            self._evaluation.stop()
        self._evaluation = self._stop_waiting = None
        self._stop_watching()

    on_exception = teardown  # type: ignore[assignment]

    def _stop_watching(self) -> None:
        if self._watched is not None:
            self._watched.stop()
        self._watched = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(select=self.selection.select, ignore=tuple(self.selection.ignore), fix=self.fix)

    def state_dict(self) -> dict[str, Any]:
        return {KEY: self._records} if self._records else {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._records and not self._has_said:
            self._has_said = True
            say(f"The weights of this checkpoint belong to an edited network. {how_to_load(self)}")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._watched is not None and self._watched.before_optimizer_step():
            self._tell(trainer, self._watched.audit.report)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._watched is not None and self._watched.end_batch():
            self._tell(trainer, self._watched.audit.report)
            if self._watched.is_over:
                self._stop_watching()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watched is not None and self._watched.end_epoch():
            self._tell(trainer, self._watched.audit.report)
        if self._watched is not None and self._watched.has_seen_all():
            self._stop_watching()

    def _tell(self, trainer: pl.Trainer, report: Report) -> None:
        shown, self.report = self.report, report if self._evaluation is None else self._evaluation.added_to(report)
        conclude(trainer, self.report, shown, self.output, self.fail_on)
