"""The page people open: one file without network, from the templates beside this module (Jinja2 escapes every text)."""

from __future__ import annotations

__all__ = ["in_frame", "to_html"]

import base64
import html
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pl_normkit
from pl_normkit.findings import Finding, FixSafety, Place
from pl_normkit.report.charts import bars, depth_chart, line_chart, network_map
from pl_normkit.report.source_lines import SourceLine, lines_around
from pl_normkit.rules import Rule, load_rules

if TYPE_CHECKING:
    from pl_normkit.report import Report

_SOURCES_SHOWN = 3


def to_html(report: Report) -> str:
    import jinja2
    from markupsafe import Markup

    loader = jinja2.PackageLoader("pl_normkit.report")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters["svg"] = Markup
    return page.get_template("page.html").render(
        report=report,
        style=Markup(_file(loader, page, "style.css")),
        script=Markup(_file(loader, page, "script.js")),
        counts={severity.value: count for severity, count in reversed(report.counts().items())},
        findings=[_card(finding, number) for number, finding in enumerate(report.findings)],
        families=sorted({finding.code[:3] for finding in report.findings}),
        notes=_notes_by_kind(report),
        network=network_map(report.landmarks, _codes_by_module(report)),
        map_curves=_charts_below_map(report),
        curves={title: line_chart(list(enumerate(curve.values())), list(curve)) for title, curve in _other_curves(report).items()},
        run_curves={name: line_chart(points) for name, points in report.run.curves.items()} if report.run else {},
        pictures={title: base64.b64encode(png).decode() for title, png in report.pictures.items()},
    )


def _charts_below_map(report: Report) -> dict[str, str]:
    charts = {title: depth_chart(curve, report.landmarks) for title, curve in report.curves.items()}
    return {title: chart for title, chart in charts.items() if chart}


def _other_curves(report: Report) -> Mapping[str, Mapping[str, float]]:
    """Those that do not lie along the landmarks."""
    return {title: curve for title, curve in report.curves.items() if not depth_chart(curve, report.landmarks)}


def _file(loader: Any, environment: Any, name: str) -> str:
    return str(loader.get_source(environment, name)[0])


def _notes_by_kind(report: Report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for note in report.notes:
        found[note.kind.value].append(note.text)
    return found


def _codes_by_module(report: Report) -> Mapping[str, set[str]]:
    """Findings at a parameter count for the module that holds it; those of the whole model mark nothing."""
    codes: dict[str, set[str]] = defaultdict(set)
    for finding in report.findings:
        for place in finding.places:
            for module in {place.module, re.sub(r"\.(weight|bias)$", "", place.module)} - {""}:
                codes[module].add(finding.code)
    return codes


def _card(finding: Finding, number: int) -> dict[str, Any]:
    rule = load_rules().get(finding.code)
    return {
        "finding": finding,
        "id": f"finding-{number}",
        "family": finding.code[:3],
        "modules": " ".join(place.module for place in finding.places).lower(),
        "places": _with_lines(finding.places),
        "chart": bars(finding.evidence),
        "fix": _fix_call(finding, rule),
        "why": {title: _blocks(text) for title, text in rule.sections().items()} if rule is not None else {},
        "mark": f"{rule.mark.value}: {rule.source}" if rule is not None else "",
    }


def _with_lines(places: Sequence[Place]) -> list[tuple[Place, list[SourceLine]]]:
    """The lines around the first few sources, each once: blocks of one class share theirs."""
    shown = list(dict.fromkeys(place.source for place in places if place.source))[:_SOURCES_SHOWN]
    firsts = {source: next(index for index, place in enumerate(places) if place.source == source) for source in shown}
    return [(place, lines_around(place.source) if firsts.get(place.source) == index else []) for index, place in enumerate(places)]


def _fix_call(finding: Finding, rule: Rule | None) -> str:
    """The exact call that fixes the finding, "" where there is advice only."""
    if rule is None or rule.fix is None or finding.fix_safety is FixSafety.DISPLAY:
        return ""
    name = getattr(rule.fix, "__name__", "")
    home = "pl_normkit" if name in dir(pl_normkit) else rule.fix.__module__
    return f"from {home} import {name}\n\nchanges = {name}(model, example_inputs)  # changes.undo() takes it back"


def _blocks(text: str) -> list[tuple[str, str]]:
    """Paragraphs, list items and code blocks of a rule's page."""
    found = []
    for part in re.split(r"(```.*?```)", text, flags=re.DOTALL):
        if part.startswith("```"):
            found.append(("code", part.strip("`").partition("\n")[2].rstrip()))
        else:
            found += [("item" if line.startswith("- ") else "text", line.removeprefix("- ")) for line in part.split("\n") if line.strip()]
    return found


def in_frame(page: str) -> str:
    """A whole page as a part of another one, such as a notebook."""
    return f'<iframe srcdoc="{html.escape(page)}" style="width:100%;height:640px;border:1px solid #8884"></iframe>'
