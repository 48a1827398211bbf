"""`pl-normkit`: lint models, list and explain rules, run recipes. Exit codes: 0 clean, 1 findings, 2 error."""

from __future__ import annotations

__all__ = ["lint_options", "main"]

import argparse
import ast
import importlib
import io
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from pl_normkit import __version__
from pl_normkit.catalog import CatalogRule, catalog_rules, read_catalog, rules_of_code
from pl_normkit.errors import ConfigError, NormkitError, nearest
from pl_normkit.output import say, screen, tolerate_any_text

_FORMATS = ("text", "json", "sarif", "github", "html", "junit")
_OF_RECIPES = ("run", "compare")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; errors are printed without a traceback unless --debug is given."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    tolerate_any_text()
    options = _parse(words)
    try:
        with _exit_code_is_ours():
            return int(options.command(options))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except NormkitError as error:
        cause: BaseException = error
        say(f"error: {error}")
    except SystemExit as stop:
        cause = stop
        say(f"error: the code that was run called sys.exit({'' if stop.code is None else stop.code})\n  fix: --debug shows where")
    except MemoryError as error:
        cause = error
        say(f"error: out of memory: {error}")
    except Exception as error:
        if words[:1] and words[0] in _OF_RECIPES:  # the user's own training code, which wants its traceback
            raise
        cause = error
        say(f"internal error: {type(error).__name__}: {error}\n  fix: please report it with the output of --debug")
    except BaseException as error:  # the interrupt key, or what a user's code raises in its place
        cause = error
        say(f"error: stopped by {type(error).__name__}")
    if "--debug" in words:
        traceback.print_exception(cause)
    return 2


@contextmanager
def _exit_code_is_ours() -> Iterator[None]:
    """Let `os._exit` raise SystemExit in this process: code that is linted must not choose the exit code."""
    leave, ours = os._exit, os.getpid()

    def refuse(status: int = 0) -> NoReturn:
        if os.getpid() != ours:
            leave(status)
        raise SystemExit(status)

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = leave


class _Parser(argparse.ArgumentParser):
    """An argparse parser that names the nearest word, shows defaults, and breaks no word of its help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message, re.DOTALL)
        unknown = re.search(r"unrecognized arguments: (--?[\w-]+)", message)
        hint = ""
        if choice:
            hint = nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif unknown:
            hint = nearest(unknown[1], self._option_string_actions)
        super().error(f"{message}; {hint}" if hint else message)


class _Help(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help is None or "default" in action.help or not action.option_strings or action.required or action.nargs == 0:
            return action.help
        return f"{action.help} (default: {'none' if action.default in (None, []) else '%(default)s'})"

    def _split_lines(self, text: str, width: int) -> list[str]:
        import textwrap

        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Leaves by SystemExit for help and for words it does not know, as argparse does."""
    parser = _build_parser(words)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _build_parser(words: Sequence[str]) -> _Parser:
    parser = _Parser(prog="pl-normkit", description="A linter with a screwdriver for PyTorch training runs.")
    parser.add_argument("--version", action="version", version=f"pl_normkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")

    def add(name: str, about: str, run: Any) -> _Parser:
        added: _Parser = commands.add_parser(name, help=about, description=f"{about[:1].upper()}{about[1:]}.", parents=[common])
        added.set_defaults(command=run, parser=added)
        return added

    parts, of_rooms = _of_rooms(words)
    lint = add("lint", "audit a model without training, weights or memory", _lint)
    _add_lint_options(lint)
    for arguments in parts:
        _add_arguments(lint, arguments)
    add("rules", "list all rules", _list_rules)
    add("explain", "show the documentation of a rule", _explain).add_argument("rule", help="code or name, such as NK101")
    for name, (about, arguments, run) in of_rooms.items():
        _add_arguments(add(name, about, run), arguments)
    for name, about in (
        ("run", "train a recipe, test it, predict with it, export it"),
        ("compare", "train pairs of runs with and without callbacks or other options"),
    ):
        recipe = add(name, about, _hand_over)
        recipe.formatter_class = argparse.RawDescriptionHelpFormatter
        recipe.epilog = _recipes_help(name)
        recipe.set_defaults(handed=name)
        recipe.add_argument("recipe", nargs="?", default="", metavar="RECIPE", help="one of those below")
        recipe.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="what the recipe takes")
    return parser


def _of_rooms(words: Sequence[str]) -> tuple[list[Any], dict[str, tuple[str, Any, Any]]]:
    """Options of `lint` and commands that rooms add. Help shows them from the catalog; to run one, its code is loaded."""
    catalog = read_catalog()
    first = next((word for word in words if not word.startswith("-")), "")
    if not first or first in ("rules", "explain", *_OF_RECIPES) or {"-h", "--help"} & set(words):
        return catalog["lint"], {name: (each["help"], each["arguments"], None) for name, each in catalog["commands"].items()}
    from pl_normkit.commands import load_commands, load_lint_parts

    return [part.arguments for part in load_lint_parts()], {each.name: (each.help, each.arguments, each.run) for each in load_commands()}


def _add_lint_options(lint: _Parser) -> None:
    forms = (
        "timm:NAME, smp:ARCHITECTURE, torchvision:NAME, transformers:CLASS, diffusers:CLASS, hf:PATH/config.json or "
        "package.module:builder, each with ?argument=value&...; the code it names is run"
    )
    lint.add_argument("model", nargs="?", help=f"{forms} (default: all models of [tool.pl-normkit.models] in pyproject.toml)")
    sizes = (
        "sizes without the batch, once for each input: 3,224,224 or 128:int64; ids:16 for tokens, NAME=16:bool for a keyword argument, "
        "NAME.KEY=3,8,8 for an entry of a dict (default: the model's own)"
    )
    lint.add_argument("--input", action="append", default=[], metavar="SIZES", help=sizes)
    lint.add_argument("--real", action="store_true", help="build in memory, so that findings carry measurements on noise")
    probes = "comma-separated probes whose curves the html page shows: variance_shift, fusion_scales, time_awareness, gamma_norms; ALL"
    lint.add_argument("--probe", type=_words, metavar="NAMES", help=f"{probes}; needs --real (default: none)")
    lint.add_argument("--format", choices=_FORMATS, default="text", help="form of the report")
    lint.add_argument("--output", type=Path, metavar="FILE", help="where the report is written (default: standard output)")
    chosen = "comma-separated codes, prefixes or names; DEFAULT, ALL (default: DEFAULT, or what pyproject.toml selects)"
    lint.add_argument("--select", type=_words, metavar="RULES", help=chosen)
    lint.add_argument("--ignore", type=_words, metavar="RULES", help="the same for rules that do not run, beside those of pyproject.toml")
    lint.add_argument("--per-module-ignore", action="append", default=[], metavar="PATTERN:RULES", help="silence rules in matching modules")
    folder = "; without a model a folder with a file for each"
    lint.add_argument("--baseline", type=Path, metavar="FILE", help=f"leave out what this file accepts{folder}")
    lint.add_argument("--write-baseline", type=Path, metavar="FILE", help=f"accept today's findings in this file{folder}")
    lint.add_argument(
        "--jobs", type=_count, metavar="N", help="without a model: how many at a time (default: one a core, or what is there)"
    )
    places = "without a model: where they are audited: processes or gpus of this machine, or a ray cluster"
    lint.add_argument("--on", choices=("processes", "gpus", "ray"), default="processes", help=places)
    limit = "without a model: give a model up after so long (default: never)"
    lint.add_argument("--timeout", type=_seconds, metavar="SECONDS", help=limit)
    lint.add_argument("--no-cache", action="store_true", help="without a model: audit also what has not changed since it was")
    levels = ("note", "warning", "error", "never")
    lint.add_argument("--fail-on", choices=levels, default="note", help="lowest severity that makes the exit code 1")


def _add_arguments(parser: argparse.ArgumentParser, arguments: Mapping[str, Mapping[str, Any]]) -> None:
    for name, settings in arguments.items():
        parser.add_argument(name, **settings)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _lint(options: argparse.Namespace) -> int:
    _begin_early(options)
    return int(importlib.import_module("pl_normkit.linting").lint(options, lint_options))


def _begin_early(options: argparse.Namespace) -> None:
    """Where many models are to be audited and no cache may answer, the workers' imports run beside our own, which take as long."""
    if options.model or getattr(options, "loss", None) or options.on != "processes":
        return
    from pl_normkit.project import nearest_pyproject
    from pl_normkit.repository import CACHE, needed_imports, read_entries

    project = nearest_pyproject()
    if project is None or ((project.parent / CACHE).is_dir() and not options.no_cache):
        return
    try:
        entries = read_entries(project)
    except ConfigError:  # said later, with everything else
        return
    if entries:
        importlib.import_module("pl_normkit.jobs.local").warm_up(needed_imports(entries))


def lint_options(words: Sequence[str]) -> argparse.Namespace:
    """The options that the words of `pl-normkit lint` stand for. Raises ConfigError for words it does not know."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            return _parse(["lint", *words])
    except SystemExit as stop:
        raise ConfigError(said.getvalue().strip().rpartition("error: ")[2], fix="see `pl-normkit lint --help`") from stop


def _list_rules(_: argparse.Namespace) -> int:
    from rich.table import Table

    table = Table("code", "name", "severity", "mark", "fix", "what it does", box=None)
    for known in catalog_rules():
        name = f"{known.name} (preview)" if known.preview else known.name
        table.add_row(known.code, name, known.severity, known.mark, known.fix_safety, known.summary)
    screen(sys.stdout, None if sys.stdout.isatty() else 160).print(table)
    return 0


def _explain(options: argparse.Namespace) -> int:
    from rich.markup import escape

    known = _find_rule(options.rule, catalog_rules()) or _find_rule(options.rule, rules_of_code())
    if known is None:
        names = [name for rule in catalog_rules() for name in (rule.code, rule.name)]
        raise ConfigError(f"there is no rule {options.rule!r}", fix=nearest(options.rule, names) or "see `pl-normkit rules`")
    console = screen(sys.stdout, None if sys.stdout.isatty() else 120)
    preview = ", preview: off until selected" if known.preview else ""
    console.print(f"[bold]{known.code} {known.name}[/bold] ({known.severity}{preview})")
    for title, text in known.sections.items():
        console.print(f"\n[bold]{title}[/bold]\n{escape(text)}")
    silence = f'ignore=["{known.code}"] on the callback, --ignore {known.code}, or [tool.pl-normkit] in pyproject.toml'
    console.print(f"\n[bold]Silence[/bold]\n{escape(silence)}")
    return 0


def _find_rule(word: str, rules: Sequence[CatalogRule]) -> CatalogRule | None:
    return next((rule for rule in rules if word.upper() == rule.code or word.lower() == rule.name), None)


def _recipes() -> dict[str, str]:
    """Name -> what its package's docstring says, without loading it."""
    found = {}
    for folder in importlib.import_module("pl_normkit.recipes").__path__:
        for module in pkgutil.iter_modules([folder]):
            if module.ispkg:
                found[module.name] = ast.get_docstring(ast.parse((Path(folder) / module.name / "__init__.py").read_text())) or ""
    return found


def _recipes_help(command: str) -> str:
    lines = [f"  {name}: {about.splitlines()[0] if about else ''}" for name, about in _recipes().items()]
    return "\n".join(["recipes:", *lines, "", f"see pl-normkit {command} RECIPE --help"])


def _hand_over(options: argparse.Namespace) -> int:
    """`run RECIPE ...` to the recipe's own LightningCLI, `compare RECIPE ...` or `compare module:function ...` to what all share."""
    known = _recipes()
    words = [word for word in options.words if word != "--debug"]
    if options.handed == "compare" and ":" in options.recipe:
        return int(importlib.import_module("pl_normkit.recipes.comparing").compare(options.recipe, words))
    if options.recipe not in known:
        what = f"there is no recipe {options.recipe!r}" if options.recipe else f"{options.handed} needs the name of a recipe"
        raise ConfigError(what, fix=nearest(options.recipe, known) or f"recipes: {', '.join(known)}")
    try:
        recipe = importlib.import_module(f"pl_normkit.recipes.{options.recipe}.main")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0].replace("_", "-")
        raise ConfigError(f"the recipe {options.recipe!r} needs {package}", fix=f"pip install {package}") from error
    if options.handed == "run":
        return int(importlib.import_module("pl_normkit.recipes.export").run_or_export(recipe.RECIPE, words))
    return int(importlib.import_module("pl_normkit.recipes.comparing").compare(options.recipe, words))


if __name__ == "__main__":
    sys.exit(main())
