from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

LINT = ("lint", "userpkg.models:build", "--input", "3,8,8")
CLEAN = ("lint", "userpkg.models:build?drop=0.0", "--input", "3,8,8")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


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


def test_the_page_says_what_was_read_and_maps_it(run: Run) -> None:
    page = run(*LINT, "--format", "html").out
    parts = ["(2, 3, 8, 8) torch.float32", "Map of the network", 'circle class="found"', "from pl_normkit import place_dropout"]
    assert [part for part in parts if part not in page] == []
    assert page.count('class="meant"') == 1  # both blocks run the same line


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


def test_probes_are_measured_and_drawn(run: Run) -> None:
    """By name or all; one that has nothing to measure is a note that fails nothing."""
    result = run("lint", "userpkg.models:build", "--input", "3,16,16", "--real", "--probe", "ALL", "--format", "json")
    report = json.loads(result.out)
    assert result.code == 1
    assert set(report["curves"]["Variance that a norm sees, eval over train mode"]) == {"1.bn1", "1.bn2", "2.bn1", "2.bn2"}
    assert any(title.startswith("Scale of the norms by role: ") for title in report["curves"])
    assert "the probe time_awareness measured nothing" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--real", "--probe", "variance_shifts"), "did you mean 'variance_shift'"),
        (("--probe", "variance_shift"), "give --real"),
    ],
)
def test_probes_that_cannot_be_measured(run: Run, words: tuple[str, ...], message: str) -> None:
    result = run("lint", "userpkg.models:build", "--input", "3,16,16", *words)
    assert (result.code, message in result.err) == (2, True)
