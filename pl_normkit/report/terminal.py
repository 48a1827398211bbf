"""The form people read."""

from __future__ import annotations

__all__ = ["print_report"]

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pl_normkit.findings import Finding, FixSafety, Severity

if TYPE_CHECKING:
    from pl_normkit.report import Report

_STYLES = {Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}
_PLACES_SHOWN = 5
_FRAME = len("| warning |  |  |")


def print_report(report: Report, console: Console | None = None) -> None:
    console = console or Console()
    finding_width, places_width = _widest_words(report)
    if report.findings and finding_width + places_width + _FRAME > console.width:  # a path or call in a cell could not be copied
        _print_lines(report, console)
    elif report.findings:
        table = Table(title=f"pl_normkit: {escape(report.subject)}", title_justify="left", show_lines=True, expand=False)
        table.add_column("rule", no_wrap=True)
        table.add_column("finding", overflow="fold", max_width=console.width - _FRAME - places_width)
        table.add_column("places", overflow="fold", min_width=places_width, max_width=max(places_width, console.width // 2))
        for finding in report.findings:
            table.add_row(_head(finding), _body(finding), _places(finding))
        console.print(table)
        console.print(_summary(report))
    else:
        console.print(f"pl_normkit: {escape(report.subject)}: nothing to report")
    for change in report.fixed:
        console.print(f"[green]{escape(change)}[/green]")
    for note in report.notes:
        console.print(f"[dim]{note.kind}: {escape(note.text)}[/dim]")


def _widest_words(report: Report) -> tuple[int, int]:
    """Characters of the longest word among what is said of the findings, and among their places."""
    body, places = (
        max((len(word) for text in map(part, report.findings) for word in text.split()), default=0) for part in (_body, _places)
    )
    return body, places


def _print_lines(report: Report, console: Console) -> None:
    """For a narrow terminal: one thing a line, which the terminal itself may wrap."""
    console.print(f"pl_normkit: {escape(report.subject)}", style="italic", soft_wrap=True)
    for finding in report.findings:
        style = _STYLES[finding.severity]
        console.print(f"\n[{style}]{finding.code} {finding.severity.value}[/{style}]", soft_wrap=True)
        for line in [*_body(finding).splitlines(), *_places(finding).splitlines()]:
            console.print(f"  {line}", soft_wrap=True)
    console.print()
    console.print(_summary(report), soft_wrap=True)


def _head(finding: Finding) -> str:
    style = _STYLES[finding.severity]
    return f"[{style}]{finding.code}\n{finding.severity.value}[/{style}]"


def _body(finding: Finding) -> str:
    count = f" ({len(finding.places)} places)" if len(finding.places) > 1 else ""
    lines = [f"{escape(finding.message)}{count}."]
    origin = {True: "[green]measured[/green]", False: "[green]computed[/green]"}
    lines += [f"{origin[item.is_measured]} {escape(str(item))}" for item in finding.evidence]
    if finding.witness is not None:
        lines.append(f"[green]witness[/green] {escape(' and '.join(finding.witness.changed) or 'the example itself')}")
        if finding.witness.script:
            lines.append(f"[green]reproduce[/green] python {escape(finding.witness.script)}")
    lines.append(f"[bold]do[/bold] {escape(finding.advice)}")
    if finding.fix_safety is not FixSafety.DISPLAY:
        lines.append(f"[bold]fix[/bold] available ({finding.fix_safety.value})")
    lines.append(f"[dim]{finding.name}; silence: {escape(finding.silence)}[/dim]")
    return "\n".join(lines)


def _places(finding: Finding) -> str:
    shown = [escape(str(place)) for place in finding.places[:_PLACES_SHOWN]]
    hidden = len(finding.places) - len(shown)
    return "\n".join([*shown, *([f"... and {hidden} more"] if hidden > 0 else [])])


def _summary(report: Report) -> str:
    counts = ", ".join(f"{count} {severity.value}{'s' if count != 1 else ''}" for severity, count in report.counts().items() if count)
    return f"{counts}. `pl-normkit explain {report.findings[0].code}` says why."
