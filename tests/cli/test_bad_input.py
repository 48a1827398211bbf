from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pl_normkit.findings import Place
from pl_normkit.rules import Observation

LINT = ("lint", "userpkg.models:build", "--input", "3,8,8")
CLEAN = ("lint", "userpkg.models:build?drop=0.0", "--input", "3,8,8")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


# Bad input: exit code 2, one message that names what, where and how to fix it, a traceback only with --debug.

BAD_INPUT = {
    "no spec": (("lint", "resnet50"), "'resnet50' is no model specification", "timm:NAME"),
    "unknown model": (("lint", "timm:wide_resnet50_22"), "timm has no model 'wide_resnet50_22'", "did you mean 'wide_resnet50_2'?"),
    "missing package": (("lint", "nopackage:build", "--input", "3"), "there is no module 'nopackage'", "check the spelling"),
    "unknown builder": (("lint", "userpkg.models:biuld"), "userpkg.models has no 'biuld'", "did you mean 'build'?"),
    "builder fails": (("lint", "userpkg.models:fails"), "'userpkg.models:fails' cannot be built", "check the arguments"),
    "no module": (("lint", "userpkg.models:gives_nothing"), "gives no torch.nn.Module", "returns a module"),
    "no input": (("lint", "userpkg.models:build"), "the input shape of this model is not known", "--input 3,224,224"),
    "no shape": (("lint", "userpkg.models:build", "--input", "3x8x8"), "--input '3x8x8' is no shape", "3,224,224"),
    "wrong shape": (
        ("lint", "userpkg.models:build", "--input", "5,8,8"),
        "with inputs (2, 5, 8, 8) torch.float32",
        "check the inputs",
    ),
    "wrong dtype": (
        ("lint", "userpkg.models:build", "--input", "3,8,8:int64"),
        "with inputs (2, 3, 8, 8) torch.int64",
        "check the inputs",
    ),
    "not exportable": (("lint", "userpkg.models:Branching", "--input", "3"), "userpkg/models.py:26", "take that line out of forward"),
    "unknown rule": ((*LINT, "--select", "NK110"), "unknown rule 'NK110'", "did you mean 'NK1"),
    "unknown ignore": (
        (*LINT, "--ignore", "dropout-before-batchnorm"),
        "unknown rule 'dropout-before-batchnorm'",
        "'dropout-before-batch-norm'",
    ),
    "no pattern": ((*LINT, "--per-module-ignore", "NK101"), "--per-module-ignore 'NK101' names no rules", "PATTERN:RULES"),
    "pattern matches nothing": ((*LINT, "--per-module-ignore", "1.dorp:NK101"), "'1.dorp' matches no module", "did you mean '1.drop'?"),
    "no baseline": ((*LINT, "--baseline", "nothing.json"), "the baseline file cannot be read", "--write-baseline"),
    "unwritable baseline": ((*LINT, "--write-baseline", "no/folder.json"), "no/folder.json", "a folder that exists"),
    "unwritable output": ((*LINT, "--output", "no/folder.txt"), "no/folder.txt", "a folder that exists"),
    "unwritable json": ((*LINT, "--format", "json", "--output", "userpkg"), "userpkg", "a folder that exists"),
    "explain nothing": (
        ("explain", "dropout-before-batchnorm"),
        "there is no rule 'dropout-before-batchnorm'",
        "'dropout-before-batch-norm'",
    ),
    "no recipe": (("run", "segmentatoin"), "there is no recipe 'segmentatoin'", "did you mean 'segmentation'?"),
    "no recipe named": (("run",), "run needs the name of a recipe", "segmentation"),
    "builder leaves": (("lint", "userpkg.models:leaves", "--input", "3"), "it called sys.exit(0)", "check the arguments"),
    "builder leaves at once": (("lint", "userpkg.models:leaves_at_once", "--input", "3"), "it called sys.exit(0)", "check the arguments"),
    "module leaves": (("lint", "userpkg.leaving:build", "--input", "3"), "it called sys.exit(0)", "check the spelling"),
    "forward leaves": (("lint", "userpkg.models:Leaving", "--input", "3"), "called sys.exit(0)", "--debug"),
    "builder interrupts": (("lint", "userpkg.models:interrupts", "--input", "3"), "stopped by KeyboardInterrupt", ""),
    "loss leaves": (("lint", "--loss", "userpkg.models:leaving_loss"), "it called sys.exit(0)", "check what it names"),
    "loss without signature": (("lint", "--loss", "torch:sqrt"), "torch:sqrt", ""),
    "example raises": (
        ("lint", "--loss", "userpkg.models:loss", "--example", "userpkg.models:fails"),
        "ValueError: width must be even",
        "check what it names",
    ),
    "optimizer leaves": ((*LINT, "--optimizer", "sys.exit()"), "sys.exit is no optimizer class", "torch.optim"),
    "optimizer of odd options": ((*LINT, "--optimizer", "torch.optim.SGD(lr=1, momentum=[])"), "momentum=[]", ""),
    "loaders leave": ((*LINT, "--loaders", "userpkg.models:leaves"), "it called sys.exit(0)", "without arguments"),
    "loaders without batches": ((*LINT, "--loaders", "userpkg.models:empty_loaders"), "training loader", "as in training"),
    "loaders that raise": ((*LINT, "--loaders", "userpkg.models:raising_loaders"), "OSError: disk gone", "as in training"),
    "huge size": (("lint", "userpkg.models:build", "--input", "3,9223372036854775807"), "--input 3,9223372036854775807", "other sizes"),
    "more than memory": ((*LINT[:2], "--real", "--input", "3,100000,1000000"), "larger than the memory", "smaller sizes"),
    "no dtype": ((*LINT[:2], "--input", "3,8,8:bits8"), "--input '3,8,8:bits8' is no shape", "a dtype"),
    "huge argument": (("lint", f"timm:resnet18?num_classes={10**22}"), "cannot be built", "check the arguments"),
    "a spec of surrogates": (("lint", "userpkg.models:\udcff", "--input", "3"), "has no '\\udcff'", "see dir"),
}


@pytest.mark.parametrize(("words", "what", "fix"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gives_one_error_and_2(run: Run, words: tuple[str, ...], what: str, fix: str) -> None:
    result = run(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("error: ") == 1
    assert what in result.err
    assert fix in result.err.partition("  fix: ")[2]
    assert "Traceback" not in result.err


@pytest.mark.parametrize("case", ["builder fails", "not exportable", "unknown rule", "explain nothing", "no recipe"])
def test_debug_adds_the_traceback_and_keeps_the_exit_code(run: Run, case: str) -> None:
    result = run(*BAD_INPUT[case][0], "--debug")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert "Traceback (most recent call last)" in result.err
    if case == "builder fails":
        assert 'raise ValueError("width must be even")' in result.err


def test_a_wrong_pyproject_gives_2(run: Run, working_directory: Path) -> None:
    (working_directory / "pyproject.toml").write_text("[tool.pl-normkit]\nignroe = []\n")
    result = run(*LINT)
    assert (result.code, "unknown key 'ignroe'" in result.err, "did you mean 'ignore'?" in result.err) == (2, True, True)
    assert str(working_directory / "pyproject.toml") in result.err


PYPROJECTS = {
    "a number for tool": ("tool = 3\n", "[tool] must be a table"),
    "a list of tools": ("[[tool]]\nx = 1\n", "[tool] must be a table"),
    "a number for ours": ("[tool]\npl-normkit = 3\n", "[tool.pl-normkit] must be a table"),
    "nested beyond reading": ("x = " + "[" * 20000, "pyproject.toml cannot be read"),
    "an unknown rule for a pattern": ("[tool.pl-normkit.per-module-ignore]\n'nothing.*' = ['NK9999']\n", "unknown rule 'NK9999'"),
}


@pytest.mark.parametrize(("text", "what"), PYPROJECTS.values(), ids=PYPROJECTS)
def test_a_pyproject_of_another_form_gives_2(run: Run, working_directory: Path, text: str, what: str) -> None:
    (working_directory / "pyproject.toml").write_text(text)
    result = run(*CLEAN)
    assert (result.code, result.out, result.err.startswith(f"error: {what}")) == (2, "", True)


def test_a_pattern_of_pyproject_that_matches_nothing_is_a_warning(run: Run, working_directory: Path) -> None:
    """A repository has several models."""
    (working_directory / "pyproject.toml").write_text("[tool.pl-normkit.per-module-ignore]\n'1.dorp' = ['NK101']\n")
    result = run(*CLEAN)
    assert (result.code, result.err) == (
        0,
        "warning: the per-module-ignore pattern '1.dorp' matches no module of this model. did you mean '1.drop'?\n",
    )
    assert run("lint", "--loss", "userpkg.models:loss") == (0, "pl_normkit: loss: nothing to report\n", "")
    assert run(*CLEAN, "--per-module-ignore", "1.dorp:NK101").code == 2  # what is typed for this model must match


BASELINES = {
    "nested keys": '{"version": 1, "accepted": [["a"]]}',
    "numbers": '{"version": 1, "accepted": [1]}',
    "another version": '{"version": 2, "accepted": []}',
    "no version": '{"accepted": []}',
    "a list": "[]",
    "nested beyond reading": "[" * 100_000,
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BASELINES.values(), ids=BASELINES)
def test_a_baseline_of_another_form_gives_2(run: Run, working_directory: Path, content: str | bytes) -> None:
    (working_directory / "baseline.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run(*CLEAN, "--baseline", "baseline.json")
    assert (result.code, result.out, result.err.startswith("error: the baseline file cannot be read")) == (2, "", True)


@pytest.mark.parametrize("form", ["text", "json", "sarif", "html", "github"])
def test_no_foreign_text_starts_a_line_of_a_ci_log(run: Run, make_rule: Any, form: str) -> None:
    """Neither names of modules, nor what the model prints, nor what a plugin's rule says."""

    def check(subject: Any) -> Any:
        yield Observation("fine\n::error::message", [Place("odd\udcff\n::error::name")], "\r ::warning::advice")

    make_rule("PLUG901", check)
    result = run("lint", "userpkg.models:build_and_print", "--input", "3,8,8", "--format", form)
    assert result.code == 1
    starts = [line.lstrip() for line in (result.out + result.err).splitlines()]
    assert [line for line in starts if line.startswith("::")] == ([starts[0]] if form == "github" else [])
    assert "from the user's module" not in result.out


def test_the_exit_code_of_a_plugin_that_leaves_is_ours(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point = importlib.metadata.EntryPoint("leaving", "userpkg.leaving", "pl_normkit.rules")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry_point])
    result = run(*CLEAN)
    assert (result.code, result.err.splitlines()[0][:50]) == (0, "warning: rules of entry point 'leaving' (userpkg.l")


def test_a_torchvision_that_does_not_fit_gives_2(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        if name == "timm":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    result = run("lint", "timm:resnet18")
    assert (result.code, result.err.splitlines()[0]) == (2, "error: torchvision does not fit the installed torch")
    assert "install torch and torchvision together" in result.err


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_of_our_own_gives_2_and_asks_for_a_report(run: Run, monkeypatch: pytest.MonkeyPatch, debug: bool) -> None:
    def audit_subject(*_: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(importlib.import_module("pl_normkit.linting"), "audit_subject", audit_subject)
    result = run(*LINT, *(["--debug"] if debug else []))
    assert (result.code, result.err.splitlines()[0]) == (2, "internal error: KeyError: 'a bug'")
    assert "please report it" in result.err
    assert ("Traceback" in result.err) == debug


@pytest.mark.parametrize("words", [(), ("lnit",), ("lint", "x:y", "--format", "xml"), ("explain",), ("rules", "--nope")])
def test_a_wrong_command_line_gives_2_with_the_usage(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert (result.code, result.out, result.err.startswith("usage: pl-normkit")) == (2, "", True)


def test_lint_of_nothing_says_what_to_name(run: Run) -> None:
    result = run("lint")
    assert (result.code, result.err.splitlines()[0]) == (2, "error: there is nothing to lint")


def test_an_option_that_only_qualifies_another_is_refused_alone(run: Run) -> None:
    result = run("lint", "timm:test_convnext", "--example", "nowhere:nothing")
    assert (result.code, result.err.splitlines()[0]) == (2, "error: --example does nothing without --loss")
