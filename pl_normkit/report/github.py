"""Annotations for GitHub Actions (workflow commands on standard output)."""

from __future__ import annotations

__all__ = ["to_github"]

from typing import TYPE_CHECKING

from pl_normkit.findings import Finding, Place, Severity

if TYPE_CHECKING:
    from pl_normkit.report import Report

_COMMANDS = {Severity.NOTE: "notice", Severity.WARNING: "warning", Severity.ERROR: "error"}


def to_github(report: Report) -> str:
    return "\n".join(_annotation(finding, place) for finding in report.findings for place in finding.places or (Place(""),))


def _annotation(finding: Finding, place: Place) -> str:
    file, _, line = place.source.rpartition(":")
    position = f"file={_property(file)},line={line}," if file and line.isdigit() else ""
    title = _property(f"{finding.code} {finding.name}")
    witness = f" Witness: {finding.witness}." if finding.witness is not None else ""
    text = _data(f"{place.module or '(the model)'}: {finding.message}.{witness} {finding.advice}")
    return f"::{_COMMANDS[finding.severity]} {position}title={title}::{text}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
