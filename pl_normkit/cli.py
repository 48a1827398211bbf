"""`pl-normkit`: lint models, list and explain rules, run recipes. Exit codes: 0 clean, 1 findings, 2 error."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pl_normkit.receptive_field.commands  # noqa: F401 - the probe is no room, so nothing else registers its command
from pl_normkit import __version__
from pl_normkit.commands import Arguments, LintPart, load_commands, load_lint_parts
from pl_normkit.errors import ConfigError, NormkitError, NormkitWarning, nearest
from pl_normkit.findings import Severity, read_baseline, subtract_baseline, write_baseline
from pl_normkit.report import Report
from pl_normkit.rules import Subject, load_rules
from pl_normkit.selection import Selection

if TYPE_CHECKING:
    from torch import nn

_OF_RECIPES = (["run"], ["compare"])

FORMATS = ("text", "json", "sarif", "github", "html")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; errors are printed without a traceback unless --debug is given."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        if words[:1] in _OF_RECIPES:
            return _hand_over([word for word in words if word != "--debug"])
        options = _parser().parse_args(words)
        return int(options.command(options))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except NormkitError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        cause: Exception = error
    except Exception as error:
        if words[:1] in _OF_RECIPES:  # the user's own training code, which wants its traceback
            raise
        print(f"internal error: {type(error).__name__}: {error}\n  mend: please report it with the output of --debug", file=sys.stderr)  # noqa: T201
        cause = error
    if debug:
        traceback.print_exception(cause)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pl-normkit", description="A linter with a screwdriver for PyTorch training runs.")
    parser.add_argument("--version", action="version", version=f"pl_normkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")

    lint = commands.add_parser("lint", help="audit a model without training, weights or memory", parents=[common])
    forms = "timm:NAME, smp:ARCHITECTURE, torchvision:NAME or package.module:builder, each with ?argument=value&..."
    lint.add_argument("model", nargs="?", help=forms)
    lint.add_argument("--input", action="append", default=[], metavar="SIZES", help="sizes without the batch: 3,224,224 or 128:int64")
    lint.add_argument("--real", action="store_true", help="build in memory, so that findings carry measurements on noise")
    lint.add_argument("--format", choices=FORMATS, default="text")
    lint.add_argument("--output", type=Path, metavar="FILE", help="write the report there instead of to standard output")
    lint.add_argument("--select", type=_words, metavar="RULES", help="comma-separated codes, prefixes or names; DEFAULT, ALL")
    lint.add_argument("--ignore", type=_words, metavar="RULES")
    lint.add_argument("--per-module-ignore", action="append", default=[], metavar="PATTERN:RULES", help="silence rules in matching modules")
    lint.add_argument("--baseline", type=Path, metavar="FILE", help="leave out what this file accepts")
    lint.add_argument("--write-baseline", type=Path, metavar="FILE", help="accept today's findings in this file")
    lint.add_argument("--fail-on", choices=[*Severity, "never"], default=Severity.NOTE, help="lowest severity that makes the exit code 1")
    for part in load_lint_parts():
        _add_arguments(lint, part.arguments)
    lint.set_defaults(command=_lint)

    rules = commands.add_parser("rules", help="list all rules", parents=[common])
    rules.set_defaults(command=_list_rules)

    explain = commands.add_parser("explain", help="show the documentation of a rule", parents=[common])
    explain.add_argument("rule", help="code or name")
    explain.set_defaults(command=_explain)

    for known in load_commands():
        parser_of_room = commands.add_parser(known.name, help=known.help, parents=[common])
        _add_arguments(parser_of_room, known.arguments)
        parser_of_room.set_defaults(command=known.run)

    run = commands.add_parser("run", help="run a recipe: pl-normkit run segmentation --help", add_help=False)
    run.add_argument("recipe")
    help_text = "train pairs of runs with and without callbacks: pl-normkit compare segmentation --help"
    compare = commands.add_parser("compare", help=help_text, add_help=False)
    compare.add_argument("recipe")
    return parser


def _add_arguments(parser: argparse.ArgumentParser, arguments: Arguments) -> None:
    for name, settings in arguments.items():
        parser.add_argument(name, **settings)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _lint(options: argparse.Namespace) -> int:
    from pl_normkit.auditing import audit_subject

    selection = Selection.from_pyproject().override(options.select, options.ignore, _patterns(options.per_module_ignore))
    accepted = read_baseline(options.baseline) if options.baseline else frozenset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", NormkitWarning)
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
        print(f"{'error' if note in report.failures else 'note'}: {note}", file=sys.stderr)  # noqa: T201
    if report.failures:
        return 2
    return int(options.fail_on != "never" and bool(report.at_least(options.fail_on)))


def _subject(options: argparse.Namespace) -> Subject:
    from pl_normkit.graph import ModelGraph
    from pl_normkit.specs import build_model, parse_inputs

    parts = [part for part in load_lint_parts() if _is_given(part, options)]
    if options.model is None:
        if not parts:
            raise ConfigError("there is nothing to lint", mend="name a model: pl-normkit lint timm:resnet50")
        return Subject(**_filled(parts, options, None), measure=options.real)
    device = "cpu" if options.real else "meta"
    model = build_model(options.model, device=device)
    inputs = parse_inputs(options.input, model, device=device)
    graph = ModelGraph.from_model(model, inputs) if options.debug else None  # a model that cannot be traced then shows its traceback
    return Subject(model=model, example_inputs=inputs, graph=graph, measure=options.real, **_filled(parts, options, model))


def _filled(parts: Sequence[LintPart], options: argparse.Namespace, model: nn.Module | None) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.fill(options, model).items()}


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
        if not colon or not _words(words):
            raise ConfigError(f"--per-module-ignore {text!r} names no rules", mend="write PATTERN:RULES, such as 'encoder.*:NK101'")
        patterns[pattern] = _words(words)
    return patterns


def _show(report: Report, form: str, output: Path | None) -> None:
    from rich.console import Console

    if form == "text":
        if report.failures and not report.findings:
            return
        report = replace(report, notes=())  # they go to standard error
        with output.open("w") if output else nullcontext(sys.stdout) as stream:
            report.print(Console(file=stream, width=None if stream.isatty() else 120))
        return
    text = {"json": report.to_json, "sarif": report.to_sarif, "github": report.to_github, "html": report.to_html}[form]()
    if output:
        output.write_text(text + "\n")
    else:
        print(text)  # noqa: T201


def _list_rules(_: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("code", "name", "severity", "mark", "fix", "what it does", box=None)
    for known in load_rules().values():
        name = f"{known.name} (preview)" if known.preview else known.name
        table.add_row(known.code, name, known.severity.value, known.mark.value, known.fix_safety.value, known.summary)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _explain(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    rules = load_rules()
    known = rules.get(options.rule.upper()) or next((rule for rule in rules.values() if rule.name == options.rule.lower()), None)
    if known is None:
        names = [*rules, *(rule.name for rule in rules.values())]
        raise ConfigError(f"there is no rule {options.rule!r}", mend=nearest(options.rule, names) or "see `pl-normkit rules`")
    console = Console(width=None if sys.stdout.isatty() else 120)
    preview = ", preview: off until selected" if known.preview else ""
    console.print(f"[bold]{known.code} {known.name}[/bold] ({known.severity.value}{preview})")
    for title, text in known.sections().items():
        console.print(f"\n[bold]{title}[/bold]\n{escape(text)}")
    silence = f'ignore=["{known.code}"] on the callback, --ignore {known.code}, or [tool.pl-normkit] in pyproject.toml'
    console.print(f"\n[bold]Silence[/bold]\n{escape(silence)}")
    return 0


def _hand_over(words: list[str]) -> int:
    """`run RECIPE ...` to the recipe's own LightningCLI, `compare RECIPE ...` to what all recipes share."""
    recipes = importlib.import_module("pl_normkit.recipes")
    known = [found.name for found in pkgutil.iter_modules(recipes.__path__) if found.ispkg]
    command, name = words[0], words[1] if len(words) > 1 else ""
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}", mend=nearest(name, known) or f"recipes: {', '.join(known)}")
    recipe = importlib.import_module(f"pl_normkit.recipes.{name}.main")
    if command == "run":
        return int(recipe.run(words[2:]))
    return int(importlib.import_module("pl_normkit.recipes.comparing").compare(recipe.RECIPE, words[2:]))
