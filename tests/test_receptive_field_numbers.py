"""Numbers and pictures of a receptive field that is known."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.receptive_field import ReceptiveField, compare_receptive_fields, effective_receptive_field
from tests.receptive_field_maps import images

# Numbers read from a map.


def gaussian(size: tuple[int, int], y: float, x: float, sy: float, sx: float, angle: float = 0.0) -> Tensor:
    dy, dx = torch.arange(size[0]).double()[:, None] - y, torch.arange(size[1]).double() - x
    along, across = dy * math.cos(angle) + dx * math.sin(angle), dx * math.cos(angle) - dy * math.sin(angle)
    bell = torch.exp(-((along / sy) ** 2 + (across / sx) ** 2) / 2)
    return bell / bell.sum()


def field_of(surface: Tensor) -> ReceptiveField:
    height, width = surface.shape
    return ReceptiveField(surface, "", (height, width), (height // 2, width // 2), 1)


@settings(max_examples=15, deadline=None)
@given(st.floats(25, 38), st.floats(25, 38), st.floats(1.5, 8), st.floats(1.5, 8))
def test_the_fit_finds_a_gaussian(y: float, x: float, sy: float, sx: float) -> None:
    fit = field_of(gaussian((64, 64), y, x, sy, sx)).fit_gaussian()
    assert (fit.amplitude, fit.y, fit.x, fit.sigma_y, fit.sigma_x, fit.r2) == pytest.approx((1, y, x, sy, sx, 1), rel=1e-3)


def test_the_fit_is_scipys_where_the_map_is_no_gaussian() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    surface = 0.7 * gaussian((48, 64), 20, 30, 3, 5) + 0.3 * gaussian((48, 64), 26, 36, 9, 7) + 1e-5 * torch.rand(48, 64)
    fit = field_of(surface).fit_gaussian()
    ys, xs = (axis.numpy() for axis in torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij"))
    data = (surface / surface.max()).numpy()

    def residual(p: Any) -> Any:
        import numpy as np

        return (p[0] * np.exp(-((ys - p[1]) ** 2 / (2 * p[3] ** 2) + (xs - p[2]) ** 2 / (2 * p[4] ** 2))) - data).ravel()

    best = optimize.least_squares(residual, [1, 20, 30, 3, 5], xtol=1e-12, ftol=1e-12)
    assert (fit.y, fit.x, fit.sigma_y, fit.sigma_x) == pytest.approx(tuple(best.x[1:]), rel=1e-4)
    assert fit.r2 == pytest.approx(1 - residual(best.x).var() / data.var(), abs=1e-6)
    assert 0.8 < fit.r2 < 0.999


def test_there_is_no_fit_for_a_flat_map() -> None:
    with pytest.raises(DataError, match="the map is constant"):
        field_of(torch.full((4, 4), 1 / 16, dtype=torch.float64)).fit_gaussian()


def test_radii_areas_and_axes_of_a_known_map() -> None:
    """Of a round Gaussian half of the mass lies within sigma sqrt(2 ln 2), 90 % within sigma sqrt(2 ln 10)."""
    field = field_of(gaussian((129, 129), 64, 64, 10, 10))
    assert field.radius_holding(0.5) == pytest.approx(10 * math.sqrt(2 * math.log(2)), abs=0.3)
    assert field.radius_holding(0.9) == pytest.approx(10 * math.sqrt(2 * math.log(10)), abs=0.3)
    assert field.area_share(0.9) == pytest.approx(math.pi * 200 * math.log(10) / 129**2, rel=0.02)
    assert field.mass_within(20) == pytest.approx(1 - math.exp(-2), abs=0.01)
    assert field.mass_within(20, centre=(0, 0)) == pytest.approx(0, abs=1e-9)
    assert field.centre_of_mass == pytest.approx((64, 64))
    assert field.anisotropy == pytest.approx(1)
    tilted = field_of(gaussian((129, 129), 64, 64, 12, 4, angle=0.6))
    assert (tilted.spread, tilted.anisotropy) == (pytest.approx((12, 4), rel=1e-3), pytest.approx(3, rel=1e-3))
    assert field_of(torch.eye(9).double() / 9).anisotropy > 1e6
    assert field.radius_holding(1.0) <= 64 * math.sqrt(2) + 1
    for share in (0, 1.5, -1):
        with pytest.raises(ConfigError):
            field.radius_holding(share)
        with pytest.raises(ConfigError):
            field.area_share(share)


def test_metrics_are_plain_numbers() -> None:
    import json

    metrics = field_of(gaussian((32, 32), 15, 15, 3, 3)).metrics()
    assert json.loads(json.dumps(metrics))["Gaussian r^2"] == pytest.approx(1)
    assert list(metrics["mass within radius"]) == [5, 10, 20, 30, 40, 60, 80]


# Pictures.


def test_the_picture_is_openerfs(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    field = field_of(gaussian((16, 24), 8, 12, 3, 3))
    painted = field.picture()
    scaled = (field.map - field.map.min()) / (field.map.max() - field.map.min())
    expected = (255 * matplotlib.colormaps["plasma"](scaled.numpy())[..., :3]).astype("uint8")
    assert (painted.shape, painted.dtype.name, (painted == expected).all()) == ((16, 24, 3), "uint8", True)
    field.save(tmp_path / "erf.png")
    assert (torch.from_numpy(imread(tmp_path / "erf.png")[..., :3]) * 255).round().int().tolist() == expected.tolist()
    compare_receptive_fields({"before": field, "after": field_of(torch.zeros(16, 24).double())}, tmp_path / "both.png")
    assert imread(tmp_path / "both.png").shape[1] > 600
    with pytest.raises(ConfigError, match="the picture cannot be written"):
        field.save(tmp_path / "missing" / "erf.png")
    with pytest.raises(ConfigError, match="no receptive field to draw"):
        compare_receptive_fields({}, tmp_path / "none.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pl_normkit\[demo\]"):
        field_of(gaussian((8, 8), 4, 4, 1, 1)).picture()


def test_containers_of_outputs() -> None:
    """The first 4-D tensor of more than one cell counts, wherever it stands."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Any:
            return OrderedDict(scores=x.mean((2, 3)), pooled=x.mean((2, 3), keepdim=True), out=[self.conv(x)])

    field = effective_receptive_field(Wrapped(), images(1, (9, 9)), gradient="absolute")
    assert (field.layer, field.map.count_nonzero()) == ("", 9)
