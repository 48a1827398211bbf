"""`pl-normkit lint` without a model: all models of the nearest pyproject.toml, with a baseline each."""

from __future__ import annotations

__all__ = ["lint_listed"]

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

from pl_normkit.errors import ConfigError
from pl_normkit.findings import Note, read_baseline, subtract_baseline, write_baseline
from pl_normkit.project import nearest_pyproject
from pl_normkit.report import Report
from pl_normkit.repository import CACHE, Entry, lint_repository, read_entries
from pl_normkit.selection import Selection

Parse = Callable[[Sequence[str]], argparse.Namespace]

_OF_THE_RUN = ("format", "output", "fail_on", "write_baseline", "jobs", "on", "timeout", "no_cache", "debug")


def lint_listed(options: argparse.Namespace, parse: Parse, report_of: Callable[[argparse.Namespace], Report]) -> list[Report]:
    """A report for each model, in the order of the file. Raises ConfigError for bad words before any model is built.

    Args:
        options: of the command line: what is selected there is selected for every model, the rest is about the output.
        parse: from the words of a model to its options; importable, since other processes call it, and so is `report_of`.
        report_of: from these options to a report.
    """
    project, entries = _entries(options)
    root = project.parent
    Selection.from_pyproject(root).override(options.select, options.ignore).rules()
    of_models = {entry.name: _checked(entry, parse) for entry in entries}
    accepted = {entry.name: _accepted(entry, options, of_models[entry.name], root) for entry in entries}
    lint = partial(_lint_words, parse, report_of, str(root))
    cache = None if options.no_cache else root / CACHE
    with _progress(len(entries)) as done:
        reports = lint_repository(entries, lint, root, jobs=options.jobs, on=options.on, limit=options.timeout, cache=cache, done=done)
    if options.write_baseline:
        options.write_baseline.mkdir(parents=True, exist_ok=True)
        for name, report in reports.items():
            write_baseline(_file_of(options.write_baseline, name), report.findings)
    return [replace(report, findings=subtract_baseline(report.findings, accepted[name])) for name, report in reports.items()]


def _entries(options: argparse.Namespace) -> tuple[Path, list[Entry]]:
    """The project file, and its models with what the command line selects for all of them."""
    for option in ("input", "per_module_ignore"):
        if getattr(options, option):
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} speaks of one model", fix=f"name the model, or write {name} in pyproject.toml")
    project = nearest_pyproject()
    entries = read_entries(project) if project is not None else []
    if project is None or not entries:
        raise ConfigError(
            "there is nothing to lint", fix="name a model (pl-normkit lint timm:resnet50), or list models in [tool.pl-normkit.models]"
        )
    shared = ["--real"] if options.real else []
    shared += [f"--{name}={','.join(getattr(options, name))}" for name in ("select", "ignore") if getattr(options, name)]
    return project, [replace(entry, words=(*entry.words, *shared)) for entry in entries]


def _checked(entry: Entry, parse: Parse) -> argparse.Namespace:
    try:
        found, plain = parse(entry.words), parse([])
    except ConfigError as error:
        raise ConfigError(f"the model {entry.name!r} cannot be linted: {error.what}", where=entry.source, fix=error.fix) from error
    given = [name for name in _OF_THE_RUN if getattr(found, name) != getattr(plain, name)]
    if given:
        option = given[0].replace("_", "-")
        raise ConfigError(f"{option!r} of the model {entry.name!r} is about all models", where=entry.source, fix=f"give --{option}")
    return found


def _accepted(entry: Entry, options: argparse.Namespace, of_model: argparse.Namespace, root: Path) -> frozenset[str]:
    """From the model's own `baseline`, and from the folder that --baseline names, which need not know every model."""
    files = [root / of_model.baseline] if of_model.baseline else []
    if options.baseline:
        if not options.baseline.is_dir():
            raise ConfigError(
                "--baseline of several models names a folder", where=str(options.baseline), fix="write one with --write-baseline FOLDER"
            )
        files += [file for file in [_file_of(options.baseline, entry.name)] if file.is_file()]
    return frozenset().union(*map(read_baseline, files))


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{quote(name, safe=' ')}.json"


def _lint_words(parse: Parse, report_of: Callable[[argparse.Namespace], Report], root: str, words: Sequence[str]) -> Report:
    """In a process of its own, so that the working directory is the repository whatever it was before."""
    os.chdir(root)
    try:
        return report_of(parse(words))
    except SystemExit as stop:
        return Report(notes=[Note(f"the code that was run called sys.exit({'' if stop.code is None else stop.code})")])


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Entry], None]]:
    """A bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("models", total=total)
        yield lambda entry: bar.update(task, advance=1, description=entry.name)
