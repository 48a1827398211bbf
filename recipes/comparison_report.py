"""What a comparison shows: a table of its runs, a sentence for each pair of arms, and a picture."""

from __future__ import annotations

__all__ = ["Comparison"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from pl_normkit.recipes.arms import WITHOUT
from pl_normkit.recipes.contrasts import Contrast, contrast_arms
from pl_normkit.recipes.paired_runs import PairedRun

Runs = Mapping[tuple[int, str], PairedRun]
_INDENT = " " * 12


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison and what they say.

    Attributes:
        runs: by seed and name of the arm.
        arms: names, that of the arm without anything first.
        seeds: one run of each arm for each; an arm that changes nothing has fewer.
        metrics: the first decides.
    """

    runs: Runs
    arms: Sequence[str]
    seeds: Sequence[int]
    metrics: Sequence[str]

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Every arm against every other in each metric, with intervals; those of the first metric are corrected together (Holm)."""
        return contrast_arms(self.runs, self.arms, self.seeds, self.metrics)

    def print(self, console: Console | None = None) -> None:
        """The runs, the differences of the arms with their intervals, and what a run and a step cost."""
        console = console or Console()
        console.print(_tabulate(self.runs, self.arms, self.seeds, self.metrics[0]))
        found = self.contrasts
        lines = [line for contrast in found for line in _describe(contrast, self.metrics[0], _is_idle(self.runs, contrast))]
        for line in [*lines, *_costs(self.runs, self.arms, self.seeds)]:
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    def draw(self, path: str | Path) -> bool:
        """Write a PNG: each metric in every arm, and the differences with their intervals. False where matplotlib is missing."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        height = max(3.6, 1.4 + 0.35 * len(self.contrasts) / len(self.metrics))
        figure = Figure(figsize=(11, height * len(self.metrics)), layout="constrained")
        for (curves, differences), metric in zip(
            figure.subplots(len(self.metrics), 2, width_ratios=(3, 2), squeeze=False), self.metrics, strict=True
        ):
            self._draw_curves(curves, metric)
            _plot_differences(differences, [contrast for contrast in self.contrasts if contrast.metric == metric])
            differences.set(title=f"{metric}: differences, means with 95 % intervals")
        figure.savefig(path, dpi=120)
        return True

    def _draw_curves(self, axes: Any, metric: str) -> None:
        for index, name in enumerate(self.arms):
            colour = f"C{index - 1}" if index else "tab:gray"
            runs = [self.runs[seed, name] for seed in self.seeds if (seed, name) in self.runs]
            own = [[(step, found[metric]) for step, found in run.curve if metric in found] for run in runs]
            for curve in own:
                _plot_curve(axes, curve, color=colour, alpha=0.35, linewidth=0.8)
            _plot_curve(axes, _mean_curve(own), color=colour, linewidth=2, label=f"{name} (mean)")
        axes.set(xlabel="optimizer steps", ylabel=metric)
        axes.legend()


def _tabulate(runs: Runs, arms: Sequence[str], seeds: Sequence[int], metric: str) -> Table:
    others = arms[1:]
    table = Table("seed", *arms, *(f"{name} - {arms[0]}" for name in others), title=metric, title_justify="left")
    for column in table.columns:
        column.justify = "right"
    values = {key: run.metrics[metric] for key, run in runs.items()}
    differences = {(seed, name): values[seed, name] - values[seed, arms[0]] for seed in seeds for name in others if (seed, name) in values}
    for seed in seeds:
        row = [f"{values[seed, name]:.4f}" if (seed, name) in values else "" for name in arms]
        table.add_row(str(seed), *row, *(f"{differences[seed, name]:+.4f}" if (seed, name) in differences else "" for name in others))
    table.add_section()
    means = [fmean(values[seed, name] for seed in seeds if (seed, name) in values) for name in arms]
    apart = [fmean(differences[seed, name] for seed in seeds if (seed, name) in differences) for name in others]
    table.add_row("mean", *(f"{mean:.4f}" for mean in means), *(f"{mean:+.4f}" for mean in apart))
    return table


def _is_idle(runs: Runs, contrast: Contrast) -> bool:
    return contrast.against == WITHOUT and all(runs[seed, contrast.arm].edits == 0 for seed in contrast.seeds)


def _describe(contrast: Contrast, primary: str, idle: bool) -> list[str]:
    found, pairs, metric = contrast.difference, len(contrast.seeds), contrast.metric
    against = "" if contrast.against == WITHOUT else f" against {contrast.against}"
    if contrast.same:
        return _describe_same(contrast, idle) if metric == primary else []
    lines = []
    if lost := pairs - found.count:
        lines.append(f"left out:   {lost} of {pairs} pairs, whose {metric} is not a finite number")
    if not found.count:
        return [*lines, f"difference: no pair has two finite values of {metric} with {contrast.arm}{against}"]
    said = f"difference: {metric} {found.mean:+.4f} with {contrast.arm}{against}"
    if found.half_width is None:
        return [*lines, f"{said}, from one pair: no interval; more seeds (--seeds 5) tell chance from effect"]
    holm = f", p {found.p:.2g}, by Holm over {contrast.family} tests {contrast.p:.2g}" if contrast.family > 1 else ""
    lines.append(f"{said}, 95 % interval {found.low:+.4f} to {found.high:+.4f} (paired t, {found.count} pairs{holm})")
    if not contrast.family:
        return [*lines, f"{_INDENT}beside the metric that was named to decide ({primary}): a hint, no test"]
    if not contrast.shown:
        why = "the interval holds 0" if found.low <= 0 <= found.high else "chance among so many tests makes this"
        lines.append(f"{_INDENT}{why}: these runs show no difference in either direction")
    if contrast.smallest is not None:
        of = "a difference" if contrast.family == 1 else "a difference between two arms"
        lines.append(f"{_INDENT}power: four of five such comparisons show {of} of {contrast.smallest:.4f}")
    return lines


def _describe_same(contrast: Contrast, idle: bool) -> list[str]:
    ends = "ended with the same weights and metrics, bit for bit"
    pairs = f"{len(contrast.seeds)} pair{'s' if len(contrast.seeds) > 1 else ''}"
    if contrast.against != WITHOUT:
        return [f"no change:  {contrast.arm} does the same as {contrast.against}: the runs {ends} ({pairs})"]
    where = "in this network: it found nothing to edit, and" if idle else "in these runs:"
    return [f"no change:  {contrast.arm} changed nothing {where} the runs with it and without {ends} ({pairs})"]


def _costs(runs: Runs, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Of the median run; against the first arm by the median pair."""
    said = [f"wall time:  {_by_arm({key: run.seconds for key, run in runs.items()}, arms, seeds, '{:.1f} s')}; median run"]
    steps = {key: 1000 * run.step_seconds for key, run in runs.items()}
    memory = {key: run.step_bytes / 2**20 for key, run in runs.items()}
    for name, values, unit in (("step time: ", steps, "{:.1f} ms"), ("step memory:", memory, "{:.1f} MiB")):
        if all(0 < value < math.inf for value in values.values()):
            said.append(f"{name} {_by_arm(values, arms, seeds, unit)}")
    return [*said, f"{_INDENT}times the first arm in the median pair"]


def _by_arm(values: Mapping[tuple[int, str], float], arms: Sequence[str], seeds: Sequence[int], unit: str) -> str:
    said = []
    for name in arms:
        own = [seed for seed in seeds if (seed, name) in values]
        ratio = median(values[seed, name] / values[seed, arms[0]] for seed in own)
        times = "" if name == arms[0] else f" ({ratio:.2f} times)"
        said.append(f"{unit.format(median(values[seed, name] for seed in own))} {name}{times}")
    return ", ".join(said)


def _plot_curve(axes: Any, curve: Sequence[tuple[int, float]], **style: Any) -> None:
    marker = "o" if len(curve) == 1 else ""
    axes.plot([step for step, _ in curve], [value for _, value in curve], marker=marker, **style)


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            values.setdefault(step, []).append(value)
    return [(step, fmean(found)) for step, found in sorted(values.items())]


def _plot_differences(axes: Any, contrasts: Sequence[Contrast]) -> None:
    """A row for each pair of arms: the pairs of runs as points, their mean with its interval above them."""
    axes.axvline(0, color="black", linewidth=0.8)
    for row, contrast in enumerate(contrasts):
        axes.plot(contrast.values, [row + 0.15] * len(contrast.values), "o", color="tab:blue", alpha=0.5, markersize=4)
        if contrast.difference.count:
            mean, half = contrast.difference.mean, contrast.difference.half_width or 0.0
            axes.errorbar([mean], [row - 0.1], xerr=[half], fmt="D", color="tab:red", capsize=4)
    axes.set_yticks(range(len(contrasts)), [f"{contrast.arm}\n- {contrast.against}" for contrast in contrasts])
    axes.set_ylim(len(contrasts) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=4)
