"""The machine-readable form of a report."""

from __future__ import annotations

__all__ = ["to_json"]

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pl_normkit.findings import Finding

if TYPE_CHECKING:
    from pl_normkit.report import Report


def to_json(report: Report) -> str:
    document = {
        "version": 2,
        "subject": report.subject,
        "findings": [_finding(finding) for finding in report.findings],
        "notes": [asdict(note) for note in report.notes],
        "fixed": list(report.fixed),
    }
    return json.dumps(document, indent=2, allow_nan=False)


def _finding(finding: Finding) -> dict[str, Any]:
    fields = asdict(finding)
    for evidence in fields["evidence"]:
        if not math.isfinite(evidence["value"]):
            evidence["value"] = str(evidence["value"])
    return {**fields, "fingerprint": finding.fingerprint, "silence": finding.silence}
