from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pl_normkit import __version__
from pl_normkit.cli import _build_parser
from pl_normkit.rules import SECTIONS, load_rules

LINT = ("lint", "userpkg.models:build", "--input", "3,8,8")
CLEAN = ("lint", "userpkg.models:build?drop=0.0", "--input", "3,8,8")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


# The other commands.


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"pl_normkit {__version__}\n", "")


def test_rules_lists_every_rule_with_its_summary(run: Run) -> None:
    result = run("rules")
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    for known in load_rules().values():
        name = f"{known.name} (preview)" if known.preview else known.name
        assert any(line.startswith(f"{known.code} {name.split()[0]}") for line in lines)
    flat = " ".join(result.out.split())
    assert "dropout-before-batch-norm warning published safe" in flat
    assert "contested" not in flat


@pytest.mark.parametrize("word", ["NK101", "nk101", "dropout-before-batch-norm"])
def test_explain_shows_every_section_and_how_to_silence(run: Run, word: str) -> None:
    result = run("explain", word)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "NK101 dropout-before-batch-norm (warning)"
    assert [line for line in lines if line in {*SECTIONS, "Silence"}] == [*SECTIONS, "Silence"]
    assert 'ignore=["NK101"] on the callback, --ignore NK101, or [tool.pl-normkit] in pyproject.toml' in result.out
    text = " ".join(result.out.split())
    assert [title for title, words in load_rules()["NK101"].sections().items() if " ".join(words.split()) not in text] == []


def test_explain_says_that_a_rule_is_preview(run: Run) -> None:
    assert run("explain", "NK105").out.startswith("NK105 dropout-upstream-of-batch-norm (warning, preview: off until selected)")


def test_the_installed_command_lints_a_module_of_the_working_directory(working_directory: Path) -> None:
    command = [str(Path(sys.executable).parent / "pl-normkit"), *LINT, "--format", "github"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=working_directory)
    assert (result.returncode, result.stderr) == (1, "")
    assert [line.partition(" ")[0] for line in result.stdout.splitlines()] == ["::warning", "::warning"]


def test_help_rules_and_explain_load_no_torch() -> None:
    code = (
        "import sys\n"
        "from pl_normkit.cli import main\n"
        "for words in (['--help'], ['lint', '--help'], ['run', '--help'], ['rules'], ['explain', 'NK101']):\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("rulse",), "did you mean 'rules'?"),
        (("lint", "x", "--fromat", "json"), "did you mean '--format'?"),
        (("lint", "x", "--format", "jsn"), "did you mean 'json'?"),
        (("explain", "NK101", "--debgu"), "did you mean '--debug'?"),
    ],
)
def test_a_misspelt_word_gets_the_nearest(run: Run, words: tuple[str, ...], hint: str) -> None:
    result = run(*words)
    assert (result.code, result.err.strip().endswith(hint)) == (2, True), result.err


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = [action for action in _build_parser([])._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


@pytest.mark.parametrize("name", parsers())
def test_every_option_says_what_it_does_and_its_default(name: str) -> None:
    parser = parsers()[name]
    for action in parser._actions:
        assert action.help, action
        if action.option_strings and not action.required and action.nargs != 0:
            assert "default" in (parser._get_formatter()._get_help_string(action) or ""), action.option_strings  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["run", "compare"])
def test_help_of_recipes_lists_them(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert (result.code, "segmentation: Semantic" in result.out, "vit: Image" in result.out) == (0, True, True)


def test_roles_lists_every_parameter(run: Run) -> None:
    result = run("roles", "userpkg.models:build", "--input", "3,8,8")
    assert (result.code, result.err) == (0, "")
    rows = {line.split()[0]: line.split()[1:4] for line in result.out.splitlines()[1:]}
    assert rows["0.weight"] == ["4x3x3x3", "weight", "yes"]
    assert rows["1.bn1.bias"] == ["4", "beta", "no"]
    assert len(rows) == 18


def test_a_reader_that_stops_early_is_no_error() -> None:
    """`pl-normkit rules | head -1`."""
    code = "import sys; from pl_normkit.cli import main; sys.exit(main(['rules']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
