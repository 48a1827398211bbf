from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pl_normkit import __version__
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
        (line,) = [line for line in lines if line.startswith(f"{known.code} ")]
        assert line.startswith(f"{known.code} {name.split()[0]}")
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
    assert [title for title, words in load_rules()["NK101"].sections().items() if words not in text] == []


def test_explain_says_that_a_rule_is_preview(run: Run) -> None:
    assert run("explain", "NK105").out.startswith("NK105 dropout-upstream-of-batch-norm (warning, preview: off until selected)")


def test_the_installed_command_lints_a_module_of_the_working_directory(working_directory: Path) -> None:
    command = [str(Path(sys.executable).parent / "pl-normkit"), *LINT, "--format", "github"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=working_directory)
    assert (result.returncode, result.stderr) == (1, "")
    assert [line.partition(" ")[0] for line in result.stdout.splitlines()] == ["::warning", "::warning"]
