"""Pictures of receptive fields, with matplotlib (the `demo` extra)."""

from __future__ import annotations

__all__ = ["compare_receptive_fields", "paint", "save_picture"]

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_normkit.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from pl_normkit.receptive_field.field import ReceptiveField


def paint(field: ReceptiveField) -> np.ndarray[Any, Any]:
    """uint8 (H, W, 3): floor(255 v) of (map - min) / (max - min) in matplotlib's plasma."""
    low, high = field.map.min(), field.map.max()
    scaled = (field.map - low) / (high - low) if high > low else field.map * 0
    colours = _matplotlib("matplotlib").colormaps["plasma"](scaled.numpy())
    painted: np.ndarray[Any, Any] = (255 * colours[..., :3]).astype("uint8")
    return painted


def save_picture(field: ReceptiveField, path: Path) -> None:
    image = _matplotlib("matplotlib.image")
    _write(path, lambda: image.imsave(path, paint(field), format="png"))


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
    _matplotlib("matplotlib")
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
    _write(Path(path), lambda: figure.savefig(path, format="png"))


def _write(path: Path, write: Any) -> None:
    try:
        write()
    except OSError as error:
        raise ConfigError(
            "the picture cannot be written",
            where=str(path),
            evidence=error.strerror or str(error),
            mend="name a file in a folder that exists",
        ) from error


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError("pictures need matplotlib", evidence=str(error), mend="pip install 'pl_normkit[demo]'") from error
