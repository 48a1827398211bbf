"""Every mistake is named by its rule and no other of the room; every clean twin is left alone."""

from __future__ import annotations

import pytest

from tests.methods.wiring.clean import CLEAN
from tests.methods.wiring.mistakes import MISTAKES


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_mistake_is_named_once(name: str) -> None:
    rule, build = MISTAKES[name]
    report = build().report()
    assert ([finding.name for finding in report.findings], report.notes) == ([rule], [])


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_twin_is_left_alone(name: str) -> None:
    report = CLEAN[name]().report()
    assert ([str(finding) for finding in report.findings], report.notes) == ([], [])
