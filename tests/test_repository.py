"""Linting all models of a repository: the table, parallel processes, the cache, and where findings are placed."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.findings import Evidence, Finding, FixSafety, Note, Place, Severity
from pl_normkit.report import Report
from pl_normkit.report.json_format import from_json
from pl_normkit.report.junit import to_junit
from pl_normkit.repository import Entry, _state, lint_repository, read_entries, within_repository

TABLE = """
[tool.pl-normkit]
ignore = ["NK104"]

[tool.pl-normkit.models.classifier]
model = "timm:resnet18"  # with two options
input = ["3,64,64", "3,32,32"]
optimizer = "torch.optim.AdamW(lr=1e-3)"
real = true

[tool.pl-normkit.models."my loss"]
loss = "pkg.losses:silog"
"""


def finding(*places: Place) -> Finding:
    evidence = (Evidence("ratio", float("inf"), "1"),)
    return Finding("NK101", "a-name", Severity.WARNING, "It shifts", places, evidence, "Move it", FixSafety.SAFE, "cause")


def lint(words: Sequence[str]) -> Report:
    """Stands for the command: says which words and which process."""
    if words[0] == "die":
        os._exit(3)
    if words[0] == "refuse":
        raise ConfigError("no such model")
    if words[0] == "break":
        raise ValueError("broken")
    return Report([finding(Place("layer", "pkg/net.py:3"))], " ".join(words), about={"process": str(os.getpid())})


def entry(name: str, *words: str) -> Entry:
    return Entry(name, words or (name,), "pyproject.toml:5")


def test_the_table_becomes_words_of_lint(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(TABLE)
    assert read_entries(tmp_path / "pyproject.toml") == [
        Entry(
            "classifier",
            ("timm:resnet18", "--input=3,64,64", "--input=3,32,32", "--optimizer=torch.optim.AdamW(lr=1e-3)", "--real"),
            "pyproject.toml:5",
        ),
        Entry("my loss", ("--loss=pkg.losses:silog",), "pyproject.toml:11"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tool = 3", "pyproject.toml cannot be read"),
        ("[tool.pl-normkit]\nmodels = 3", "one table a model"),
        ("[tool.pl-normkit.models]\na = 3", "one table a model"),
        ("[tool.pl-normkit.models.a]\ninput = '3'", "names no model"),
        ("[tool.pl-normkit.models.a]\nmodel = 'x:y'\ninput = {a = 1}", "is no text"),
        ("= =", "cannot be read"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_entries(tmp_path / "pyproject.toml")


def test_models_are_linted_in_other_processes_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    seen: list[str] = []
    entries = [entry("a"), entry("refuse"), entry("break"), entry("b")]
    reports = lint_repository(entries, lint, tmp_path, jobs=2, done=lambda found: seen.append(found.name))
    assert list(reports) == ["a", "refuse", "break", "b"]
    assert {name: len(report.findings) for name, report in reports.items()} == {"a": 1, "refuse": 0, "break": 0, "b": 1}
    assert [str(note) for name in ("refuse", "break") for note in reports[name].notes] == [
        "no such model",
        "the audit failed: ValueError: broken",
    ]
    assert reports["a"].about["process"] != str(os.getpid())
    assert sorted(seen) == ["a", "b", "break", "refuse"]


def test_the_cache_holds_until_something_changes(tmp_path: Path) -> None:
    """Same process numbers mean that the earlier report was taken."""
    source = tmp_path / "net.py"
    source.write_text("a = 1")
    cache = tmp_path / ".cache"

    def process() -> str:
        return lint_repository([entry("a")], lint, tmp_path, jobs=1, cache=cache)["a"].about["process"]

    first = process()
    assert process() == first
    source.write_text("a = 2")
    second = process()
    assert second != first
    for file in cache.iterdir():
        file.write_text(file.read_text()[:-40])
    assert process() not in (first, second)


def test_what_failed_is_not_cached(tmp_path: Path) -> None:
    lint_repository([entry("refuse")], lint, tmp_path, jobs=1, cache=tmp_path / ".cache")
    assert not (tmp_path / ".cache").exists()


def test_a_process_that_dies_is_a_note_of_its_own_model(tmp_path: Path) -> None:
    reports = lint_repository([entry("die"), entry("a")], lint, tmp_path, jobs=1)
    assert "the process ended abruptly (exit code 3)" in str(reports["die"].notes[0])
    assert (len(reports["a"].findings), list(reports["a"].notes)) == (1, [])


def test_places_lie_in_the_repository(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/net.py").write_text("")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/lib.py").write_text("")
    places = [Place("a", "pkg/net.py:3"), Place("b", f"{tmp_path}/pkg/net.py:4"), Place("c", "timm/resnet.py:7"), Place("d", "")]
    places.append(Place("e", f"{tmp_path}/.venv/lib.py:2"))
    moved = within_repository(Report([finding(*places)]), tmp_path, entry("m")).findings[0].places
    assert moved == (
        Place("a", "pkg/net.py:3"),
        Place("b", "pkg/net.py:4"),
        Place("c", "pyproject.toml:5", "timm/resnet.py:7"),
        Place("d", "pyproject.toml:5"),
        Place("e", "pyproject.toml:5", f"{tmp_path}/.venv/lib.py:2"),
    )


def test_a_report_comes_back_from_json() -> None:
    report = Report([finding(Place("a", "b:1", "c:2"))], "net", [Note("x")], ["moved"], about={"inputs": "(2,)"})
    assert from_json(report.to_json()) == report
    with pytest.raises(DataError, match="no report"):
        from_json(report.to_json().replace('"version": 2', '"version": 1'))
    with pytest.raises(DataError, match="no report"):
        from_json("[]")


def test_junit_counts_findings_and_failures() -> None:
    broken = Report([finding(Place("a"))], "net\x00", [Note("it failed")])
    root = ElementTree.fromstring(to_junit([broken, Report([], "clean")]))
    suites = [(suite.get("name"), suite.get("tests"), suite.get("failures"), suite.get("errors")) for suite in root]
    assert suites == [("net\ufffd", "2", "1", "1"), ("clean", "1", "0", "0")]
    assert [[child.tag for child in case] for case in root.iter("testcase")] == [["failure"], ["error"], []]


def test_code_outside_of_the_repository_that_needs_no_new_version_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package installed with `pip install -e`, and a folder of PYTHONPATH."""
    root, edited, on_path = tmp_path / "repo", tmp_path / "edited in place", tmp_path / "path"
    for folder in (root, edited, on_path, tmp_path / "site/own-1.dist-info"):
        folder.mkdir(parents=True)
    (tmp_path / "site/own-1.dist-info/METADATA").write_text("Name: own\nVersion: 1\n")
    record = {"url": edited.as_uri(), "dir_info": {"editable": True}}
    (tmp_path / "site/own-1.dist-info/direct_url.json").write_text(json.dumps(record))
    found = list(importlib.metadata.distributions(path=[str(tmp_path / "site")]))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    monkeypatch.setenv("PYTHONPATH", str(on_path))
    states = [_state(root)]
    for folder in (edited, on_path, root):
        (folder / "net.py").write_text("a = 1")
        states.append(_state(root))
    (edited / "notes.txt").write_text("no source")
    assert len(set(states)) == 4
    assert _state(root) == states[-1]
