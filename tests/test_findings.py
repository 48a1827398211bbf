from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_normkit.errors import ConfigError
from pl_normkit.findings import Evidence, Finding, FixSafety, Place, Severity, read_baseline, subtract_baseline, write_baseline


def finding(*modules: str, code: str = "NK101", cause: str = "", message: str = "it hurts") -> Finding:
    places = tuple(Place(module, f"net.py:{line}") for line, module in enumerate(modules, start=1))
    return Finding(code, "some-name", Severity.WARNING, message, places, (), "fix it", FixSafety.SAFE, cause)


def test_severities_are_ordered() -> None:
    assert sorted(Severity, key=lambda severity: severity.rank) == [Severity.NOTE, Severity.WARNING, Severity.ERROR]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Place("layer1.bn", "net.py:3"), "layer1.bn (net.py:3)"),
        (Place("layer1.bn"), "layer1.bn"),
        (Place("", "a.py:1"), "(the model) (a.py:1)"),
    ],
)
def test_a_place_reads_as_module_and_source(place: Place, expected: str) -> None:
    assert str(place) == expected


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (Evidence("variance ratio", 0.54617, expected="1"), "variance ratio: 0.5462 (should be 1)"),
        (Evidence("peak memory", 12.0, unit="MiB"), "peak memory: 12 MiB"),
    ],
)
def test_evidence_reads_as_number_unit_and_expectation(evidence: Evidence, expected: str) -> None:
    assert str(evidence) == expected


def test_the_fingerprint_ignores_lines_words_numbers_and_order() -> None:
    before = finding("a", "b")
    moved = replace(
        before,
        message="said differently",
        advice="other advice",
        severity=Severity.ERROR,
        evidence=(Evidence("ratio", 0.5),),
        places=(Place("b", "net.py:90"), Place("a", "elsewhere.py:7")),
    )
    assert moved.fingerprint == before.fingerprint


@pytest.mark.parametrize("other", [finding("a", "c"), finding("a"), finding("a", "b", code="NK102"), finding("a", "b", cause="other")])
def test_the_fingerprint_tells_other_findings_apart(other: Finding) -> None:
    assert other.fingerprint != finding("a", "b").fingerprint


def test_the_fingerprint_of_a_known_finding_never_changes() -> None:
    assert finding("layer1.drop").fingerprint == "5072a6eeee033a504c21"


def test_silence_names_the_code() -> None:
    assert finding("a").silence == 'ignore=["NK101"]'


def test_a_baseline_takes_out_accepted_places_and_keeps_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(path, [finding("a", "b"), finding("a", code="NK104")])
    later = [finding("b", "c", "a"), finding("a", code="NK104"), finding("a", code="NK102")]
    left = subtract_baseline(later, read_baseline(path))
    assert [(kept.code, [place.module for place in kept.places]) for kept in left] == [("NK101", ["c"]), ("NK102", ["a"])]


def test_a_baseline_holds_when_lines_move(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(path, [finding("a")])
    moved = replace(finding("a"), places=(Place("a", "net.py:900"),), message="2 of them")
    assert subtract_baseline([moved], read_baseline(path)) == []


def test_a_baseline_accepts_a_finding_without_places(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(path, [finding()])
    accepted = read_baseline(path)
    assert subtract_baseline([finding()], accepted) == []
    assert subtract_baseline([finding(cause="new")], accepted) == [finding(cause="new")]


def test_the_baseline_file_does_not_depend_on_the_order_of_findings(tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    write_baseline(first, [finding("a", "b"), finding("c", code="NK104")])
    write_baseline(second, [finding("c", code="NK104"), finding("b", "a")])
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize(
    "content", [None, "no json", "[1, 2]", "{}", '{"accepted": 3}', '{"accepted": "NK101"}', '{"accepted": [[1]]}', b"\xff\xfe"]
)
def test_a_file_that_is_no_baseline_is_refused_by_name(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "baseline.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_baseline(path)
    assert caught.value.where == str(path)
    assert caught.value.evidence
    assert "--write-baseline" in caught.value.fix


modules = st.lists(st.sampled_from(["a", "a.b", "a.c", "d"]), max_size=4, unique=True)
findings_lists = st.lists(
    st.builds(
        lambda m, code, cause: finding(*m, code=code, cause=cause), modules, st.sampled_from(["NK101", "NK102"]), st.sampled_from(["", "x"])
    ),
    max_size=4,
)


def keys(findings: list[Finding]) -> set[tuple[str, str, str]]:
    return {(found.code, found.cause, place.module) for found in findings for place in found.places or (Place(""),)}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(accepted=findings_lists, later=findings_lists)
def test_what_a_baseline_leaves_is_exactly_what_it_does_not_hold(
    accepted: list[Finding], later: list[Finding], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("baseline") / "b.json"
    write_baseline(path, accepted)
    left = subtract_baseline(later, read_baseline(path))
    assert keys(left) == keys(later) - keys(accepted)
