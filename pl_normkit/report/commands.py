"""`pl-normkit report`: draws what callbacks recorded in a run."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from pathlib import Path

from pl_normkit.commands import command, run_drawing, run_drawings
from pl_normkit.errors import ConfigError, DataError
from pl_normkit.importing import users_code
from pl_normkit.report.block_curves import plot_block_curves, read_block_curves

LOGGED = "metrics.csv"


@command(
    "report",
    "draw what callbacks recorded in a run: the scales of norms by role (GammaDecay), the health of its blocks (GradientHealth)",
    {
        "folder": {"type": Path, "help": "log folder of the run, such as lightning_logs/version_0"},
        "--out": {"type": Path, "metavar": "FOLDER", "help": "where the pictures go (default: the log folder)"},
    },
)
def _report(options: argparse.Namespace) -> int:
    out = options.out or options.folder
    with users_code("the pictures cannot be written", where=str(out), fix="name a folder that can be written to", kind=ConfigError):
        lines = [line for draw in run_drawings() for line in draw(options.folder, out)]
    if not lines:
        fix = "name the log folder of a run with GammaDecay, or with GradientHealth and a CSVLogger"
        raise DataError("nothing was recorded that could be drawn", where=str(options.folder), fix=fix)
    print("\n".join(lines))  # noqa: T201
    return 0


@run_drawing
def _draw_block_curves(folder: Path, out: Path) -> list[str]:
    """Gradient norm, update-to-weight ratio and share of dead units of each block over the steps, which GradientHealth logged."""
    curves = read_block_curves(folder / LOGGED) if (folder / LOGGED).exists() else {}
    if not curves:
        return []
    picture = out / "block_health.png"
    plot_block_curves(curves, picture)
    return [*(f"{measure}: {len(blocks)} blocks" for measure, blocks in curves.items()), str(picture)]
