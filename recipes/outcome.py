"""What the summary of every recipe's fit says: edits, findings, checkpoint, and a page with the pictures."""

from __future__ import annotations

__all__ = ["finish_fit"]

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from pl_normkit.recipes.editing import editing_callbacks
from pl_normkit.recipes.field import finish_field
from pl_normkit.report import Report, merge_reports


def _reports(trainer: L.Trainer) -> list[Report]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [report for callback in callbacks if isinstance(report := getattr(callback, "report", None), Report)]


def print_findings(trainer: L.Trainer, console: Console) -> None:
    """What callbacks edited, and the findings of every callback that keeps a report, one line each."""
    for callback in editing_callbacks(trainer):
        made = len(callback.changes.made)
        console.print(f"edits:      {made} by {type(callback).__name__}", highlight=False)
    reports = _reports(trainer)
    findings = [finding for report in reports for finding in report.findings]
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


def write_page(trainer: L.Trainer, pictures: Mapping[str, Path], path: Path, console: Console) -> None:
    """Write findings, edits and pictures as one self-contained HTML page; nothing where the run had no audit.

    Args:
        trainer: after its fit.
        pictures: title -> PNG file.
        path: the page; its folder exists.
        console: where its place is said.
    """
    reports = _reports(trainer)
    if not reports:
        return
    edits = [f"{type(callback).__name__}: {change}" for callback in editing_callbacks(trainer) for change in callback.changes.made]
    whole = merge_reports(reports[0].subject, reports)
    embedded = {title: picture.read_bytes() for title, picture in pictures.items()}
    path.write_text(replace(whole, fixed=[*edits, *whole.fixed], pictures=embedded).to_html(), encoding="utf-8")
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
    if draw is None:
        return
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    picture = folder / f"{sheet.partition(' ')[0]}.png"
    draw(picture)
    console.print(f"pictures:   {picture}", soft_wrap=True, highlight=False)
    pictures = finish_field(trainer, module, folder / "receptive_field.png", console)
    write_page(trainer, {sheet: picture, **(more or {}), **pictures}, folder / "report.html", console)
