"""Two processes on CPU with gloo, whose images differ: one ratio for the run, one warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.callbacks.processes import run_on_two_ranks


def test_ranks_add_up_and_one_warns(tmp_path: Path) -> None:
    found = run_on_two_ranks("positional_ranks", tmp_path)
    assert found[0]["rho"] == found[1]["rho"] == pytest.approx((0.25 + 1.0) / 2, abs=0.06)
    assert [rank["warnings"] for rank in found] == [1, 0]
