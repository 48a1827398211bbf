"""Several receptive fields in one picture."""

from __future__ import annotations

__all__ = ["compare_receptive_fields"]

import importlib
from collections.abc import Mapping
from pathlib import Path

from pl_normkit.errors import ConfigError
from pl_normkit.receptive_field.field import ReceptiveField
from pl_normkit.receptive_field.picture import matplotlib_module, write_picture


def compare_receptive_fields(fields: Mapping[str, ReceptiveField], path: str | Path) -> None:
    """Write a PNG with several fields side by side, all on one colour scale, each with the circle that holds half of its mass.

    Args:
        fields: title -> field, such as {"before": ..., "after": ...}.
        path: the PNG file.

    Raises:
        ConfigError: without fields, where matplotlib is missing or the file cannot be written.
    """
    if not fields:
        raise ConfigError("there is no receptive field to draw")
    matplotlib_module("matplotlib")
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(4 * len(fields), 4.4), layout="constrained")
    circle = importlib.import_module("matplotlib.patches").Circle
    top = max(float(field.map.max()) for field in fields.values()) or 1.0
    for axes, (title, field) in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields.items(), strict=True):
        axes.imshow((field.map / top).sqrt().numpy(), cmap="plasma", vmin=0, vmax=1)
        radius = field.radius_holding(0.5)
        if radius == radius:  # an empty map has none
            axes.add_patch(circle(field.unit[::-1], radius, fill=False, color="white"))
        axes.set_title(f"{title}: half of the mass within {radius:.0f} px")
        axes.set_axis_off()
    write_picture(Path(path), lambda: figure.savefig(path, format="png"))
