"""`pl-normkit lint` without a model, on a small repository: all of its models, and what CI systems and hooks run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from pl_normkit.cli import main
from tests.cli.conftest import USER_MODULE, Run

ROOT = Path(__file__).parents[2]
PROJECT = """
[tool.pl-normkit.models.dropped]
model = "samplepkg.models:build"
input = "3,16,16"

[tool.pl-normkit.models.clean]
model = "samplepkg.models:build?drop=0.0"
input = "3,16,16"

[tool.pl-normkit.models.fails]
model = "samplepkg.models:fails"
input = "3,16,16"
"""
WITHOUT_FAILURE = PROJECT.partition("[tool.pl-normkit.models.fails]")[0]


def count_the_repository_alone(patch: pytest.MonkeyPatch) -> None:
    """Not this library, which may be edited while its tests run."""
    patch.delenv("PYTHONPATH", raising=False)
    patch.setattr("pl_normkit.repository._edited_in_place", lambda _: ())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Audited once by two processes; the tests below find that in the cache."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "samplepkg").mkdir()
    (folder / "samplepkg" / "models.py").write_text(USER_MODULE)
    (folder / "pyproject.toml").write_text(WITHOUT_FAILURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        count_the_repository_alone(patch)
        assert main(["lint", "--jobs", "2", "--output", os.devnull]) == 1
    return folder


@pytest.fixture
def here(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as the working directory; nothing but its cache may answer."""
    monkeypatch.chdir(repository)
    count_the_repository_alone(monkeypatch)
    monkeypatch.setattr("pl_normkit.repository.open_workers", None)
    return repository


def modules_of(report: dict[str, Any]) -> list[list[str]]:
    return [[place["module"] for place in finding["places"]] for finding in report["findings"]]


def test_every_model_has_its_report(here: Path, run: Run) -> None:
    result = run("lint", "--format", "json")
    reports = json.loads(result.out)["reports"]
    assert result.code == 1
    assert {report["subject"]: [finding["code"] for finding in report["findings"]] for report in reports} == {
        "dropped": ["NK101"],
        "clean": [],
    }
    assert modules_of(reports[0]) == [["1.drop", "2.drop"]]
    assert {place["source"].partition(":")[0] for place in reports[0]["findings"][0]["places"]} == {"samplepkg/models.py"}


def test_a_folder_below_finds_the_same_project(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here / "samplepkg")
    assert run("lint").code == 1


def test_text_is_a_table_for_each_model(here: Path, run: Run) -> None:
    result = run("lint")
    assert result.code == 1
    assert "pl_normkit: dropped" in result.out
    assert "pl_normkit: clean: nothing to report" in result.out
    assert result.out.count("NK101") > 0


def test_merged_forms_name_the_model(here: Path, run: Run) -> None:
    (sarif_run,) = json.loads(run("lint", "--format", "sarif").out)["runs"]
    names = [location["logicalLocations"][0]["fullyQualifiedName"] for location in sarif_run["results"][0]["locations"]]
    assert names == ["dropped: 1.drop", "dropped: 2.drop"]
    uris = {location["physicalLocation"]["artifactLocation"]["uri"] for location in sarif_run["results"][0]["locations"]}
    assert uris == {"samplepkg/models.py"}
    lines = run("lint", "--format", "github").out.splitlines()
    assert [line.partition("::dropped: ")[2].partition(":")[0] for line in lines] == ["1.drop", "2.drop"]
    suites = ElementTree.fromstring(run("lint", "--format", "junit").out)
    assert [(suite.get("name"), suite.get("failures")) for suite in suites] == [("dropped", "1"), ("clean", "0")]
    assert "dropped: 1.drop" in run("lint", "--format", "html").out


def test_exit_codes(here: Path, run: Run) -> None:
    assert run("lint", "--fail-on", "error").code == 0
    assert run("lint", "--fail-on", "warning").code == 1


def test_a_baseline_for_each_model(here: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "accepted"
    assert run("lint", "--write-baseline", str(folder)).code == 1
    assert sorted(path.name for path in folder.iterdir()) == ["clean.json", "dropped.json"]
    assert run("lint", "--baseline", str(folder)).code == 0
    (folder / "dropped.json").unlink()
    assert run("lint", "--baseline", str(folder)).code == 1
    result = run("lint", "--baseline", str(tmp_path / "none"))
    assert result.code == 2
    assert "names a folder" in result.err


def test_a_model_that_fails_stops_no_other(tmp_path: Path, run: Run) -> None:
    """In new processes; the baseline that its table names counts for `dropped` alone."""
    (tmp_path / "samplepkg").mkdir()
    (tmp_path / "samplepkg" / "models.py").write_text(USER_MODULE)
    again = WITHOUT_FAILURE.partition("[tool.pl-normkit.models.clean]")[0].replace("models.dropped", "models.again")
    own = '[tool.pl-normkit.models.dropped]\nbaseline = "accepted.json"'
    (tmp_path / "pyproject.toml").write_text(PROJECT.replace("[tool.pl-normkit.models.dropped]", own) + again)
    assert run("lint", "samplepkg.models:build", "--input", "3,16,16", "--write-baseline", "accepted.json").code == 1
    result = run("lint", "--format", "json", "--jobs", "1", "--no-cache")
    assert result.code == 2
    reports = json.loads(result.out)["reports"]
    assert {report["subject"]: len(report["findings"]) for report in reports} == {"dropped": 0, "clean": 0, "fails": 0, "again": 1}
    assert "error: fails: " in result.err
    assert "width must be even" in result.err
    assert not (tmp_path / ".pl_normkit_cache").exists()


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        ("", (), "there is nothing to lint"),
        ('[tool.pl-normkit.models.a]\nmodel = "x:y"\ninptu = "3"', (), "the model 'a' cannot be linted: unrecognized arguments: --inptu"),
        ('[tool.pl-normkit.models.a]\nmodel = "x:y"\nformat = "json"', (), "'format' of the model 'a' is about all models"),
        ('[tool.pl-normkit.models.a]\nmodel = "x:y"', ("--input", "3,4,4"), "--input speaks of one model"),
        ('[tool.pl-normkit.models.a]\nmodel = "x:y"', ("--jobs", "0"), "'0' is no number of processes"),
        ('[tool.pl-normkit.models.a]\nmodel = "x:y"', ("--select", "NK999"), "unknown rule 'NK999'"),
        ('[tool.pl-normkit.models.a]\nmodel = "x:y"\nbaseline = "none.json"', (), "the baseline file cannot be read"),
    ],
)
def test_bad_words_are_refused_before_a_process_starts(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, table: str, words: tuple[str, ...], message: str
) -> None:
    count_the_repository_alone(monkeypatch)
    monkeypatch.setattr("pl_normkit.repository.open_workers", None)
    (tmp_path / "pyproject.toml").write_text(table)
    result = run("lint", *words)
    assert result.code == 2
    assert message in result.err


# What CI systems and hooks run.


def shell(script: str, folder: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run by bash as a job would, with this library's command on the path."""
    command = tmp_path / "pl-normkit"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pl_normkit.cli "$@"\n')
    command.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env={**os.environ, **environment, **path}, capture_output=True, text=True, check=False
    )


def test_the_action_annotates(repository: Path, tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    install, lint = action["runs"]["steps"]
    assert install["run"] == 'python -m pip install "$ACTION"'
    defaults = {f"${{{{ inputs.{name} }}}}": settings["default"] for name, settings in action["inputs"].items()}
    environment = {name: defaults[value] for name, value in lint["env"].items()}
    result = shell(lint["run"], repository, tmp_path, **environment)
    assert result.returncode == 1, result.stderr
    assert [line.partition(" ")[0] for line in result.stdout.splitlines()] == ["::warning", "::warning"]
    result = shell(
        lint["run"], repository, tmp_path, **environment | {"OUTPUT": str(tmp_path / "x.xml"), "FORMAT": "junit", "FAIL_ON": "never"}
    )
    assert (result.returncode, result.stdout) == (0, "")
    assert len(ElementTree.parse(tmp_path / "x.xml").getroot()) == 2


def test_the_pre_commit_hook_fails_on_findings(repository: Path, tmp_path: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert (hook["id"], hook["language"], hook["pass_filenames"]) == ("pl-normkit", "system", False)
    result = shell(hook["entry"], repository, tmp_path)
    assert result.returncode == 1, result.stderr
    assert "pl_normkit: dropped" in result.stdout
