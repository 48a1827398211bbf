"""What the summary of every recipe's fit says: findings and checkpoint."""

from __future__ import annotations

__all__ = ["print_checkpoint", "print_findings"]

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console


def print_findings(trainer: L.Trainer, console: Console) -> None:
    """The findings of every callback that keeps a report, one line each."""
    reports = [report for callback in trainer.callbacks if (report := getattr(callback, "report", None)) is not None]  # type: ignore[attr-defined]
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
