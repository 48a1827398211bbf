"""`pl-normkit lint`: from its options to a subject, its report and the exit code."""

from __future__ import annotations

__all__ = ["lint", "report_of"]

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pl_normkit.auditing import audit_subject
from pl_normkit.commands import LintPart, Measure, load_lint_parts, load_lint_probes
from pl_normkit.errors import ConfigError, NormkitError, NormkitWarning, nearest
from pl_normkit.findings import Note, NoteKind, read_baseline, subtract_baseline, write_baseline
from pl_normkit.graph import ModelGraph
from pl_normkit.importing import users_code
from pl_normkit.inputs import parse_inputs
from pl_normkit.listed_models import lint_listed
from pl_normkit.output import CalmStream, calm, say, screen
from pl_normkit.preserve import preserved
from pl_normkit.report import Report
from pl_normkit.report.several import in_form
from pl_normkit.selection import Selection
from pl_normkit.specs import build_model
from pl_normkit.subject import Subject


def lint(options: argparse.Namespace, parse: Callable[[Sequence[str]], argparse.Namespace]) -> int:
    """0 where all is clean, 1 for findings that count, 2 where something failed. Raises NormkitError for bad input.

    Args:
        options: of the command line; where they name neither a model nor a loss, the models of pyproject.toml are audited.
        parse: from words to options.
    """
    try:
        if options.model is None and not _parts_given(options):
            reports = lint_listed(options, parse, report_of)
        else:
            reports = [_lint_one(options)]
        _show(reports, options.format, options.output)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(
            "the file cannot be written",
            where=str(error.filename or ""),
            evidence=error.strerror or str(error),
            fix="name a file in a folder that exists",
        ) from error
    for report in reports:
        name = f"{report.subject}: " if len(reports) > 1 else ""
        for note in report.notes:
            say(f"{'error' if note in report.failures else 'note'}: {name}{note}")
    if any(report.failures for report in reports):
        return 2
    return int(options.fail_on != "never" and any(report.at_least(options.fail_on) for report in reports))


def report_of(options: argparse.Namespace) -> Report:
    """What the options of one subject say, baselines apart. Raises NormkitError for bad input."""
    selection = Selection.from_pyproject().override(options.select, options.ignore, _patterns(options.per_module_ignore))
    probes = _probes(options)
    with _foreign_words_apart():
        subject = _subject(options)
        found = audit_subject(subject, selection)
        if subject.model is not None:
            found = _measured(found, subject.model, subject.example_inputs, probes)
    return replace(found, subject=options.model or found.subject)


def _probes(options: argparse.Namespace) -> dict[str, tuple[str, Measure]]:
    """Those that --probe names. Raises ConfigError for others, and where there are no weights to measure."""
    known = load_lint_probes()
    names = list(known) if options.probe == ["ALL"] else options.probe or []
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"there is no probe {unknown[0]!r}", fix=nearest(unknown[0], known) or f"probes: {', '.join(known)}, ALL")
    if names and (options.model is None or not options.real):
        raise ConfigError("probes measure a model with its weights", where="--probe", fix="name a model, and give --real")
    return {name: known[name] for name in names}


def _measured(report: Report, model: nn.Module, inputs: Any, probes: Mapping[str, tuple[str, Measure]]) -> Report:
    """With the curves of the probes; one that cannot measure this model is a note."""
    for name, (title, measure) in probes.items():
        try:
            with preserved(model, buffers=True):
                report = report.with_probes({title: measure(model, inputs)})
        except Exception as error:
            what = error.what if isinstance(error, NormkitError) else f"{type(error).__name__}: {error}"
            report = replace(report, notes=[*report.notes, Note(f"the probe {name} measured nothing: {what}", NoteKind.NOT_RUN)])
    return report


def _lint_one(options: argparse.Namespace) -> Report:
    accepted = read_baseline(options.baseline) if options.baseline else frozenset()
    found = report_of(options)
    if options.write_baseline:
        write_baseline(options.write_baseline, found.findings)
    return replace(found, findings=subtract_baseline(found.findings, accepted))


@contextlib.contextmanager
def _foreign_words_apart() -> Iterator[None]:
    """What the linted code prints goes to standard error, where it cannot spoil a report; of the warnings only ours are shown."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(CalmStream(sys.stderr)):
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", NormkitWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        yield


def _subject(options: argparse.Namespace) -> Subject:
    parts = _parts_given(options)
    if options.model is None:
        return Subject(**_filled(parts, options, None), measure=options.real)
    device = "cpu" if options.real else "meta"
    model = build_model(options.model, device=device)
    inputs = parse_inputs(options.input, model, spec=options.model, device=device)
    graph = ModelGraph.from_model(model, inputs) if options.debug else None  # a model that cannot be traced then shows its traceback
    return Subject(model=model, example_inputs=inputs, graph=graph, measure=options.real, **_filled(parts, options, model))


def _filled(parts: Sequence[LintPart], options: argparse.Namespace, model: nn.Module | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part in parts:
        flag, name = next(iter(part.destinations.items()))
        with users_code(f"{flag} {getattr(options, name)} cannot be used", fix="check what it names", kind=ConfigError):
            fields |= part.fill(options, model)
    return fields


def _parts_given(options: argparse.Namespace) -> list[LintPart]:
    return [part for part in load_lint_parts() if _is_given(part, options)]


def _is_given(part: LintPart, options: argparse.Namespace) -> bool:
    """Whether its first option is there. Raises ConfigError when only others are, which would do nothing."""
    first = next(iter(part.arguments))
    given = [option for option, name in part.destinations.items() if getattr(options, name) is not None]
    if given and first not in given:
        raise ConfigError(f"{given[0]} does nothing without {first}", fix=f"give {first} too")
    return bool(given)


def _patterns(texts: Sequence[str]) -> dict[str, list[str]]:
    patterns = {}
    for text in texts:
        pattern, colon, words = text.rpartition(":")
        rules = [word.strip() for word in words.split(",") if word.strip()]
        if not colon or not rules:
            raise ConfigError(f"--per-module-ignore {text!r} names no rules", fix="write PATTERN:RULES, such as 'encoder.*:NK101'")
        patterns[pattern] = rules
    return patterns


def _show(reports: Sequence[Report], form: str, output: Path | None) -> None:
    shown = [report for report in reports if report.findings or not report.failures]
    if form == "text" and not shown:
        return
    with contextlib.ExitStack() as stack:
        stream: Any = sys.stdout
        if output:
            stream = stack.enter_context(output.open("w", encoding="utf-8", errors="backslashreplace"))
        if form == "text":
            console = screen(stream, None if stream.isatty() else 120)
            for report in shown:
                replace(report, notes=()).print(console)  # its notes go to standard error
        else:
            text = in_form(reports, form)
            stream.write((text if form == "github" else calm(text)) + "\n")
