from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pl_normkit import __version__
from pl_normkit.cli import main
from pl_normkit.rules import SECTIONS, load_rules

USER_MODULE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return x + self.conv2(self.bn2(self.drop(self.conv1(self.bn1(x).relu()))).relu())


def build(drop=0.3):
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(drop), Block(drop))


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


def fails():
    raise ValueError("width must be even")


def gives_nothing():
    return None
"""
LINT = ("lint", "userpkg.models:build", "--input", "3,8,8")
CLEAN = ("lint", "userpkg.models:build?drop=0.0", "--input", "3,8,8")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "userpkg").mkdir()
    (tmp_path / "userpkg" / "models.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "userpkg"]:
        del sys.modules[name]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_main(*words: str) -> Result:
        try:
            code = main(words)
        except SystemExit as stop:  # argparse's own way out
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return run_main


# Linting.


def test_a_clean_model_is_quiet_and_gives_0(run: Run) -> None:
    assert run(*CLEAN) == (0, "pl_normkit: userpkg.models:build?drop=0.0: nothing to report\n", "")


def test_findings_give_1(run: Run) -> None:
    result = run(*LINT)
    assert (result.code, result.err) == (1, "")
    for part in ("NK101", "1.drop", "2.drop", 'silence: ignore=["NK101"]', "`pl-normkit explain NK101` says why."):
        assert part in result.out


@pytest.mark.parametrize(("fail_on", "code"), [("note", 1), ("warning", 1), ("error", 0), ("never", 0)])
def test_fail_on_sets_the_lowest_severity_that_counts(run: Run, fail_on: str, code: int) -> None:
    result = run(*LINT, "--fail-on", fail_on)
    assert (result.code, "NK101" in result.out) == (code, True)


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        (("--ignore", "NK101"), []),
        (("--ignore", "NK104, dropout-before-batch-norm"), []),
        (("--select", "NK104,NK102"), []),
        (("--select", "NK1"), ["NK101"]),
        (("--per-module-ignore", "1.*:NK101"), ["NK101"]),
        (("--per-module-ignore", "1.*:NK101", "--per-module-ignore", "2.*:NK1,NK2"), None),
        (("--per-module-ignore", "*:ALL"), []),
    ],
)
def test_selection_and_silence(run: Run, options: tuple[str, ...], codes: list[str] | None) -> None:
    result = run(*LINT, "--format", "json", *options)
    if codes is None:
        assert (result.code, "unknown rule 'NK2'" in result.err) in {(2, True), (0, False)}  # NK2 exists where that room does
    else:
        found = json.loads(result.out)["findings"]
        assert (result.code, [one["code"] for one in found]) == (bool(codes), codes)


def test_per_module_ignore_takes_out_one_place(run: Run) -> None:
    result = run(*LINT, "--format", "json", "--per-module-ignore", "1.*:NK101")
    assert [place["module"] for place in json.loads(result.out)["findings"][0]["places"]] == ["2.drop"]


def test_pyproject_in_the_working_directory_is_read(run: Run, working_directory: Path) -> None:
    (working_directory / "pyproject.toml").write_text('[tool.pl-normkit]\nignore = ["NK101"]\n')
    assert run(*LINT).code == 0


@pytest.mark.parametrize(
    ("form", "start"),
    [("json", "{"), ("sarif", '{\n  "$schema"'), ("github", "::warning file="), ("html", "<!DOCTYPE html>"), ("text", "pl_normkit")],
)
def test_every_format_goes_to_the_screen_or_to_a_file(run: Run, working_directory: Path, form: str, start: str) -> None:
    printed = run(*LINT, "--format", form)
    assert (printed.code, printed.out[: len(start)]) == (1, start)
    written = run(*LINT, "--format", form, "--output", "report")
    assert written == (1, "", "")
    assert (working_directory / "report").read_text() == printed.out


def test_real_weights_carry_measurements(run: Run) -> None:
    evidence = {
        real: json.loads(run(*LINT, "--format", "json", *(["--real"] if real else [])).out)["findings"][0]["evidence"]
        for real in (True, False)
    }
    assert ([item["what"] for item in evidence[True]], evidence[False]) == (["variance of the input of 1.bn2, eval over train"], [])
    assert 0.3 < evidence[True][0]["value"] < 1


def test_a_baseline_accepts_todays_findings_and_shows_new_ones(run: Run, working_directory: Path) -> None:
    first = run(*LINT, "--write-baseline", "accepted.json")
    assert (first.code, "NK101" in first.out) == (1, True)
    assert run(*LINT, "--baseline", "accepted.json").code == 0
    models = working_directory / "userpkg" / "models.py"
    models.write_text("# a line above\n" + models.read_text().replace("Block(drop), Block(drop)", "Block(drop), Block(drop), Block(drop)"))
    for name in ("userpkg.models", "userpkg"):
        del sys.modules[name]
    importlib.invalidate_caches()
    later = run(*LINT, "--baseline", "accepted.json", "--format", "json")
    assert [place["module"] for found in json.loads(later.out)["findings"] for place in found["places"]] == ["3.drop"]


def test_a_rule_that_fails_gives_2_with_the_other_findings(run: Run, make_rule: Any) -> None:
    def check(_: Any) -> Any:
        raise RuntimeError("the rule broke")

    make_rule("NK990", check)
    result = run(*LINT, "--format", "json")
    document = json.loads(result.out)
    assert (result.code, [found["code"] for found in document["findings"]], len(document["notes"])) == (2, ["NK101"], 1)


# Bad input: exit code 2, one message that names what, where and how to mend it, a traceback only with --debug.

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
        "check the input shapes",
    ),
    "wrong dtype": (
        ("lint", "userpkg.models:build", "--input", "3,8,8:int64"),
        "with inputs (2, 3, 8, 8) torch.int64",
        "check the input shapes",
    ),
    "not exportable": (("lint", "userpkg.models:Branching", "--input", "3"), "userpkg/models.py:23", "data-dependent control flow"),
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
    "no recipe named": (("run",), "there is no recipe ''", "segmentation"),
}


@pytest.mark.parametrize(("words", "what", "mend"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gives_one_error_and_2(run: Run, words: tuple[str, ...], what: str, mend: str) -> None:
    result = run(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("error: ") == 1
    assert what in result.err
    assert mend in result.err.partition("  mend: ")[2]
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

    monkeypatch.setattr(importlib.import_module("pl_normkit.auditing"), "audit_subject", audit_subject)
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
