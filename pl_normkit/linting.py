"""`pl-normkit lint`: from its options to a subject, its report and the exit code."""

from __future__ import annotations

__all__ = ["lint"]

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pl_normkit.auditing import audit_subject
from pl_normkit.commands import LintPart, load_lint_parts
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.findings import read_baseline, subtract_baseline, write_baseline
from pl_normkit.graph import ModelGraph
from pl_normkit.importing import users_code
from pl_normkit.inputs import parse_inputs
from pl_normkit.output import CalmStream, calm, say
from pl_normkit.report import Report
from pl_normkit.selection import Selection
from pl_normkit.specs import build_model
from pl_normkit.subject import Subject


def lint(options: argparse.Namespace) -> int:
    """0 for a clean subject, 1 for findings that count, 2 where something failed. Raises NormkitError for bad input."""
    selection = Selection.from_pyproject().override(options.select, options.ignore, _patterns(options.per_module_ignore))
    accepted = read_baseline(options.baseline) if options.baseline else frozenset()
    with _foreign_words_apart():
        found = audit_subject(_subject(options), selection)
    report = Report(subtract_baseline(found.findings, accepted), options.model or found.subject, found.notes)
    try:
        if options.write_baseline:
            write_baseline(options.write_baseline, found.findings)
        _show(report, options.format, options.output)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(
            "the file cannot be written",
            where=str(error.filename or ""),
            evidence=error.strerror or str(error),
            mend="name a file in a folder that exists",
        ) from error
    for note in report.notes:
        say(f"{'error' if note in report.failures else 'note'}: {note}")
    if report.failures:
        return 2
    return int(options.fail_on != "never" and bool(report.at_least(options.fail_on)))


@contextlib.contextmanager
def _foreign_words_apart() -> Iterator[None]:
    """What the linted code prints goes to standard error, where it cannot spoil a report; of the warnings only ours are shown."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(CalmStream(sys.stderr)):
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", NormkitWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        yield


def _subject(options: argparse.Namespace) -> Subject:
    parts = [part for part in load_lint_parts() if _is_given(part, options)]
    if options.model is None:
        if not parts:
            raise ConfigError("there is nothing to lint", mend="name a model: pl-normkit lint timm:resnet50")
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
        with users_code(f"{flag} {getattr(options, name)} cannot be used", mend="check what it names", kind=ConfigError):
            fields |= part.fill(options, model)
    return fields


def _is_given(part: LintPart, options: argparse.Namespace) -> bool:
    """Whether its first option is there. Raises ConfigError when only others are, which would do nothing."""
    first = next(iter(part.arguments))
    given = [option for option, name in part.destinations.items() if getattr(options, name) is not None]
    if given and first not in given:
        raise ConfigError(f"{given[0]} does nothing without {first}", mend=f"give {first} too")
    return bool(given)


def _patterns(texts: Sequence[str]) -> dict[str, list[str]]:
    patterns = {}
    for text in texts:
        pattern, colon, words = text.rpartition(":")
        rules = [word.strip() for word in words.split(",") if word.strip()]
        if not colon or not rules:
            raise ConfigError(f"--per-module-ignore {text!r} names no rules", mend="write PATTERN:RULES, such as 'encoder.*:NK101'")
        patterns[pattern] = rules
    return patterns


def _show(report: Report, form: str, output: Path | None) -> None:
    if form == "text" and report.failures and not report.findings:
        return
    with contextlib.ExitStack() as stack:
        stream: Any = sys.stdout
        if output:
            stream = stack.enter_context(output.open("w", encoding="utf-8", errors="backslashreplace"))
        if form == "text":
            from rich.console import Console

            # Its notes go to standard error.
            replace(report, notes=()).print(Console(file=CalmStream(stream), emoji=False, width=None if stream.isatty() else 120))  # type: ignore[arg-type]
        else:
            text = {"json": report.to_json, "sarif": report.to_sarif, "github": report.to_github, "html": report.to_html}[form]()
            stream.write((text if form == "github" else calm(text)) + "\n")
