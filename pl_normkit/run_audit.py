"""The audit of a training run: what becomes known bit by bit (networks, loss, optimizers, a step's facts) ends in one report."""

from __future__ import annotations

__all__ = ["RunAudit"]

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pl_normkit.auditing import PlannedFix, apply_fixes, audit_subject, plan_fixes, traced
from pl_normkit.errors import NormkitError
from pl_normkit.findings import Finding, Note, NoteKind
from pl_normkit.first_step import StepFacts
from pl_normkit.report import Report
from pl_normkit.report.landmarks import Landmark
from pl_normkit.rules import without_explained
from pl_normkit.selection import Selection
from pl_normkit.subject import Loaders, Needs, Subject
from pl_normkit.surgery import Changes, path_of

_OF_A_NETWORK = {Needs.MODEL, Needs.GRAPH}


class RunAudit:
    """Collects the parts of a run, and judges each once it is there. A failure is a note, never an exception.

        run = RunAudit(module, Selection())
        run.add_network(module.net, images)
        run.judge_loss(loss)                             # before its backward
        run.judge(optimizers=[optimizer])                # after it, before the first step
        run.report.print()

    Args:
        root: the module that paths are relative to.
        selection: the rules.
        measure: whether rules may run the networks and draw batches.

    Attributes:
        parts: further fields of the `Subject` of the whole run, by name; rules that need one of them run in `judge`.
        networks: those that are known, with their inputs.
        changes: what `fix` edited.
    """

    def __init__(self, root: nn.Module, selection: Selection, *, measure: bool = False) -> None:
        self.root = root
        self.selection = selection
        self.measure = measure
        self.parts: dict[str, Any] = {}
        self.networks: dict[nn.Module, Any] = {}
        self.changes = Changes()
        self._run: dict[str, Any] = {}
        self._judged: dict[nn.Module, Subject] = {}
        self._findings: dict[Finding, None] = {}
        self._notes: dict[Note, None] = {}
        self._about: dict[str, str] = {}
        self._landmarks: list[Landmark] = []
        self._curves: dict[str, Mapping[str, float]] = {}
        self._numbers: dict[str, float] = {}

    @property
    def report(self) -> Report:
        """All that was found so far, the most severe first."""
        findings = sorted(without_explained(self._findings), key=lambda finding: (-finding.severity.rank, finding.code))
        fixed = [f"fixed: {change}" for change in self.changes.made]
        name = type(self.root).__name__
        return Report(
            findings,
            name,
            list(self._notes),
            fixed,
            about=dict(self._about),
            landmarks=list(self._landmarks),
            curves=dict(self._curves),
            numbers=dict(self._numbers),
        )

    def note(self, text: str, kind: NoteKind = NoteKind.FAILED) -> None:
        self._notes[Note(text, kind)] = None

    def note_failure(self, what: str, error: Exception) -> None:
        """A failure of ours, which costs the run nothing but what it would have told."""
        self.note(f"{what}: {type(error).__name__}: {error}; training goes on. Please report it with the model")

    def add_network(self, network: nn.Module, inputs: Any) -> None:
        """A network of the run and what it is called with, unless it is known already."""
        self.networks.setdefault(network, inputs)

    def fix(self, network: nn.Module, inputs: Any, *, allow_unsafe: bool) -> list[PlannedFix]:
        """Let the fixes of what is found in `network` act on it; those that changed something, with paths of the root."""
        report = self._audit(self._subject(network, inputs), _OF_A_NETWORK)
        planned = plan_fixes(report.findings, allow_unsafe=allow_unsafe)
        if not planned:
            return []
        try:
            changes = apply_fixes(self.root, inputs, planned, network=network)
        except Exception as error:
            self.note(f"a fix failed with {type(error).__name__}: {error}; the model is as it was. Please report it with the model")
            return []
        self.changes.add(changes)
        for skipped in changes.skipped:
            self.note(f"not fixed: {skipped}", NoteKind.INFORMATION)
        return planned if changes else []

    def judge_loss(self, loss: Any, call: Any = None) -> None:
        """A loss before its backward; `call` is what rules may call again with other arguments, as for `Subject.loss_call`."""
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            self._take(self._audit(Subject(root=self.root, loss=loss, loss_call=call, measure=False), {Needs.LOSS}))

    def judge(self, *, optimizers: Sequence[Optimizer], loaders: Loaders | None = None) -> None:
        """Judge every network and the run itself, with its optimizers, loaders and `parts`."""
        self._run = {"optimizers": tuple(optimizers), "loaders": loaders}
        self.judge_networks()
        of_run = {Needs.OPTIMIZERS, Needs.LOADERS}
        self._take(self._audit(Subject(root=self.root, measure=self.measure, **self._run), of_run))
        self.judge_parts()

    def judge_networks(self) -> None:
        """Judge the networks that came after `judge`, as that did the others."""
        for network, inputs in self.networks.items():
            if network not in self._judged and not self._is_read_within_another(network):
                subject = traced(replace(self._subject(network, inputs), **self._run))
                self._judged[network] = subject
                report = self._audit(subject, _OF_A_NETWORK)
                self._take(report)
                self._describe(report, path_of(self.root, network))
                if self.measure:  # rules on a step that run the network themselves; the step's own facts are judged with the parts
                    found = self._audit(replace(subject, step=StepFacts()), {Needs.STEP})
                    self._take(replace(found, numbers={}, curves={}))

    def has_read(self, network: nn.Module) -> bool:
        """Whether it was judged, alone or within a network that calls it."""
        return network in self._judged or self._is_read_within_another(network)

    def _is_read_within_another(self, network: nn.Module) -> bool:
        """Whether a network that was judged contains this one and calls it."""
        for judged, subject in self._judged.items():
            path = path_of(judged, network)
            if path and subject.graph is not None and any(_is_within(node.module, path) for node in subject.graph.nodes):
                return True
        return False

    def judge_parts(self) -> None:
        """Judge what stands in `parts`, again where it has changed; a finding is kept once."""
        if self.parts:
            subject = Subject(model=self.root, root=self.root, measure=False, **{**self._run, **self.parts})
            self._take(self._audit(subject, {Needs(name) for name in self.parts}))

    def is_fixable(self, *, allow_unsafe: bool) -> bool:
        """Whether a finding of the report has a fix that would be allowed."""
        return bool(plan_fixes(list(self._findings), allow_unsafe=allow_unsafe))

    def _subject(self, network: nn.Module, inputs: Any) -> Subject:
        return Subject(model=network, root=self.root, example_inputs=inputs, measure=self.measure)

    def _take(self, report: Report) -> None:
        self._findings.update({finding: None for finding in report.findings if not self._is_told(finding)})
        self._notes.update(dict.fromkeys(report.notes))
        self._curves.update(report.curves)
        self._numbers.update(report.numbers)

    def _describe(self, report: Report, path: str) -> None:
        """What was read, on what inputs; the path tells a second network from the first."""
        self._about.update({f"{what} {path}".strip() if what in self._about else what: text for what, text in report.about.items()})
        self._landmarks += report.landmarks

    def _is_told(self, finding: Finding) -> bool:
        """Whether the same cause was found at these places before, in a network that contains this one."""
        places = {place.module for place in finding.places}
        alike = [told for told in self._findings if (told.code, told.cause, told.message) == (finding.code, finding.cause, finding.message)]
        return any(places <= {place.module for place in told.places} for told in alike)

    def _audit(self, subject: Subject, needing: Set[Needs]) -> Report:
        try:
            return audit_subject(subject, self.selection, needing=needing)
        except NormkitError:
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            return Report(notes=[Note(f"the audit failed with {failure}; training goes on. Please report it with the model")])


def _is_within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")
