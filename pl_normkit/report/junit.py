"""JUnit XML, which most CI systems show as a list of tests: one suite a report, one test a finding, one that passes where all is well."""

from __future__ import annotations

__all__ = ["to_junit"]

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pl_normkit.findings import Finding

if TYPE_CHECKING:
    from pl_normkit.report import Report

_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(reports: Sequence[Report]) -> str:
    """Findings are failures, notes that say that something failed are errors."""
    root = ElementTree.Element("testsuites", name="pl_normkit")
    for report in reports:
        _add_suite(root, report)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _add_suite(root: ElementTree.Element, report: Report) -> None:
    failures, errors = len(report.findings), len(report.failures)
    counts = {"tests": max(failures + errors, 1), "failures": failures, "errors": errors}
    attributes = {"name": _text(report.subject), **{name: str(count) for name, count in counts.items()}}
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    for finding in report.findings:
        case = ElementTree.SubElement(suite, "testcase", classname=_text(report.subject), name=_text(f"{finding.code} {finding.name}"))
        ElementTree.SubElement(case, "failure", type=finding.severity.value, message=_text(finding.message)).text = _body(finding)
    for note in report.failures:
        case = ElementTree.SubElement(suite, "testcase", classname=_text(report.subject), name="audit")
        ElementTree.SubElement(case, "error", message=_text(note.text.splitlines()[0] if note.text else "")).text = _text(note.text)
    if not failures + errors:
        ElementTree.SubElement(suite, "testcase", classname=_text(report.subject), name="audit")


def _body(finding: Finding) -> str:
    return _text("\n".join([*map(str, finding.places), *map(str, finding.evidence), finding.advice, f"silence: {finding.silence}"]))


def _text(text: str) -> str:
    """XML knows no control characters and no lone surrogates."""
    return _NO_XML.sub("\ufffd", text)
