"""What a comparison shows: a table of its pairs, a sentence, and a picture."""

from __future__ import annotations

__all__ = ["draw_comparison", "print_comparison"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from pl_normkit.recipes.paired_difference import PairedDifference, paired_difference
from pl_normkit.recipes.paired_runs import ARMS, Arm, PairedRun

Runs = Mapping[tuple[int, Arm], PairedRun]


def print_comparison(console: Console, runs: Runs, seeds: Sequence[int], metric: str, label: str) -> None:
    """The pairs of `seeds`, the mean difference with its interval, and the wall time of both."""
    console.print(_tabulate(runs, seeds, metric))
    without, with_it = ([runs[seed, arm].metric for seed in seeds] for arm in ARMS)
    for line in _describe(paired_difference(without, with_it), len(seeds), metric, label):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    before, after = ([runs[seed, arm].seconds for seed in seeds] for arm in ARMS)
    ratio = median(late / early for early, late in zip(before, after, strict=True))
    times = f"wall time:  {median(before):.1f} s without, {median(after):.1f} s with (median run; {ratio:.2f} times in the median pair)"
    console.print(times, soft_wrap=True, highlight=False)


def _tabulate(runs: Runs, seeds: Sequence[int], metric: str) -> Table:
    table = Table("seed", "without", "with", "difference", "seconds without", "seconds with", title=metric, title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for seed in seeds:
        before, after = (runs[seed, arm] for arm in ARMS)
        difference = f"{after.metric - before.metric:+.4f}"
        table.add_row(str(seed), f"{before.metric:.4f}", f"{after.metric:.4f}", difference, f"{before.seconds:.1f}", f"{after.seconds:.1f}")
    table.add_section()
    means = [sum(runs[seed, arm].metric for seed in seeds) / len(seeds) for arm in ARMS]
    table.add_row("mean", *(f"{mean:.4f}" for mean in means), f"{means[1] - means[0]:+.4f}", "", "")
    return table


def _describe(difference: PairedDifference, pairs: int, metric: str, label: str) -> list[str]:
    lines = []
    if lost := pairs - difference.count:
        lines.append(f"left out:   {lost} of {pairs} pairs, whose {metric} is not a finite number")
    if not difference.count:
        return [*lines, "difference: no pair has two finite values"]
    said = f"difference: {metric} {difference.mean:+.4f} with {label}"
    if difference.half_width is None:
        return [*lines, f"{said}, from one pair: no interval; more seeds (--seeds 5) tell chance from effect"]
    lines.append(f"{said}, 95 % interval {difference.low:+.4f} to {difference.high:+.4f} (paired t, {difference.count} pairs)")
    if difference.low <= 0 <= difference.high:
        lines.append("            the interval holds 0: these runs show no difference in either direction")
    return lines


def draw_comparison(runs: Runs, seeds: Sequence[int], metric: str, label: str, path: Path) -> bool:
    """Write a PNG: the metric over the steps in both arms, and the difference of each pair. False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, differences = figure.subplots(1, 2, width_ratios=(3, 2))
    for arm, colour in zip(ARMS, ("tab:gray", "tab:blue"), strict=True):
        for seed in seeds:
            _plot_curve(curves, runs[seed, arm].curve, color=colour, alpha=0.35, linewidth=0.8)
        _plot_curve(curves, _mean_curve([runs[seed, arm].curve for seed in seeds]), color=colour, linewidth=2, label=f"{arm} (mean)")
    curves.set(xlabel="optimizer steps", ylabel=metric, title=f"with and without {label}")
    curves.legend()
    values = [runs[seed, "with"].metric - runs[seed, "without"].metric for seed in seeds]
    _plot_differences(differences, values, [f"seed {seed}" for seed in seeds])
    differences.set(title=f"{metric}: with - without")
    figure.savefig(path, dpi=120)
    return True


def _plot_curve(axes: Any, curve: Sequence[tuple[int, float]], **style: Any) -> None:
    marker = "o" if len(curve) == 1 else ""
    axes.plot([step for step, _ in curve], [value for _, value in curve], marker=marker, **style)


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            values.setdefault(step, []).append(value)
    return [(step, sum(found) / len(found)) for step, found in sorted(values.items())]


def _plot_differences(axes: Any, values: Sequence[float], names: Sequence[str]) -> None:
    mean = paired_difference([0.0] * len(values), values)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.plot(values, range(1, len(values) + 1), "o", color="tab:blue")
    if mean.count:
        axes.errorbar([mean.mean], [0], xerr=[mean.half_width or 0.0], fmt="D", color="tab:red", capsize=4)
    axes.set_yticks(range(len(values) + 1), ["mean" if mean.half_width is None else "mean, 95 %", *names])
    axes.locator_params(axis="x", nbins=4)
    axes.invert_yaxis()
