"""What a profile holds: one row a residual addition, as a table, JSON and a figure."""

from __future__ import annotations

__all__ = ["PANELS", "AdditionProfile", "DepthProfile", "Massive", "gradient_ratio"]

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pl_normkit.errors import ConfigError, nearest
from pl_normkit.methods.depth_profile.fits import Growth, fit_growth


@dataclass(frozen=True)
class Massive:
    """A massive activation: |value| above 100 and at least 1000 times the median magnitude of its hidden state.

    Attributes:
        position: of the token, or row and column in a map.
        channel: its channel.
        value: the largest magnitude there over the batch.
    """

    position: tuple[int, ...]
    channel: int
    value: float


@dataclass(frozen=True)
class AdditionProfile:
    """One residual addition, stream = shortcut + branch; padding is left out of every number.

    Attributes:
        module: path of the module that adds.
        source: `file.py:line` of the addition.
        block: path of the block it belongs to.
        dtype: of the stream: float32, float16.
        is_nested: whether it stands inside the branch of another addition; it is in the table, not in the fits.
        variance: of the stream, over the channels of a token (the population's), mean over tokens.
        mean_square: of the stream, over all elements.
        branch_variance: of the branch, as `variance`.
        ratio: branch_variance over the variance of the shortcut.
        angle: arccos(cos(x_l, x_(l + span))) / pi per token, mean; None for the first additions and where the shape changes.
        largest: largest magnitude in the stream.
        largest_elsewhere: the same without the first token of each sequence; None where the stream is no sequence.
        median: median magnitude in the stream.
        massive: massive activations, the largest first, 8 at most.
        gradient: root mean square of the gradient of the branch's weight matrices; None without a loss or without gradients.
        weights: number of elements that `gradient` averages.
        skip_cost: loss without this branch minus the loss with it; None unless asked for.
        entropy: of the attention weights of a query over the logarithm of the number of keys it sees, mean; None unless asked for, for
            a branch without attention, and where the weights could not be had.
        entropy_lowest: the same of the head where it is lowest.
    """

    module: str
    source: str
    block: str
    dtype: str
    is_nested: bool
    variance: float
    mean_square: float
    branch_variance: float
    ratio: float
    angle: float | None
    largest: float
    largest_elsewhere: float | None
    median: float
    massive: tuple[Massive, ...]
    gradient: float | None = None
    weights: int = 0
    skip_cost: float | None = None
    entropy: float | None = None
    entropy_lowest: float | None = None


_SCALES = {
    "variance": "log",
    "branch_variance": "log",
    "ratio": "log",
    "angle": "linear",
    "largest": "log",
    "median": "log",
    "gradient": "log",
    "skip_cost": "linear",
    "entropy": "linear",
    "entropy_lowest": "linear",
}
PANELS = tuple(_SCALES)
"""Measures that the figure shows, each in a panel."""


@dataclass(frozen=True)
class DepthProfile:
    """What `measure_depth_profile` found.

    Attributes:
        additions: in depth order.
        span: additions between the two streams of `angle`.
        loss: of the batch; None without a loss function.
        unread: modules whose residual additions could not be told apart while the model ran.
    """

    additions: tuple[AdditionProfile, ...]
    span: int = 2
    loss: float | None = None
    unread: tuple[str, ...] = ()

    @property
    def stream(self) -> tuple[AdditionProfile, ...]:
        """The additions of the main stream: those that are not nested."""
        return tuple(row for row in self.additions if not row.is_nested)

    @property
    def growth(self) -> Growth | None:
        """Fits of the stream's variance over its additions; None for fewer than three."""
        return fit_growth([row.variance for row in self.stream])

    @property
    def gradient_ratio(self) -> float | None:
        """Gradient of the first quarter of the blocks over that of the last: see `gradient_ratio`. None without gradients."""
        return gradient_ratio((row.block, row.gradient, row.weights) for row in self.stream)

    def to_json(self) -> str:
        """A JSON object; what is not finite becomes null."""
        growth = self.growth
        content = asdict(self) | {"growth": asdict(growth) if growth else None, "gradient_ratio": self.gradient_ratio}
        return json.dumps(_finite(content), indent=2, allow_nan=False)

    def __str__(self) -> str:
        width = max(len(row.module) for row in self.additions) + 2
        columns = [name for name in PANELS if any(getattr(row, name) is not None for row in self.additions)]
        lines = ["  ".join(["residual addition".ljust(width), *(name.rjust(15) for name in columns)])]
        for row in self.additions:
            name = f"  {row.module}" if row.is_nested else row.module
            lines.append("  ".join([name.ljust(width), *(_cell(getattr(row, column)).rjust(15) for column in columns)]))
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> list[str]:
        lines = [] if self.loss is None else [f"loss {self.loss:.4g}"]
        growth = self.growth
        if growth is not None:
            linear = f"{growth.intercept:.3g} {growth.slope:+.3g} l (error {growth.linear_error:.2g} in logarithms)"
            lines.append(
                f"variance after addition l: {linear}, or {growth.scale:.3g} exp({growth.rate:.3g} l) ({growth.exponential_error:.2g})"
            )
        if self.gradient_ratio is not None:
            lines.append(f"gradient of the first quarter of the blocks over the last: {self.gradient_ratio:.3g}")
        massive = [(row.module, item) for row in self.additions for item in row.massive[:1]]
        lines += [f"massive activation in {path}: {item.value:.4g} at {item.position}, channel {item.channel}" for path, item in massive]
        return lines + [f"not read, since its line ran another number of times than in the trace: {path}" for path in self.unread]

    def draw(self, panels: Sequence[str] = PANELS) -> Any:
        """A matplotlib figure with a panel for each of `panels` that was measured. Raises ConfigError for an unknown panel."""
        from matplotlib.figure import Figure

        unknown = [name for name in panels if name not in PANELS]
        if unknown:
            raise ConfigError(f"a profile has no panel {unknown[0]!r}", fix=nearest(unknown[0], PANELS) or ", ".join(PANELS))
        shown = [name for name in panels if any(getattr(row, name) is not None for row in self.stream)]
        figure = Figure(figsize=(1 + 3.2 * max(1, len(shown)), 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown, strict=False):
            values = [getattr(row, name) for row in self.stream]
            axes.plot(range(1, len(values) + 1), [math.nan if value is None else value for value in values], marker=".")
            is_positive = any(value is not None and value > 0.0 for value in values)
            axes.set(title=name.replace("_", " "), xlabel="addition", yscale=_SCALES[name] if is_positive else "linear")
        return figure

    def scalars(self) -> dict[str, float]:
        """A few numbers to follow over a run."""
        first, last = self.stream[0], self.stream[-1]
        return {
            "variance_first": first.variance,
            "variance_last": last.variance,
            "ratio_first": first.ratio,
            "ratio_last": last.ratio,
            "largest": max(row.largest for row in self.additions),
        }

    def plot(self, path: Path, panels: Sequence[str] = PANELS) -> None:
        """Write the figure to `path`."""
        self.draw(panels).savefig(path, dpi=120)


def gradient_ratio(rows: Iterable[tuple[str, float | None, int]]) -> float | None:
    """Root mean square gradient of a block's weights, mean over the first quarter of the blocks over the mean over the last quarter.

    Args:
        rows: (block, root mean square of a branch's gradient, number of elements) in depth order; a branch without gradients is left out.

    Returns:
        None for fewer than two blocks with gradients; infinite where only the last quarter has none left.

    >>> gradient_ratio([("0", 3.0, 5), ("1", 1.0, 5), ("2", 6.0, 5)])
    0.5
    """
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for block, gradient, weights in rows:
        if gradient is not None and weights:
            squares[block] = squares.get(block, 0.0) + gradient**2 * weights
            counts[block] = counts.get(block, 0) + weights
    sizes = [math.sqrt(squares[block] / counts[block]) for block in squares]
    if len(sizes) < 2:
        return None
    quarter = max(1, len(sizes) // 4)
    first, last = math.fsum(sizes[:quarter]), math.fsum(sizes[-quarter:])
    return first / last if last > 0.0 else math.inf if first > 0.0 else math.nan


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
