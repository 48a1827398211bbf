"""One output of the reports of several models."""

from __future__ import annotations

__all__ = ["in_form", "join_reports"]

import json
from collections.abc import Sequence
from dataclasses import replace

from pl_normkit.findings import Finding, Place
from pl_normkit.report import Report, merge_reports
from pl_normkit.report.json_format import VERSION
from pl_normkit.report.junit import to_junit

_SINGLE = {"sarif": Report.to_sarif, "github": Report.to_github, "html": Report.to_html, "json": Report.to_json}


def in_form(reports: Sequence[Report], form: str) -> str:
    """The reports as one text; `form` is json, sarif, github, html or junit."""
    if form == "junit":
        return to_junit(reports)
    if len(reports) == 1:
        return _SINGLE[form](reports[0])
    if form == "json":
        return json.dumps({"version": VERSION, "reports": [json.loads(report.to_json()) for report in reports]}, indent=2)
    return _SINGLE[form](join_reports(reports))


def join_reports(reports: Sequence[Report]) -> Report:
    """One report in which every module's path starts with its model's name, so that no two models share a fingerprint."""
    return merge_reports(f"{len(reports)} models", [_named(report) for report in reports])


def _named(report: Report) -> Report:
    def name(text: str) -> str:
        return f"{report.subject}: {text}" if text else report.subject

    def rename(finding: Finding) -> Finding:
        places = tuple(replace(place, module=name(place.module)) for place in finding.places or (Place(""),))
        return replace(finding, places=places)

    return replace(
        report,
        findings=[rename(finding) for finding in report.findings],
        notes=[replace(note, text=name(note.text)) for note in report.notes],
        fixed=[name(change) for change in report.fixed],
        about={name(what): text for what, text in report.about.items()},
        landmarks=[replace(landmark, module=name(landmark.module)) for landmark in report.landmarks],
    )
