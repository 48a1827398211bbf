"""Pictures of maps, with matplotlib (the `demo` extra)."""

from __future__ import annotations

__all__ = ["matplotlib_module", "paint", "save_picture", "write_picture"]

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pl_normkit.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np


def paint(values: Tensor) -> np.ndarray[Any, Any]:
    """uint8 (H, W, 3): floor(255 v) of (values - min) / (max - min) in matplotlib's plasma."""
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else values * 0
    colours = matplotlib_module("matplotlib").colormaps["plasma"](scaled.numpy())
    painted: np.ndarray[Any, Any] = (255 * colours[..., :3]).astype("uint8")
    return painted


def save_picture(values: Tensor, path: Path) -> None:
    """Write what `paint` gives as a PNG. Raises ConfigError."""
    image = matplotlib_module("matplotlib.image")
    write_picture(path, lambda: image.imsave(path, paint(values), format="png"))


def write_picture(path: Path, write: Callable[[], Any]) -> None:
    """Call `write`. Raises ConfigError where the file cannot be written."""
    try:
        write()
    except OSError as error:
        raise ConfigError(
            "the picture cannot be written",
            where=str(path),
            evidence=error.strerror or str(error),
            fix="name a file in a folder that exists",
        ) from error


def matplotlib_module(module: str) -> Any:
    """The module of that name. Raises ConfigError where matplotlib is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError("pictures need matplotlib", evidence=str(error), fix="pip install 'pl_normkit[demo]'") from error
