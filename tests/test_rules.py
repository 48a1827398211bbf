from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pl_normkit import audit
from pl_normkit import rules as rules_module
from pl_normkit.cli import main
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.findings import Finding, FixSafety, Place, Severity
from pl_normkit.rules import SECTIONS, Mark, Needs, Observation, Rule, Subject, load_rules, rule
from pl_normkit.selection import Selection

ALL_RULES = load_rules()
CODES = pytest.mark.parametrize("known", ALL_RULES.values(), ids=ALL_RULES)


# What every registered rule must be.


@CODES
def test_every_section_is_there_and_says_something(known: Rule) -> None:
    sections = known.sections()
    assert list(sections) == list(SECTIONS)
    assert [title for title, text in sections.items() if len(text.split()) < 2] == []


@CODES
def test_the_code_and_the_name_have_their_form(known: Rule) -> None:
    assert re.fullmatch(r"NK\d{3}", known.code)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", known.name)


@CODES
def test_the_source_section_says_which_mark_it_has(known: Rule) -> None:
    """Published, derived or measured, first of all the mark in the decorator."""
    assert re.match(known.mark.value, known.sections()["Source"], re.IGNORECASE)


@CODES
def test_the_summary_is_one_sentence(known: Rule) -> None:
    assert known.summary.endswith(".")
    assert "\n" not in known.summary


@CODES
def test_a_fix_and_its_safety_come_together(known: Rule) -> None:
    assert (known.fix is None) == (known.fix_safety is FixSafety.DISPLAY)


@CODES
def test_the_source_is_named(known: Rule) -> None:
    assert known.source.strip()


def test_names_are_unique() -> None:
    names = [known.name for known in ALL_RULES.values()]
    assert len(set(names)) == len(names)


def test_a_family_belongs_to_one_room() -> None:
    """The hundreds name the family, the tens a room under `methods`; NK106 speaks of dropout from the pooling room."""
    rooms: dict[str, set[str]] = {}
    for code, known in ALL_RULES.items():
        room = known.check.__module__.removeprefix("pl_normkit.methods.").partition(".")[0]
        rooms.setdefault(code if code == "NK106" else code[:4], set()).add(room)
    assert {family: found for family, found in rooms.items() if len(found) != 1} == {}


def test_rules_come_sorted_by_code() -> None:
    assert list(ALL_RULES) == sorted(ALL_RULES)
    assert "NK101" in ALL_RULES


# The decorator.


def test_the_decorator_registers_what_it_is_given(make_rule: Any) -> None:
    make_rule("NK990", name="some-mistake", mark=Mark.DERIVED, source="x", severity=Severity.ERROR, preview=True)
    known = load_rules()["NK990"]
    assert (known.name, known.mark, known.source, known.severity, known.preview) == ("some-mistake", "derived", "x", "error", True)
    assert (known.fix, known.fix_safety, known.needs) == (None, FixSafety.DISPLAY, {Needs.MODEL})
    assert known.sections() == {title: f"Text of {title}." for title in SECTIONS}


def test_the_decorator_gives_the_function_back() -> None:
    def check(subject: Subject) -> Iterator[Observation]:
        yield from ()

    before = dict(rules_module._registry)
    try:
        assert rule("NK989", "some-mistake", mark=Mark.MEASURED, source="x")(check) is check
        assert rule("NK989", "some-mistake", mark=Mark.MEASURED, source="x")(check) is check  # a reload is no clash
    finally:
        rules_module._registry.clear()
        rules_module._registry.update(before)


@pytest.mark.parametrize("code", ["NK1", "NK1000", "nk101", "101", "", "N1O1", "AB101", "TOOLONGXX101", "NK101 "])
def test_a_malformed_code_is_refused(code: str) -> None:
    with pytest.raises(ConfigError, match="is not a rule code"):
        rule(code, "x", mark=Mark.MEASURED, source="x")


@pytest.mark.parametrize("code", ["NK990", "ABC101", "PREFIXES999"])
def test_own_and_foreign_codes_are_taken(make_rule: Any, code: str) -> None:
    make_rule(code)
    assert load_rules()[code].code == code


def test_one_code_for_two_rules_is_refused_naming_both(make_rule: Any) -> None:
    with pytest.raises(ConfigError, match="NK101 is taken twice") as caught:
        make_rule("NK101")
    assert "dropout_placement" in caught.value.where
    assert "NK101_check" in caught.value.where


def test_an_observation_overrules_severity_and_safety(make_rule: Any) -> None:
    def check(_: Subject) -> Iterator[Observation]:
        yield Observation("a", [Place("x")], "b")
        yield Observation("a", [Place("x")], "b", severity=Severity.ERROR, fix_safety=FixSafety.SAFE, cause="c")

    make_rule("NK990", check)
    found = list(load_rules()["NK990"].judge(Subject()))
    assert [(f.severity, f.fix_safety, f.cause, f.code) for f in found] == [
        ("warning", "display", "", "NK990"),
        ("error", "safe", "c", "NK990"),
    ]


# The subject.


@pytest.mark.parametrize(
    ("subject", "held"),
    [
        (Subject(), set()),
        (Subject(model=nn.Sequential()), {Needs.MODEL}),
        (Subject(loss=torch.zeros(())), {Needs.LOSS}),
        (Subject(optimizers=[torch.optim.SGD([torch.zeros(1)], lr=0.1)]), {Needs.OPTIMIZERS}),
    ],
)
def test_a_subject_knows_what_it_has(subject: Subject, held: set[Needs]) -> None:
    assert {need for need in Needs if subject.has(need)} == held


def test_a_probe_runs_once_per_subject() -> None:
    calls: list[int] = []

    def probe(subject: Subject) -> int:
        calls.append(1)
        return len(calls)

    subject = Subject()
    assert [subject.once(probe), subject.once(probe), Subject().once(probe)] == [1, 1, 2]


# Selection.


@pytest.fixture
def family(make_rule: Any) -> None:
    make_rule("NK990", name="first-mistake")
    make_rule("NK991", name="second-mistake")
    make_rule("NK995", name="contested-mistake", preview=True)


def codes(selection: Selection) -> set[str]:
    return {known.code for known in selection.rules()}


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (["NK990"], {"NK990"}),
        (["first-mistake"], {"NK990"}),
        (["NK99"], {"NK990", "NK991"}),
        (["NK995"], {"NK995"}),
        (["contested-mistake"], {"NK995"}),
        (["NK990", "second-mistake"], {"NK990", "NK991"}),
        ([], set()),
    ],
)
def test_select(select: list[str], expected: set[str]) -> None:
    assert codes(Selection(select)) == expected


@pytest.mark.usefixtures("family")
def test_default_leaves_previews_out_and_all_takes_them_in() -> None:
    default = {code for code, known in load_rules().items() if not known.preview}
    assert codes(Selection()) == codes(Selection(["DEFAULT"])) == default
    assert codes(Selection(["ALL"])) == set(load_rules())
    assert codes(Selection(["DEFAULT", "NK995"])) == default | {"NK995"}


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize(
    ("ignore", "expected"),
    [
        (["NK990"], {"NK991", "NK995"}),
        (["contested-mistake"], {"NK990", "NK991"}),
        (["NK99"], set()),
        (["ALL"], set()),
        ((), {"NK990", "NK991", "NK995"}),
    ],
)
def test_ignore(ignore: list[str], expected: set[str]) -> None:
    assert codes(Selection(["NK99", "NK995"], ignore)) == expected


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("NK110", "NK1"),
        ("dropout-before-batchnorm", "dropout-before-batch-norm"),
        ("nk101", "NK101"),
        ("?", "pl-normkit rules"),
        ("", "pl-normkit rules"),
    ],
)
@pytest.mark.parametrize("option", ["select", "ignore"])
def test_an_unknown_rule_is_refused_naming_the_nearest(option: str, word: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"unknown rule {word!r}")) as caught:
        Selection(**{option: [word]}).rules()
    assert hint in caught.value.fix


@pytest.mark.parametrize(
    "options",
    [
        {"select": "NK101"},
        {"ignore": "NK101"},
        {"per_module_ignore": {"*": "NK101"}},
        {"select": [101]},
        {"ignore": [["NK101"]]},
        {"select": {"NK101"}},
    ],
)
def test_a_bare_string_is_refused_where_a_list_belongs(options: Any) -> None:
    """Its letters would name rules by prefix: `ignore="NK101"` would silence all that starts with N."""
    with pytest.raises(ConfigError, match="given as a list"):
        Selection(**options)


def findings_at(*modules: str, code: str = "NK101") -> list[Finding]:
    return [Finding(code, "n", Severity.WARNING, "m", tuple(map(Place, modules)), (), "a", FixSafety.DISPLAY)]


NAMES = ["", "encoder", "encoder.bn1", "decoder", "decoder.bn1"]


@pytest.mark.parametrize(
    ("per_module_ignore", "left"),
    [
        ({}, ["encoder.bn1", "decoder.bn1"]),
        ({"encoder.*": ["NK101"]}, ["decoder.bn1"]),
        ({"encoder.*": ["NK104"]}, ["encoder.bn1", "decoder.bn1"]),
        ({"encoder.*": ["dropout-before-batch-norm"]}, ["decoder.bn1"]),
        ({"*coder.bn?": ["NK1"]}, None),
        ({"*": ["ALL"]}, None),
        ({"encoder.*": ["NK101"], "decoder.*": ["NK101"]}, None),
    ],
)
def test_per_module_ignore_takes_out_places(per_module_ignore: dict[str, list[str]], left: list[str] | None) -> None:
    kept = Selection(per_module_ignore=per_module_ignore).silence(findings_at("encoder.bn1", "decoder.bn1"), NAMES)
    assert [[place.module for place in finding.places] for finding in kept] == ([] if left is None else [left])


def test_per_module_ignore_leaves_findings_without_places() -> None:
    assert Selection(per_module_ignore={"*": ["ALL"]}).silence(findings_at(), NAMES) == findings_at()


def test_a_pattern_that_matches_nothing_is_refused_naming_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'encodr' matches no module") as caught:
        Selection(per_module_ignore={"encodr": ["NK101"]}).silence([], NAMES)
    assert caught.value.fix == "did you mean 'encoder'?"


def test_a_pattern_with_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown rule 'XX'"):
        Selection(per_module_ignore={"encoder": ["XX"]}).silence([], NAMES)


def test_override_replaces_select_and_adds_ignores() -> None:
    base = Selection(["NK1"], ("NK104",), {"a": ["NK101"], "b": ["NK102"]})
    assert base.override() == base
    given = base.override(["NK101"], ["NK103"], {"a": ["NK103"], "c": ["NK104"]})
    assert given.select == ["NK101"]
    assert given.ignore == ("NK104", "NK103")
    assert given.per_module_ignore == {"a": ["NK101", "NK103"], "b": ["NK102"], "c": ["NK104"]}


# pyproject.toml.


def write_pyproject(folder: Path, text: str) -> Path:
    path = folder / "pyproject.toml"
    path.write_text(text)
    return path


def test_pyproject_is_read(tmp_path: Path) -> None:
    write_pyproject(
        tmp_path,
        '[tool.pl-normkit]\nselect = ["NK1"]\nignore = ["NK104"]\n[tool.pl-normkit.per-module-ignore]\n"encoder.*" = ["NK101"]\n',
    )
    assert Selection.from_pyproject(tmp_path) == Selection(["NK1"], ["NK104"], {"encoder.*": ["NK101"]}, frozenset({"encoder.*"}))


def test_the_nearest_pyproject_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pyproject(tmp_path, '[tool.pl-normkit]\nignore = ["NK104"]\n')
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert Selection.from_pyproject() == Selection(None, ["NK104"])
    write_pyproject(inner, "[tool.other]\nx = 1\n")
    assert Selection.from_pyproject() == Selection()


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ('[tool.pl-normkit]\nignroe = ["NK101"]', "unknown key 'ignroe'", "did you mean 'ignore'?"),
        ("[tool.pl-normkit]\nxyzzy = 1", "unknown key 'xyzzy'", "known keys: select, ignore, per-module-ignore, models"),
        ('[tool.pl-normkit]\nselect = "NK1"', "'select' in [tool.pl-normkit] must be a list", ""),
        ("[tool.pl-normkit]\nper-module-ignore = []", "'per-module-ignore' in [tool.pl-normkit] must be a dict", ""),
        ('[tool.pl-normkit]\nper-module-ignore = {"a" = "NK101"}', "rules are given as a list", '["NK101"]'),
        ("[tool.pl-normkit]\nselect = [1]", "rules are given as a list", '["NK101"]'),
        ("[tool]\npl-normkit = 3", "must be a table", ""),
        ("[tool.pl-normkit", "pyproject.toml cannot be read", ""),
    ],
)
def test_a_wrong_pyproject_is_refused_naming_the_file(tmp_path: Path, text: str, what: str, fix: str) -> None:
    path = write_pyproject(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        Selection.from_pyproject(tmp_path)
    assert what in caught.value.what
    assert str(path) in caught.value.where
    assert fix in caught.value.fix


# Rules of other packages.


def offer_rules(folder: Path, entry_points: str) -> None:
    """Make `folder` look as if a package with these entry points were installed there."""
    info = folder / "foreign-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pl_normkit.rules]\n{entry_points}\n")


WORKING = """
from pl_normkit.rules import Mark, Needs, Observation, rule

@rule("FRN001", "foreign-mistake", mark=Mark.MEASURED, source="a test", needs=(Needs.MODEL,))
def foreign_mistake(subject):
    yield Observation("foreign", [], "nothing")
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_rule: Any) -> Iterator[Path]:
    """A folder on sys.path whose packages may offer rules."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(rules_module, "_failed_entry_points", set())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("foreign_"):
            del sys.modules[name]


def test_rules_of_another_package_are_loaded(foreign: Path) -> None:
    (foreign / "foreign_good.py").write_text(WORKING)
    offer_rules(foreign, "good = foreign_good")
    assert load_rules()["FRN001"].name == "foreign-mistake"
    assert codes(Selection(["FRN"])) == {"FRN001"}


@pytest.mark.parametrize("body", ["import no_such_package", "raise RuntimeError('broken')", "def ("])
def test_a_package_that_fails_gives_one_warning_and_is_left_out(foreign: Path, body: str) -> None:
    (foreign / "foreign_bad.py").write_text(body)
    (foreign / "foreign_good.py").write_text(WORKING)
    offer_rules(foreign, "bad = foreign_bad\ngood = foreign_good")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        first, second = load_rules(), load_rules()
    ours = [str(warning.message) for warning in seen if issubclass(warning.category, NormkitWarning)]
    assert len(ours) == 1
    assert "'bad' (foreign_bad)" in ours[0]
    assert set(first) == set(second) == {*ALL_RULES, "FRN001"}


def test_a_package_that_takes_our_code_is_left_out(foreign: Path) -> None:
    (foreign / "foreign_thief.py").write_text(WORKING.replace("FRN001", "NK101"))
    offer_rules(foreign, "thief = foreign_thief")
    with pytest.warns(NormkitWarning, match="NK101 is taken twice"):
        assert load_rules()["NK101"] == ALL_RULES["NK101"]


def test_a_foreign_rule_without_sections_is_listed_and_reported(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (foreign / "foreign_good.py").write_text(WORKING.replace("    yield", '    """Says hello to every model. And more."""\n    yield'))
    offer_rules(foreign, "good = foreign_good")
    assert main(["rules"]) == 0
    assert "Says hello to every model." in capsys.readouterr().out
    (described,) = json.loads(audit(nn.Identity(), select=["FRN"]).to_sarif())["runs"][0]["tool"]["driver"]["rules"]
    assert described["fullDescription"]["text"] == "Says hello to every model."
