"""SARIF 2.1.0, the interchange format of static analysis (OASIS standard)."""

from __future__ import annotations

__all__ = ["to_sarif"]

import json
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pl_normkit import __version__
from pl_normkit.findings import Finding, NoteKind, Place
from pl_normkit.rules import load_rules

if TYPE_CHECKING:
    from pl_normkit.report import Report

_LEVELS = {NoteKind.FAILED: "error", NoteKind.NOT_RUN: "warning", NoteKind.INFORMATION: "note"}

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def to_sarif(report: Report) -> str:
    codes = sorted({finding.code for finding in report.findings})
    driver = {
        "name": "pl_normkit",
        "semanticVersion": __version__,
        "rules": [_rule(code) for code in codes],
    }
    run = {
        "tool": {"driver": driver},
        "results": [_result(finding, codes.index(finding.code)) for finding in report.findings],
        "invocations": [
            {
                "executionSuccessful": not report.failures,
                "toolExecutionNotifications": [{"level": _LEVELS[note.kind], "message": {"text": note.text}} for note in report.notes],
            }
        ],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(code: str) -> dict[str, Any]:
    known = load_rules()[code]
    return {
        "id": code,
        "name": known.name,
        "shortDescription": {"text": known.summary},
        "fullDescription": {"text": known.sections().get("Why it hurts") or known.summary},
        "help": {"text": known.doc},
        "defaultConfiguration": {"level": known.severity.value},
        "properties": {"mark": known.mark.value, "source": known.source},
    }


def _result(finding: Finding, index: int) -> dict[str, Any]:
    evidence = "".join(f" {item}." for item in finding.evidence)
    libraries = [_physical(place.library) for place in finding.places if _physical(place.library)]
    witness = f" Witness: {finding.witness}." if finding.witness is not None else ""
    return {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": finding.severity.value,
        "message": {"text": f"{finding.message}.{evidence}{witness} {finding.advice}"},
        "locations": [_location(place) for place in finding.places],
        **({"relatedLocations": [{"physicalLocation": location} for location in libraries]} if libraries else {}),
        "partialFingerprints": {"normkit/v1": finding.fingerprint},
        "properties": {"fixSafety": finding.fix_safety.value},
    }


def _location(place: Place) -> dict[str, Any]:
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": place.module or "(the model)", "kind": "module"}]}
    physical = _physical(place.source)
    return {**location, "physicalLocation": physical} if physical else location


def _physical(source: str) -> dict[str, Any]:
    file, _, line = source.rpartition(":")
    if not file or not line.isdigit():
        return {}
    return {"artifactLocation": {"uri": _uri(file)}, "region": {"startLine": int(line)}}


def _uri(file: str) -> str:
    return PurePath(file).as_uri() if PurePath(file).is_absolute() else quote(PurePath(file).as_posix())
