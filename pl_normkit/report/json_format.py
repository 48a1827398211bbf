"""The machine-readable form of a report, and the way back."""

from __future__ import annotations

__all__ = ["from_json", "to_json"]

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pl_normkit.errors import DataError
from pl_normkit.findings import Evidence, Finding, FixSafety, Note, NoteKind, Place, Severity, Witness
from pl_normkit.report.landmarks import Landmark

if TYPE_CHECKING:
    from pl_normkit.report import Report

VERSION = 2


def to_json(report: Report) -> str:
    document = {
        "version": VERSION,
        "subject": report.subject,
        "findings": [_finding(finding) for finding in report.findings],
        "notes": [asdict(note) for note in report.notes],
        "fixed": list(report.fixed),
        "about": dict(report.about),
        "landmarks": [asdict(landmark) for landmark in report.landmarks],
        "curves": {title: _finite(curve) for title, curve in report.curves.items()},
        "numbers": _finite(report.numbers),
    }
    return json.dumps(document, indent=2, allow_nan=False)


def from_json(text: str) -> Report:
    """The report that `to_json` wrote; pictures and results of runs are not in it. Raises DataError."""
    from pl_normkit.report import Report

    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']}, not {VERSION}")
        return Report(
            [_read_finding(fields) for fields in document["findings"]],
            document["subject"],
            [Note(note["text"], NoteKind(note["kind"])) for note in document["notes"]],
            document["fixed"],
            about=document["about"],
            landmarks=[Landmark(**fields) for fields in document["landmarks"]],
            curves={title: _floats(curve) for title, curve in document.get("curves", {}).items()},
            numbers=_floats(document.get("numbers", {})),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("this is no report in JSON", evidence=f"{type(error).__name__}: {error}") from error


def _finite(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """JSON knows no NaN and no infinity: they are words there."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


def _floats(numbers: Mapping[str, float | str]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items()}


def _finding(finding: Finding) -> dict[str, Any]:
    plain = asdict(replace(finding, witness=None))  # its arguments stay out: tensors, and perhaps many
    fields = {name: value for name, value in plain.items() if name in _FIELDS}
    if finding.witness is not None:
        fields["witness"] = {name: getattr(finding.witness, name) for name in ("changed", "outcome", "script")}
    for evidence in fields["evidence"]:
        if not math.isfinite(evidence["value"]):
            evidence["value"] = str(evidence["value"])
    return {**fields, "fingerprint": finding.fingerprint, "silence": finding.silence}


_FIELDS = ("code", "name", "severity", "message", "places", "evidence", "advice", "fix_safety", "cause")


def _read_finding(fields: dict[str, Any]) -> Finding:
    return Finding(
        code=fields["code"],
        name=fields["name"],
        severity=Severity(fields["severity"]),
        message=fields["message"],
        places=tuple(Place(**place) for place in fields["places"]),
        evidence=tuple(Evidence(**{**evidence, "value": float(evidence["value"])}) for evidence in fields["evidence"]),
        advice=fields["advice"],
        fix_safety=FixSafety(fields["fix_safety"]),
        cause=fields["cause"],
        witness=_read_witness(fields.get("witness")),
    )


def _read_witness(fields: dict[str, Any] | None) -> Witness | None:
    return None if fields is None else Witness(None, tuple(fields["changed"]), fields["outcome"], fields["script"])
