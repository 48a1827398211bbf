"""What upsampled maps are judged by, and the table of methods."""

from __future__ import annotations

__all__ = ["BORDER", "ScoreTable", "rmse", "wrong_share"]

import math
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

BORDER = 6
"""Pixels at each side that do not count, as in the published evaluations."""


def rmse(found: Tensor, truth: Tensor) -> float:
    """Root of the mean square over the known pixels of (C, H, W), `BORDER` pixels at each side left out; NaN where none is known."""
    inner = (found - truth)[..., BORDER:-BORDER, BORDER:-BORDER]
    return float(inner.square().nanmean().sqrt())


def wrong_share(found: Tensor, truth: Tensor) -> float:
    """Share of known pixels whose largest channel is another than the truth's, without the border."""
    inner = (slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    wrong = (found.argmax(0) != truth.nan_to_num(-1).argmax(0))[inner].float()
    return float(torch.where(truth[0][inner].isfinite(), wrong, torch.nan).nanmean())


class ScoreTable:
    """Scores of methods by group; each is the mean over images of the score of one."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, method: str, group: str, score: float) -> None:
        """Of one image; NaN, of an image without truth, does not count."""
        if not math.isnan(score):
            self.values[method][group].append(score)

    def means(self) -> dict[str, dict[str, float]]:
        """Method -> group -> mean."""
        return {method: {group: sum(found) / len(found) for group, found in groups.items()} for method, groups in self.values.items()}

    def print(self, console: Console, title: str) -> None:
        """Methods by groups."""
        means = self.means()
        counts = {group: len(scores) for found in self.values.values() for group, scores in found.items()}
        console.print(f"{title}:", highlight=False)
        table = Table()
        table.add_column("method")
        for group, count in counts.items():
            table.add_column(f"{group} ({count})", justify="right")
        for method, found in means.items():
            table.add_row(method, *(f"{found[group]:.3f}" for group in counts))
        console.print(table)
