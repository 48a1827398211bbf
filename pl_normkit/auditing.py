"""Runs the selected rules over a subject and returns a report."""

from __future__ import annotations

__all__ = ["PlannedFix", "apply_fixes", "audit", "audit_subject", "fix_findings", "plan_fixes", "traced"]

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import ConfigError, EditError, TraceError
from pl_normkit.findings import Finding, FixSafety, Note, NoteKind, Place
from pl_normkit.first_step import read_step
from pl_normkit.graph import ModelGraph
from pl_normkit.preserve import preserved
from pl_normkit.report import Report
from pl_normkit.report.landmarks import Landmark
from pl_normkit.rules import Fix, Loaders, Needs, Rule, Subject, load_rules, without_explained
from pl_normkit.selection import Selection
from pl_normkit.surgery import Change, Changes, path_of
from pl_normkit.wrappers import unwrapped


def audit(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    per_module_ignore: Mapping[str, Sequence[str]] | None = None,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    loss: Tensor | None = None,
    loaders: Loaders | tuple[Any, Any] | None = None,
    measure: bool = True,
) -> Report:
    """Judge a model, and whatever else of its training run is given.

    The model, its buffers, mode, gradients and every RNG are the same afterwards, also when a rule fails. A rule that
    fails, and a model that cannot be traced, become notes of the report.

    Args:
        model: any module, on any device; the meta device costs no memory.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for `model`. Without it only rules
            that need no trace run.
        select: codes, prefixes ("NK1") or names of the rules to run instead of the default set; "DEFAULT", "ALL".
        ignore: rules not to run.
        per_module_ignore: module-path pattern -> rules silenced there.
        optimizers: the optimizers of the run.
        loss: the scalar loss of one real step, before backward.
        loaders: the training and the evaluation loader, or a `Loaders` that also names what changes batches later.
        measure: whether rules may run `example_inputs` through the model and draw a few batches to measure the harm.

    Raises:
        ConfigError: for an unknown rule, a pattern that matches no module, or an argument of another kind than the above.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> report = audit(model, torch.zeros(2, 4), optimizers=torch.optim.Adam(model.parameters(), weight_decay=0.1))
    >>> [finding.code for finding in report.findings if finding.severity == "warning"]
    ['NK205']
    """
    _require("model", "a torch.nn.Module", isinstance(model, nn.Module), model)
    several = (optimizers,) if isinstance(optimizers, Optimizer) else optimizers
    are_optimizers = isinstance(several, Sequence) and all(isinstance(optimizer, Optimizer) for optimizer in several)
    _require("optimizers", "an optimizer or a list of them", are_optimizers, optimizers)
    is_scalar = isinstance(loss, Tensor) and loss.numel() == 1
    _require("loss", "the scalar loss of one step, as criterion(model(x), y) gives it", loss is None or is_scalar, loss)
    is_pair = isinstance(loaders, (list, tuple)) and len(loaders) == 2
    _require("loaders", "a pair of loaders or a Loaders", loaders is None or isinstance(loaders, Loaders) or is_pair, loaders)
    subject = Subject(
        model=model,
        example_inputs=example_inputs,
        optimizers=tuple(several),
        loss=loss,
        loaders=Loaders(*loaders) if isinstance(loaders, (list, tuple)) else loaders,
        measure=measure,
    )
    return audit_subject(subject, Selection(select, ignore or (), per_module_ignore or {}))


def _require(argument: str, what: str, holds: bool, given: object) -> None:
    if not holds:
        shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else ""
        kind = f"the class {given.__qualname__}" if isinstance(given, type) else f"a {type(given).__qualname__}{shape}"
        raise ConfigError(f"audit takes {what}", where=f"{argument}=", evidence=kind, fix=f"give {what}")


def audit_subject(subject: Subject, selection: Selection, *, needing: Set[Needs] | None = None) -> Report:
    """Run the selected rules whose needs `subject` meets; traces the model first where a rule needs the graph.

    With `needing` only rules that need one of these parts run: those on optimizers and loss, say, once a run has them.

    Raises ConfigError for an unknown rule or a pattern that matches no module.
    """
    rules = [rule for rule in selection.rules() if needing is None or rule.needs & needing]
    notes: list[Note] = []
    if any(Needs.GRAPH in rule.needs for rule in rules):
        subject = traced(subject)
        notes += _graph_notes(subject, [rule.code for rule in rules if Needs.GRAPH in rule.needs])
    if any(Needs.STEP in rule.needs for rule in rules):
        subject = _with_step(subject, notes)
    findings: list[Finding] = []
    with preserved(subject.model if subject.model is not None else nn.Module(), buffers=True):
        for rule in rules:
            if all(subject.has(need) for need in rule.needs):
                findings += _judge(rule, subject, notes)
    findings = without_explained(findings)
    findings = selection.silence(_from_root(subject, findings), _names(subject))
    findings.sort(key=lambda finding: (-finding.severity.rank, finding.code))
    root = subject.root if subject.root is not None else subject.model
    name = type(root).__name__ if root is not None else "loss"
    return Report(
        findings,
        name,
        notes,
        about=_about(subject),
        landmarks=_landmarks(subject),
        curves={} if subject.step is None else subject.step.curves(),
        numbers={} if subject.step is None else subject.step.numbers(),
    )


def _about(subject: Subject) -> dict[str, str]:
    """What was judged, in words."""
    about = {}
    if subject.model is not None:
        count = sum(parameter.numel() for parameter in subject.model.parameters())
        about["network"] = f"{type(subject.model).__name__}, {count:,} parameters"
    if subject.example_inputs is not None:
        tensors = [leaf for leaf in tree_leaves(subject.example_inputs) if isinstance(leaf, Tensor)]
        about["inputs"] = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
    if subject.optimizers:
        about["optimizers"] = ", ".join(type(optimizer).__name__ for optimizer in subject.optimizers)
    return about


def _landmarks(subject: Subject) -> list[Landmark]:
    if subject.graph is None:
        return []
    graph, prefix = subject.graph, "" if subject.root is None or subject.model is None else path_of(subject.root, subject.model)
    nodes = {
        "residual addition": [add.node for add in graph.residual_adds],
        "norm": [norm.node for norm in graph.norms],
        "dropout": [dropout.node for dropout in graph.dropouts],
        "fusion": [fusion.node for fusion in graph.fusions],
        "attention": [attention.node for attention in graph.attentions],
        "head": [head.pool for head in graph.heads],
    }
    return [Landmark(kind, _join(prefix, node.module), node.source, node.index) for kind, found in nodes.items() for node in found]


def traced(subject: Subject) -> Subject:
    """The subject with its graph, or with the reason why there is none; itself where there is nothing to trace."""
    if subject.graph is not None or subject.trace_failure or subject.model is None or subject.example_inputs is None:
        return subject
    try:
        return replace(subject, graph=ModelGraph.from_model(subject.model, subject.example_inputs, partly=True))
    except TraceError as error:
        return replace(subject, trace_failure=str(error))


def _with_step(subject: Subject, notes: list[Note]) -> Subject:
    """The subject with the facts of the step that its loss is of; itself where they are known, or cannot be had.

    A failure to read them is one of `notes`.
    """
    if subject.step is not None or subject.model is None or subject.loss is None:
        return subject
    try:
        step = read_step(subject.model, subject.example_inputs, subject.loss, run=subject.measure)
        if step is None:
            text = "rules on the step did not run: the loss has no graph, or its backward has run. Give it before backward"
            notes.append(Note(text, NoteKind.NOT_RUN))
        return replace(subject, step=step)
    except Exception as error:
        notes.append(Note(f"the step was not read: {type(error).__name__}: {error}. Please report it with the model"))
        return subject


def _graph_notes(subject: Subject, codes: Sequence[str]) -> list[Note]:
    if subject.graph is not None and subject.graph.unseen:
        return [Note(subject.graph.unseen, NoteKind.NOT_RUN)]
    if subject.graph is not None or subject.model is None:
        return []
    if subject.trace_failure:
        return [Note(f"{subject.trace_failure}\n  so: rules that need the traced model did not run ({', '.join(codes)})")]
    return [Note("rules that need the traced model did not run: there are no example inputs", NoteKind.NOT_RUN)]


def _judge(rule: Rule, subject: Subject, notes: list[Note]) -> list[Finding]:
    """Findings of one rule; one that fails must not take the others, or a training run, down with it."""
    try:
        return list(rule.judge(subject))
    except (Exception, SystemExit) as error:
        text = (
            f"rule {rule.code} ({rule.name}) failed with {type(error).__name__}: {error}; the other rules ran. "
            f'Please report it with the model; ignore=["{rule.code}"] silences this note'
        )
        notes.append(Note(text))
        return []


def _from_root(subject: Subject, findings: list[Finding]) -> list[Finding]:
    """The findings with paths as the user's own module names them."""
    if subject.root is None or subject.model is None or subject.root is subject.model:
        return findings
    prefix = path_of(subject.root, subject.model)

    def move(place: Place) -> Place:
        return replace(place, module=_join(prefix, place.module))

    return [replace(finding, places=tuple(move(place) for place in finding.places)) for finding in findings]


def _names(subject: Subject) -> list[str]:
    root = subject.root if subject.root is not None else subject.model
    if root is None:
        return []
    return [*(name for name, _ in root.named_modules()), *(name for name, _ in root.named_parameters())]


@dataclass(frozen=True)
class PlannedFix:
    """One fix at some places: the rule whose fix it is, and paths in the audited module."""

    code: str
    places: tuple[str, ...]


def plan_fixes(findings: Sequence[Finding], *, allow_unsafe: bool = False) -> list[PlannedFix]:
    """The fix of every rule that fired, each fix once, at the places of the findings and nowhere else."""
    allowed = {FixSafety.SAFE, FixSafety.UNSAFE} if allow_unsafe else {FixSafety.SAFE}
    rules = load_rules()
    found: dict[Fix, tuple[str, dict[str, None]]] = {}
    for finding in findings:
        fix = rules[finding.code].fix
        if fix is not None and finding.fix_safety in allowed:
            _, places = found.setdefault(fix, (finding.code, {}))
            places.update(dict.fromkeys(place.module for place in finding.places))
    return [PlannedFix(code, tuple(places)) for code, places in found.values()]


def fix_findings(
    model: nn.Module,
    example_inputs: Any,
    findings: Sequence[Finding],
    *,
    network: nn.Module | None = None,
    allow_unsafe: bool = False,
) -> Changes:
    """Apply the fix of every rule that fired, each fix once, at the places of the findings and nowhere else.

    Args:
        model: the audited module.
        example_inputs: what it was audited with.
        findings: as from `audit`.
        network: the part of `model` that takes `example_inputs`; paths are those of `model` all the same.
        allow_unsafe: also apply fixes that change what is trained.

    Returns:
        all edits together; their `undo` takes them back in reverse order. A fix that finds nothing it can edit is listed
        in `skipped`.

    Raises:
        Exception: whatever a fix raises beside EditError; the model is as before then.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
    >>> images = torch.zeros(2, 3, 8, 8)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> findings = audit(model, images, select=["NK811"], optimizers=optimizer).findings
    >>> print(fix_findings(model, images, findings, allow_unsafe=True))
    1: group norm of 32 groups in place of batch norm
    """
    return apply_fixes(model, example_inputs, plan_fixes(findings, allow_unsafe=allow_unsafe), network=network)


def apply_fixes(model: nn.Module, example_inputs: Any, fixes: Sequence[PlannedFix], *, network: nn.Module | None = None) -> Changes:
    """What `fix_findings` does, from a plan; see there."""
    rules = load_rules()
    network = unwrapped(model if network is None else network)
    prefix = path_of(model, network)
    changes = Changes()
    try:
        for planned in fixes:
            fix = rules[planned.code].fix
            if fix is not None:
                _apply_fix(fix, network, example_inputs, {path.removeprefix(f"{prefix}.") for path in planned.places}, changes)
    except BaseException:
        changes.undo()
        raise
    changes.made = [replace(change, module=_join(prefix, change.module)) for change in changes.made]
    changes.skipped = [replace(change, module=_join(prefix, change.module)) for change in changes.skipped]
    return changes


def _apply_fix(fix: Fix, model: nn.Module, example_inputs: Any, places: Set[str], changes: Changes) -> None:
    """Where the findings are, and nowhere else: what was silenced stays as it is."""
    try:
        changes.add(fix(model, example_inputs, filter_fn=lambda _, path: path in places))
    except EditError as error:
        changes.skipped.append(Change("", str(error)))


def _join(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)
