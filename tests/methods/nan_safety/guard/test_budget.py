"""How many steps may be skipped, and what a spike is."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_normkit.methods.nan_safety.guard.budget import SkipBudget, SpikeWatch


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.booleans(), max_size=60), st.integers(0, 4), st.integers(0, 10))
def test_the_budget_counts_rows_and_totals(skips: list[bool], in_a_row: int, per_1000: int) -> None:
    budget = SkipBudget(in_a_row, per_1000)
    for skipped in skips:
        budget.count(skipped=skipped)
    row = len(skips) - max((i + 1 for i, skipped in enumerate(skips) if not skipped), default=0)
    assert (budget.row, budget.skips, budget.steps) == (row, sum(skips), len(skips))
    assert bool(budget.exceeded()) == (row > in_a_row or sum(skips) > per_1000)


def test_the_budget_forgets_after_1000_steps() -> None:
    budget = SkipBudget(per_1000=0)
    budget.count(skipped=True)
    for _ in range(999):
        budget.count(skipped=False)
    assert "1,000" in budget.exceeded()
    budget.count(skipped=False)
    assert budget.exceeded() == ""


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=150), st.floats(1.5, 10.0))
def test_a_spike_is_above_the_factor_times_the_median_of_the_last_hundred(norms: list[float], factor: float) -> None:
    watch, other = SpikeWatch(factor), SpikeWatch(factor)
    for index, norm in enumerate(norms):
        past = norms[max(0, index - 100) : index]
        assert watch.is_spike(0, norm) == (len(past) >= 10 and norm > factor * statistics.median(past))
        other.load_state_dict(watch.state_dict())
        assert other.norms == watch.norms


def test_a_lasting_rise_becomes_normal_and_optimizers_are_apart() -> None:
    watch = SpikeWatch(3.0)
    assert not any(watch.is_spike(0, 1.0) for _ in range(100))
    spikes = [watch.is_spike(0, 10.0) for _ in range(60)]
    assert spikes == [True] * 50 + [False] * 10
    assert not watch.is_spike(1, 10.0)
    assert watch.median(0) == pytest.approx(10.0)
    assert not SpikeWatch(None).is_spike(0, 1e9)
