"""What the summary of every recipe's fit says: edits, findings, checkpoint, and a page with the pictures."""

from __future__ import annotations

__all__ = ["finish_fit"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from pl_normkit.findings import Finding, Note, NoteKind
from pl_normkit.recipes.editing import editing_callbacks
from pl_normkit.recipes.field import finish_field
from pl_normkit.recipes.run_result import result_of
from pl_normkit.recipes.writing import log_folder
from pl_normkit.report import Report, merge_reports


def _reports(trainer: L.Trainer) -> list[Report]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [report for callback in callbacks if isinstance(report := getattr(callback, "report", None), Report)]


def _curves(trainer: L.Trainer) -> dict[str, dict[str, float]]:
    """What callbacks measured along the network, as `GradientHealth` does."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    kept = [getattr(callback, "curves", None) for callback in callbacks]
    return {title: curve for curves in kept if isinstance(curves, Mapping) for title, curve in curves.items()}


def _findings(reports: Sequence[Report]) -> list[Finding]:
    """Each once, as the last report that has it saw it."""
    return list({finding.fingerprint: finding for report in reports for finding in report.findings}.values())


def print_findings(trainer: L.Trainer, console: Console) -> None:
    """What callbacks edited, and the findings of every callback that keeps a report, one line each."""
    for callback in editing_callbacks(trainer):
        made = len(callback.changes.made)
        console.print(f"edits:      {made} by {type(callback).__name__}", highlight=False)
    reports = _reports(trainer)
    findings = _findings(reports)
    if not reports:
        console.print("findings:   no audit in this run", highlight=False)
        return
    console.print(f"findings:   {len(findings)}", highlight=False)
    for finding in findings:
        first = f" at {finding.places[0]}" if finding.places else ""
        more = f" and {len(finding.places) - 1} more" if len(finding.places) > 1 else ""
        text = f"  {finding.code} {finding.name} ({finding.severity}): {finding.message}{first}{more}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)


def print_checkpoint(trainer: L.Trainer, console: Console) -> None:
    """The best checkpoint of the run and its score."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint) or not checkpoint.best_model_path:
        console.print("checkpoint: none was written", highlight=False)
        return
    score = "" if checkpoint.best_model_score is None else f" ({checkpoint.monitor} {float(checkpoint.best_model_score):.3f})"
    console.print(f"checkpoint: {checkpoint.best_model_path}{score}", soft_wrap=True, highlight=False)


def write_page(trainer: L.Trainer, module: L.LightningModule, pictures: Mapping[str, Path], path: Path, console: Console) -> None:
    """Write what the run came to, findings, edits and pictures as one self-contained HTML page.

    Args:
        trainer: after its fit.
        module: what was trained.
        pictures: title -> PNG file.
        path: the page; its folder exists.
        console: where its place is said.
    """
    reports = _reports(trainer) or [Report(subject=type(module).__name__, notes=[Note("No audit in this run", NoteKind.NOT_RUN)])]
    edits = [f"{type(callback).__name__}: {change}" for callback in editing_callbacks(trainer) for change in callback.changes.made]
    whole = merge_reports(reports[0].subject, reports)
    embedded = {title: picture.read_bytes() for title, picture in pictures.items()}
    curves = {**whole.curves, **_curves(trainer)}
    whole = replace(whole, findings=_findings(reports), fixed=[*edits, *whole.fixed])
    page = replace(whole, pictures=embedded, curves=curves, run=result_of(trainer))
    path.write_text(page.to_html(), encoding="utf-8")
    console.print(f"report:     {path}", soft_wrap=True, highlight=False)


def finish_fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    draw: Callable[[Path], None] | None,
    console: Console,
    sheet: str = "validation images",
    more: Mapping[str, Path] | None = None,
) -> None:
    """What every fit ends with: findings, the checkpoint, the sheet (named `sheet`) that `draw` writes, the field and the page, which has
    `more` pictures by title.
    """
    print_findings(trainer, console)
    print_checkpoint(trainer, console)
    folder = log_folder(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = dict(more or {})
    if draw is not None:
        picture = folder / f"{sheet.partition(' ')[0]}.png"
        draw(picture)
        console.print(f"pictures:   {picture}", soft_wrap=True, highlight=False)
        pictures[f"{sheet}, state at step {trainer.global_step}"] = picture
        pictures |= finish_field(trainer, module, folder / "receptive_field.png", console)
    write_page(trainer, module, pictures, folder / "report.html", console)
