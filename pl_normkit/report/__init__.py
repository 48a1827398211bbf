"""How the result of an audit is shown: terminal, JSON, SARIF, GitHub annotations, HTML."""

from __future__ import annotations

__all__ = ["Report", "merge_reports"]

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pl_normkit.findings import Finding, Note, NoteKind, Severity
from pl_normkit.report.landmarks import Landmark, RunResult

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Report:
    """What an audit found.

    Attributes:
        findings: most severe first, then by code.
        subject: what was audited, such as "ResNet".
        notes: what failed (a model that cannot be traced, a rule), what did not run and why, and what else is to be known.
        fixed: what was edited before the findings were taken.
        pictures: title -> PNG file as bytes, for the HTML page.
        about: what was audited on what: "inputs" -> "(2, 3, 224, 224) torch.float32".
        landmarks: norms, dropouts, fusions, heads and the like in the order in which they run, for the map of the page.
        curves: title -> (module path -> number) in depth order, such as a measured ratio at every norm.
        run: what the training run came to, for the page.
        numbers: what else was counted or measured, by name: "unused_parameters", "dead_share".
    """

    findings: Sequence[Finding] = field(default_factory=list)
    subject: str = "model"
    notes: Sequence[Note] = field(default_factory=list)
    fixed: Sequence[str] = field(default_factory=list)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    landmarks: Sequence[Landmark] = field(default_factory=list)
    curves: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    run: RunResult | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def counts(self) -> dict[Severity, int]:
        """Number of findings by severity, zeros included."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in Severity}

    def at_least(self, severity: Severity | str) -> list[Finding]:
        """Findings of this severity or a higher one."""
        limit = Severity(severity).rank
        return [finding for finding in self.findings if finding.severity.rank >= limit]

    def summary(self) -> dict[str, float]:
        """Plain numbers for a logger: findings by severity and by rule, then `numbers`.

        >>> Report(numbers={"unused_parameters": 2.0}).summary()
        {'notes': 0.0, 'warnings': 0.0, 'errors': 0.0, 'unused_parameters': 2.0}
        """
        by_severity = {f"{severity.value}s": float(count) for severity, count in self.counts().items()}
        by_rule = Counter(finding.code for finding in self.findings)
        return {**by_severity, **{code: float(by_rule[code]) for code in sorted(by_rule)}, **self.numbers}

    @property
    def failures(self) -> list[Note]:
        """The notes that say that something failed."""
        return [note for note in self.notes if note.kind is NoteKind.FAILED]

    def to_json(self) -> str:
        """A JSON object; its keys are names of attributes, with `version` first."""
        from pl_normkit.report.json_format import to_json

        return to_json(self)

    def to_sarif(self) -> str:
        """A SARIF 2.1.0 log as JSON text, with the documentation of every rule that fired."""
        from pl_normkit.report.sarif import to_sarif

        return to_sarif(self)

    def to_github(self) -> str:
        """Workflow commands, one line a place, that GitHub shows beside the source."""
        from pl_normkit.report.github import to_github

        return to_github(self)

    def to_html(self, probes: Mapping[str, Any] | None = None) -> str:
        """A self-contained page: summary, findings to fold out and filter, map of the network, curves, edits, pictures.

        Args:
            probes: title -> what a probe measured, drawn below the map along the same depth: what `measure_variance_shift`,
                `measure_fusion_scales`, `measure_time_awareness`, `measure_gamma_norms` or `HealthMeter.after_step` gave, or any module
                paths with numbers.

        Raises ConfigError for a result that holds no numbers by module.

        >>> "Shift at the norms" in Report().to_html(probes={"Shift at the norms": {"layer1.bn": 0.8, "layer2.bn": 1.1}})
        True
        """
        from pl_normkit.report.html import to_html

        return to_html(self.with_probes(probes or {}))

    def with_probes(self, probes: Mapping[str, Any]) -> Report:
        """The same report with more curves; see `to_html`."""
        from pl_normkit.report.probe_curves import curves_of_probes

        return replace(self, curves={**self.curves, **curves_of_probes(probes)})

    def _repr_html_(self) -> str:
        """How a notebook shows the report."""
        from pl_normkit.report.html import in_frame

        return in_frame(self.to_html())

    def print(self, console: Console | None = None) -> None:
        """Show the report on a terminal (`rich`)."""
        from pl_normkit.report.terminal import print_report

        print_report(self, console)


def merge_reports(subject: str, reports: Sequence[Report]) -> Report:
    """One report of several audits of parts of `subject`."""
    return Report(
        [finding for report in reports for finding in report.findings],
        subject,
        [note for report in reports for note in report.notes],
        [change for report in reports for change in report.fixed],
        {title: picture for report in reports for title, picture in report.pictures.items()},
        {what: text for report in reports for what, text in report.about.items()},
        [landmark for report in reports for landmark in report.landmarks],
        {title: curve for report in reports for title, curve in report.curves.items()},
        next((report.run for report in reports if report.run is not None), None),
        {name: number for report in reports for name, number in report.numbers.items()},
    )
