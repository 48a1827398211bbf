"""`ModelAudit`: lint the network of a training run, once, before the first step."""

from __future__ import annotations

__all__ = ["ModelAudit"]

import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from pl_normkit.auditing import audit_subject, fix_findings, traced
from pl_normkit.callbacks._first_batch import guess_inputs
from pl_normkit.callbacks._network import InputCapture, after_configure_model, is_sharded, traced_network
from pl_normkit.errors import AuditFailedError, ConfigError, NormkitError, NormkitWarning
from pl_normkit.findings import Finding, Note, NoteKind, Severity
from pl_normkit.report import Report, merge_reports
from pl_normkit.rules import Loaders, Needs, Subject
from pl_normkit.selection import Selection


class ModelAudit(Callback):
    """Lints the network when the fit is set up, its loss and optimizers on the first step; nothing else about the run changes.

    The network is audited in `setup` when inputs are known then: `example_inputs`, else the LightningModule's
    `example_input_array` if the network can be traced with it, else, where fixes are to be made, two training samples. Otherwise the
    inputs are caught on their way into the network
    during the first training step (nothing runs twice), and the audit follows before the first backward. There the rules on
    optimizers and on the autograd graph of the loss run too, once. Every rank audits, rank zero speaks.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the LightningModule's forward.
        select: rules to run instead of the configured or default set.
        ignore: rules not to run, besides the configured ones.
        per_module_ignore: module-path pattern -> rules silenced there; paths are those of the LightningModule.
        fail_on: severity at which the run is stopped before its first step.
        fix: "safe" applies fixes that keep the function now or in eval mode, "unsafe" the others too. Fixes are made in
            `setup`, so they need inputs that are known then.
        measure: whether rules may run the inputs through the network, on every rank, to put numbers to their findings.
        config: whether `[tool.pl-normkit]` of the nearest pyproject.toml applies.

    Attributes:
        report: the last report, None before the audit.

    Raises:
        ConfigError: for an unknown rule or pattern.
        AuditFailedError: when a finding reaches `fail_on`.
    """

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
        config: bool = True,
    ) -> None:
        if fix not in ("none", "safe", "unsafe"):
            raise ConfigError(f"ModelAudit knows no fix={fix!r}", mend='use "none", "safe" or "unsafe"')
        if fail_on not in (None, *Severity):
            raise ConfigError(f"ModelAudit knows no fail_on={fail_on!r}", mend='use "note", "warning", "error" or None')
        self.example_inputs = example_inputs
        base = Selection.from_pyproject() if config else Selection()
        self.selection = base.override(select, ignore, per_module_ignore)
        self.selection.rules()
        self.fail_on = None if fail_on is None else Severity(fail_on)
        self.fix = fix
        self.measure = measure
        self.report: Report | None = None
        self._capture: InputCapture | None = None
        self._networks: list[Subject] = []
        self._run_is_audited = False
        self._can_measure = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.report = self._capture = None
            self._networks = []
            self._run_is_audited = False
            self._can_measure = self.measure and not is_sharded(trainer)
            after_configure_model(pl_module, lambda: self._audit_early(trainer, pl_module))

    def _audit_early(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        inputs = self.example_inputs if self.example_inputs is not None else pl_module.example_input_array
        network: nn.Module | None = pl_module
        if inputs is None and self.fix != "none":  # a fix cannot wait for the first batch
            inputs, network = guess_inputs(trainer, pl_module), traced_network(pl_module)
        if inputs is None or network is None:
            return
        report = self._judge_network(pl_module, network, inputs)
        if self.example_inputs is None and self._networks[0].trace_failure:
            self._networks.clear()  # the array may not fit what training feeds: the first batch decides
            return
        if self.fix != "none":
            report = self._mend(pl_module, network, inputs, report)
        self._conclude(trainer, report)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.report is not None:
            _log_counts(trainer, self.report)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.report is None and self._capture is None:
            self._capture = InputCapture(pl_module, is_wrapped=trainer.strategy.model is not pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        self._audit_captured(trainer, pl_module)
        if not self._run_is_audited:
            self._run_is_audited = True
            self._audit_run(trainer, pl_module, loss)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._audit_captured(trainer, pl_module)

    def _audit_captured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.report is not None or self._capture is None:
            return
        reports = [self._judge_network(pl_module, network, inputs) for network, inputs in self._capture.finish()]
        if not reports:
            reports.append(
                Report(
                    notes=[
                        Note(f"no network ran in the first training step: give {type(self).__name__}(example_inputs=...)", NoteKind.NOT_RUN)
                    ]
                )
            )
        elif self.fix != "none" and any(report.findings for report in reports):
            reports.append(
                Report(
                    notes=[
                        Note(
                            f"fix={self.fix!r} needs inputs when the fit is set up: give {type(self).__name__}(example_inputs=...)",
                            NoteKind.NOT_RUN,
                        )
                    ]
                )
            )
        report = merge_reports(type(pl_module).__name__, reports)
        self._conclude(trainer, report)
        _log_counts(trainer, report)

    def _audit_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """What exists from the first step on: the optimizers, the loaders, and the autograd graph of the loss."""
        loaders, needing = _loaders(trainer, pl_module), {Needs.OPTIMIZERS, Needs.LOADERS}
        found = [self._judge(replace(network, optimizers=trainer.optimizers, loaders=loaders), needing) for network in self._networks]
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            found.append(self._judge(Subject(root=pl_module, loss=loss, measure=False), {Needs.LOSS}))
        self._networks = []
        before, now = self.report or Report(), merge_reports(type(pl_module).__name__, found)
        now = replace(now, notes=[note for note in now.notes if note not in before.notes])
        if now.findings or now.notes:
            self._conclude(trainer, now)
            _log_counts(trainer, now)
        self.report = merge_reports(now.subject, [before, now])

    def _judge_network(self, root: nn.Module, network: nn.Module, inputs: Any) -> Report:
        subject = traced(Subject(model=network, root=root, example_inputs=inputs, measure=self._can_measure))
        self._networks.append(subject)
        return self._judge(subject, set(Needs) - {Needs.OPTIMIZERS, Needs.LOSS, Needs.LOADERS})

    def _judge(self, subject: Subject, needing: Set[Needs]) -> Report:
        """An audit that fails must not end the run: it becomes a note, which is shown as one warning."""
        try:
            return audit_subject(subject, self.selection, needing=needing)
        except NormkitError:
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            return Report(notes=[Note(f"the audit failed with {failure}; training goes on. Please report it with the model")])

    def _mend(self, root: nn.Module, network: nn.Module, inputs: Any, before: Report) -> Report:
        try:
            changes = fix_findings(root, inputs, before.findings, network=network, allow_unsafe=self.fix == "unsafe")
        except Exception as error:
            failure = f"a fix failed with {type(error).__name__}: {error}; the model is as it was. Please report it with the model"
            return Report(before.findings, before.subject, [*before.notes, Note(failure)])
        if changes:
            self._networks.clear()
        after = self._judge_network(root, network, inputs) if changes else before
        made = [f"fixed: {change}" for change in changes.made]
        skipped = [Note(f"not fixed: {change}", NoteKind.INFORMATION) for change in changes.skipped]
        return Report(after.findings, after.subject, [*after.notes, *skipped], made)

    def _conclude(self, trainer: pl.Trainer, report: Report) -> None:
        self.report = report
        if trainer.is_global_zero:
            report.print()
            _warn(report)
        severe = report.at_least(self.fail_on) if self.fail_on is not None else []
        if severe:
            raise AuditFailedError(
                f"the audit found {len(severe)} at or above {self.fail_on!s}: {severe[0].code} {severe[0].message}",
                where=", ".join(str(place) for place in severe[0].places[:3]),
                evidence="; ".join(f"{finding.code} {finding.message}" for finding in severe[1:]),
                mend=severe[0].advice,
                silence=severe[0].silence,
            )


def _loaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Loaders:
    """The run's loaders as they are, nothing is set up for it: validation's are known after the sanity check."""
    datamodule = getattr(trainer, "datamodule", None)
    owners = [owner for owner in (pl_module, datamodule) if owner is not None]
    return Loaders(trainer.train_dataloader, trainer.val_dataloaders, owners)


def _warn(report: Report) -> None:
    if report.findings:
        listed = "; ".join(f"{finding.code} {finding.message} ({_places(finding)})" for finding in report.findings)
        codes = ", ".join(f'"{code}"' for code in dict.fromkeys(finding.code for finding in report.findings))
        warnings.warn(f"{report.subject}: {listed}. Silence: ignore=[{codes}]", NormkitWarning, stacklevel=2)
    for note in report.notes:
        warnings.warn(f"{report.subject}: {note}", NormkitWarning, stacklevel=2)


def _not_run(text: str) -> Report:
    return Report(notes=[Note(text, NoteKind.NOT_RUN)])


def _places(finding: Finding) -> str:
    return f"{len(finding.places)} place{'s' if len(finding.places) != 1 else ''}"


def _log_counts(trainer: pl.Trainer, report: Report) -> None:
    counts = {f"normkit/{severity.value}s": float(count) for severity, count in report.counts().items()}
    for logger in trainer.loggers:
        logger.log_metrics(counts, step=trainer.global_step)
