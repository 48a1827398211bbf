"""Two processes on CPU with gloo, whose crops differ: rank zero's counts."""

from __future__ import annotations

from pathlib import Path

from tests.callbacks.processes import run_on_two_ranks


def test_every_rank_gets_the_rates_of_rank_zero(tmp_path: Path) -> None:
    expected = {"samples": [2, 4, 6], "first call": [2, 4, 6]}
    assert run_on_two_ranks("atrous_ranks", tmp_path) == [expected, expected]
