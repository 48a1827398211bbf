"""Table, JSON, figure, fits and the ratio of gradients, on numbers chosen by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pl_normkit.errors import ConfigError
from pl_normkit.methods.depth_profile import AdditionProfile, DepthProfile, StuckGradients
from pl_normkit.methods.depth_profile.fits import fit_growth
from pl_normkit.methods.depth_profile.profile import Massive, gradient_ratio

VARIANCES = st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=20)


def row(module: str, variance: float, *, nested: bool = False, gradient: float | None = None) -> AdditionProfile:
    massive = (Massive((0,), 3, 500.0),) if variance > 8.0 else ()
    return AdditionProfile(
        module, "net.py:1", module[:3], "float32", nested, variance, 1.0, 0.5, 0.25, None, 2.0, 1.5, 0.5, massive, gradient, 4
    )


PROFILE = DepthProfile(
    (row("b.0", 2.0, gradient=3.0), row("b.0.in", 99.0, nested=True), row("b.1", 4.0, gradient=1.5), row("b.2", 8.0)), loss=1.25
)


@given(VARIANCES)
def test_the_fits_are_least_squares(variances: list[float]) -> None:
    growth = fit_growth(variances)
    assert growth is not None
    depths = np.arange(1, len(variances) + 1)
    slope, intercept = np.polyfit(depths, variances, 1)
    rate, log_scale = np.polyfit(depths, np.log(variances), 1)
    assert (growth.slope, growth.intercept) == (pytest.approx(slope, abs=1e-6), pytest.approx(intercept, abs=1e-6))
    assert (growth.rate, growth.scale) == (pytest.approx(rate, abs=1e-8), pytest.approx(math.exp(log_scale), rel=1e-6))
    line = intercept + slope * depths
    if line.min() > 1e-6:
        assert growth.linear_error == pytest.approx(float(np.sqrt(np.mean(np.log(line / variances) ** 2))), abs=1e-4)


@pytest.mark.parametrize(
    ("variances", "expected"),
    [([1.0, 2.0, 3.0, 4.0], False), ([1.0, 3.0, 9.0, 27.0], True)],
)
def test_a_line_and_an_exponential_are_told_apart(variances: list[float], expected: bool) -> None:
    growth = fit_growth(variances)
    assert growth is not None
    assert growth.is_exponential is expected


@pytest.mark.parametrize("variances", [[1.0, 2.0], [1.0, 0.0, 2.0], [1.0, math.inf, 2.0], [1.0, math.nan, 2.0]])
def test_what_has_no_logarithm_has_no_fit(variances: list[float]) -> None:
    assert fit_growth(variances) is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("0", 3.0, 5), ("1", 1.0, 5), ("2", 6.0, 5)], 0.5),
        ([("0", 3.0, 1), ("0", 1.0, 3), ("1", 1.0, 1)], math.sqrt(3.0)),
        ([(str(block), float(block + 1), 1) for block in range(8)], 3.0 / 15.0),
        ([("0", 1.0, 1), ("1", None, 0)], None),
        ([("0", 1.0, 1), ("1", 0.0, 1)], math.inf),
    ],
)
def test_the_ratio_compares_quarters_of_blocks(rows: list[tuple[str, float | None, int]], expected: float | None) -> None:
    assert gradient_ratio(rows) == (None if expected is None else pytest.approx(expected))


def test_json_holds_every_row_and_what_follows() -> None:
    read = json.loads(PROFILE.to_json())
    assert [item["variance"] for item in read["additions"]] == [2.0, 99.0, 4.0, 8.0]
    assert read["additions"][1]["massive"] == [{"position": [0], "channel": 3, "value": 500.0}]
    assert (read["gradient_ratio"], read["loss"], read["growth"]["rate"]) == (2.0, 1.25, pytest.approx(math.log(2.0)))


def test_the_table_has_a_line_an_addition_and_the_summary() -> None:
    lines = str(PROFILE).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["b.0", "b.0.in", "b.1", "b.2"]
    assert "angle" not in lines[0]  # nothing was measured
    assert lines[5] == "loss 1.25"
    assert "gradient of the first quarter of the blocks over the last: 2" in lines
    assert "massive activation in b.0.in: 500 at (0,), channel 3" in lines


def test_the_figure_has_a_panel_for_what_was_measured(tmp_path: Path) -> None:
    figure = PROFILE.draw(["variance", "angle", "gradient"])
    assert [axes.get_title() for axes in figure.axes] == ["variance", "gradient"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [2.0, 4.0, 8.0]
    PROFILE.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="did you mean 'variance'"):
        PROFILE.draw(["varianc"])


def test_a_run_is_stuck_by_the_median_of_three_readings() -> None:
    watch = StuckGradients()
    assert [watch.add(ratio) for ratio in (0.01, 0.01, None, math.nan, 0.9, 0.01, 0.9, 0.9)] == [False] * 4 + [True, True, False, False]
    assert watch.value == 0.9
