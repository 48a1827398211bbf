"""Two processes on CPU with gloo, whose samples differ: one profile for the run, one placement in every network."""

from __future__ import annotations

from typing import Any

import pytest

from tests.callbacks.processes import run_on_two_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_two_ranks("depth_ranks", tmp_path_factory.mktemp("ranks"))


def test_logged_numbers_are_those_of_both_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["profile"] for rank in ranks)
    own = [rank["own"] for rank in (first, second)]
    expected = {f"depth/{name}": pytest.approx((own[0][name] + own[1][name]) / 2, rel=1e-5) for name in own[0] if name != "largest"}
    expected["depth/largest"] = pytest.approx(max(own[0]["largest"], own[1]["largest"]), rel=1e-5)

    assert first["logged"] == second["logged"]
    assert [len(found) for found in first["logged"]] == [5, 6]
    assert {name: first["logged"][-1][name] for name in expected} == expected
    assert own[1]["variance_first"] > 2 * own[0]["variance_first"]


def test_the_same_norms_are_placed_and_trained_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["placement"] for rank in ranks)

    assert first["made"] == second["made"] > 0
    assert first["norms"] == second["norms"]
    assert len(first["norms"]) == 4 * 4
    assert first["weights"] == second["weights"]
