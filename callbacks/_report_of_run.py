"""How the report of a run reaches people: shown once, logged as counts, written to a file, and a reason to stop."""

from __future__ import annotations

__all__ = ["check_options", "check_output", "conclude", "loaders_of"]

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._loggers import log_findings
from pl_normkit.errors import AuditFailedError, ConfigError, NormkitWarning, nearest
from pl_normkit.findings import NoteKind, Severity
from pl_normkit.report import Report
from pl_normkit.subject import Loaders

if TYPE_CHECKING:
    import lightning.pytorch as pl

_FORMATS = {".sarif": Report.to_sarif, ".json": Report.to_json, ".html": Report.to_html}


def check_options(fix: str, fail_on: str | None) -> Severity | None:
    """Raises ConfigError for a word that is no option."""
    if fix not in ("none", "safe", "unsafe"):
        raise ConfigError(f"ModelAudit knows no fix={fix!r}", fix='use "none", "safe" or "unsafe"')
    if fail_on not in (None, *Severity):
        raise ConfigError(f"ModelAudit knows no fail_on={fail_on!r}", fix='use "note", "warning", "error" or None')
    return None if fail_on is None else Severity(fail_on)


def check_output(output: str | Path | None) -> Path | None:
    """Raises ConfigError for a file whose ending names no format."""
    if output is None:
        return None
    path = Path(output)
    if path.suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ConfigError(
            f"{path.name!r} names no format of a report", where="output", fix=nearest(path.suffix, _FORMATS) or f"use {known}"
        )
    return path


def loaders_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Loaders:
    """The run's loaders as they are, nothing is set up for it: validation's are known after the sanity check."""
    datamodule = getattr(trainer, "datamodule", None)
    owners = [owner for owner in (pl_module, datamodule) if owner is not None]
    return Loaders(trainer.train_dataloader, trainer.val_dataloaders, owners)


def conclude(trainer: pl.Trainer, report: Report, shown: Report | None, output: Path | None, fail_on: Severity | None) -> None:
    """Show what `shown`, the report so far, does not hold yet; log and write the whole. Raises AuditFailedError."""
    before = shown if shown is not None else Report()
    new = replace(
        report,
        findings=[finding for finding in report.findings if finding not in before.findings],
        notes=[note for note in report.notes if note not in before.notes],
        fixed=[change for change in report.fixed if change not in before.fixed],
    )
    is_new = shown is None or bool(new.findings or new.notes)
    if trainer.is_global_zero and is_new:
        _show(new)
        log_findings(trainer.loggers, report, trainer.global_step)
        if output is not None:
            _write(report, output)
    if is_new:
        numbers = {f"normkit/{name}": number for name, number in report.summary().items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
    if fail_on is not None and new.at_least(fail_on):
        raise _failure(report, fail_on)


def _show(report: Report) -> None:
    """Findings as a table, what could not be done as warnings; nothing twice."""
    warned = [note for note in report.notes if note.kind is not NoteKind.INFORMATION]
    replace(report, notes=[note for note in report.notes if note.kind is NoteKind.INFORMATION]).print()
    for note in warned:
        warnings.warn(f"{report.subject}: {note}", NormkitWarning, stacklevel=2)


def _write(report: Report, path: Path) -> None:
    """Whole or not at all; a file that cannot be written is one warning."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(_FORMATS[path.suffix](report), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True) if path.parent.is_dir() else None
        warnings.warn(f"the report could not be written to {path}: {error}", NormkitWarning, stacklevel=2)


def _failure(report: Report, fail_on: Severity) -> AuditFailedError:
    severe: Sequence[Any] = report.at_least(fail_on)
    return AuditFailedError(
        f"the audit found {len(severe)} at or above {fail_on!s}: {severe[0].code} {severe[0].message}",
        where=", ".join(str(place) for place in severe[0].places[:3]),
        evidence="; ".join(f"{finding.code} {finding.message}" for finding in severe[1:]),
        fix=severe[0].advice,
        silence=severe[0].silence,
    )
