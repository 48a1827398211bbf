"""Numbers of blocks over the steps of a run, as loggers kept them: read from a CSV, drawn as lines."""

from __future__ import annotations

__all__ = ["BlockCurves", "plot_block_curves", "read_block_curves"]

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from pl_normkit.errors import DataError

BlockCurves = dict[str, dict[str, list[tuple[int, float]]]]
"""Measure -> block -> (step, value) pairs."""

_PREFIX = "normkit/"
_MOST_NAMED = 12


def read_block_curves(path: Path) -> BlockCurves:
    """What was logged as `normkit/MEASURE/BLOCK`, from a CSVLogger's metrics.csv; blocks in the order of its columns.

    Raises DataError where it is no such file.
    """
    found: BlockCurves = defaultdict(lambda: defaultdict(list))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name.startswith(_PREFIX) and name.count("/") > 1 and value:
                        measure, _, block = name.removeprefix(_PREFIX).partition("/")
                        found[measure][block].append((int(row["step"]), float(value)))
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        seen = f"{type(error).__name__}: {error}"
        raise DataError("the log cannot be read", where=str(path), evidence=seen, fix="name a run's folder by CSVLogger") from error
    return {measure: dict(blocks) for measure, blocks in found.items()}


def plot_block_curves(curves: Mapping[str, Mapping[str, list[tuple[int, float]]]], path: Path) -> None:
    """A panel for each measure and a line for each block, early blocks dark, late ones bright, written to `path` (PNG).

    Raises ImportError without matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (measure, blocks) in enumerate(curves.items()):
        axes = figure.add_subplot(len(curves), 1, panel + 1)
        colors = colormaps["viridis"].resampled(len(blocks))
        for index, (block, points) in enumerate(blocks.items()):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker=".", color=colors(index), label=block)
        axes.set_title(f"{measure.replace('_', ' ')} of {len(blocks)} blocks")
        axes.set_xlabel("optimizer step")
        if all(value > 0 for points in blocks.values() for _, value in points):
            axes.set_yscale("log")
        if len(blocks) <= _MOST_NAMED:
            axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
