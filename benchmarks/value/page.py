"""docs/value.md and its picture, from the runs."""

from __future__ import annotations

__all__ = ["draw_differences", "write_page"]

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from experiment import Experiment
from studies import Study

from pl_normkit.recipes.contrasts import ALPHA
from pl_normkit.recipes.paired_difference import PairedDifference, holm, paired_difference, smallest_shown

Rows = Sequence[Mapping[str, str]]

_INTRO = """# Proof of value

Each remedy in a setting in which its mechanism can show, and some in which it cannot. `make value` runs everything (one core, {minutes:.0f}
minutes on a busy machine) and writes this page, its picture and `benchmarks/results/value/*.csv`; `python benchmarks/value NAME` runs one.

Runs of one seed share the split of the data, the first weights, the batches and the random numbers. Settings were looked for with other
seeds than those below, and by the authors of the remedies: read each row as "it can", never as "it will on your data"; for that there
is [`pl-normkit compare`](compare.md). A difference is the mean over seeds with Student's 95 % interval; *shown* means p < 0.05 by Holm
over the rows of its table, *not shown* that these runs cannot tell it from nothing. "Could show" is the difference that four of five
such comparisons would show.

![Differences with their intervals](value.png)
"""

_ELSEWHERE = """
## Shown elsewhere

- Conversions of norms, the same function and the time saved or not: [norm operators](norm_operators.md),
  `python benchmarks/conversions.py`
"""

Difference = tuple[str, str, PairedDifference, float | None]
"""(arm, against, difference, p by Holm)."""


def differences(experiment: Experiment, rows: Rows) -> list[Difference]:
    """In the deciding metric."""
    arms: dict[str, dict[str, float]] = {}
    for row in rows:
        arms.setdefault(row["arm"], {})[row["seed"]] = float(row[experiment.metrics[0]])
    return _differences(arms, experiment.contrasts)


def _differences(arms: Mapping[str, Mapping[str, float]], contrasts: Sequence[tuple[str, str]]) -> list[Difference]:
    found = []
    for arm, against in contrasts:
        seeds = sorted(arms.get(arm, {}).keys() & arms.get(against, {}).keys())
        pairs = [(arms[against][seed], arms[arm][seed]) for seed in seeds]
        found.append((arm, against, paired_difference([first for first, _ in pairs], [last for _, last in pairs])))
    adjusted = iter(holm([difference.p for *_, difference in found if difference.p is not None]))
    return [(arm, against, difference, next(adjusted) if difference.p is not None else None) for arm, against, difference in found]


def write_page(experiments: Sequence[Experiment], done: Mapping[str, Rows], studies: Sequence[Study], path: Path) -> None:
    """Every experiment that has been run, in the order of `experiments`, then the studies that scripts of their own have made."""
    seconds = sum(float(row["seconds"]) for rows in done.values() for row in rows)
    sections = [_section(experiment, done[experiment.name]) for experiment in experiments if experiment.name in done]
    sections += map(_study_section, studies)
    path.write_text(_INTRO.format(minutes=seconds / 60) + "".join(sections) + _ELSEWHERE)


def _study_section(study: Study) -> str:
    counts = sorted({len(values) for values in study.arms.values()})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    lines = [f"\n## {study.remedy}\n", f"{study.setting}; {seeds} seed{'' if seeds == '1' else 's'},"]
    lines += [f"{study.seconds / 60:.1f} minutes (`{study.command}`). [What it does]({study.page})\n"]
    lines += [f"| arm | {study.metric} |", "|---|---:|"]
    lines += [f"| {arm} | {_mean(list(values.values()))} |" for arm, values in study.arms.items()]
    found = _differences(study.arms, study.contrasts)
    lines += _difference_table(study.metric, found)
    return "\n".join([*lines, *([f"\n{study.limits}"] if study.limits else []), ""])


def _mean(values: Sequence[float]) -> str:
    """Over the runs that ended with a number; how many did not is said."""
    finite = [value for value in values if math.isfinite(value)]
    lost = f" ({len(values) - len(finite)} of {len(values)} diverged)" if len(finite) < len(values) else ""
    return (f"{fmean(finite):.4g}" if finite else "-") + lost


def _difference_table(metric: str, found: Sequence[Difference]) -> list[str]:
    head = ["", f"| difference in {metric} | mean, 95 % interval | verdict | could show |", "|---|---|---|---:|"]
    tested = sum(p is not None for *_, p in found)
    return head + [_difference_row(*one, family=max(tested, 1)) for one in found]


def _section(experiment: Experiment, rows: Rows) -> str:
    seeds = len({row["seed"] for row in rows})
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    metrics = [name for name in rows[0] if name not in ("seed", "arm", "seconds")]
    arms = list(dict.fromkeys(["without", *experiment.arms]))
    lines = [
        f"\n## {experiment.remedy}\n",
        f"{experiment.question} {experiment.setting[0].upper()}{experiment.setting[1:]}; {seeds} seeds,",
    ]
    lines += [f"{minutes:.1f} minutes (`python benchmarks/value {experiment.name}`). [What it does]({experiment.page})\n"]
    lines += [f"| arm | {' | '.join(metrics)} |", "|---|" + "---:|" * len(metrics)]
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        lines.append(f"| {arm} | " + " | ".join(f"{fmean(float(row[name]) for row in own):.4g}" for name in metrics) + " |")
    lines += _difference_table(experiment.metrics[0], differences(experiment, rows))
    return "\n".join([*lines, *([f"\n{experiment.limits}"] if experiment.limits else []), ""])


def _difference_row(arm: str, against: str, difference: PairedDifference, p: float | None, family: int) -> str:
    power = "" if not difference.spread else f"{smallest_shown(difference.spread, difference.count, ALPHA / family):.3g}"
    verdict = "no pair of finite values" if not difference.count else "one pair: no test" if p is None else "not shown"
    verdict = "**shown**" if p is not None and p < ALPHA else verdict
    interval = f" [{difference.low:+.3g}, {difference.high:+.3g}]" if p is not None else ""
    interval = f"{difference.mean:+.3g}{interval}" if difference.count else ""
    return f"| {arm} - {against} | {interval} | {verdict} | {power} |"


def draw_differences(experiments: Sequence[Experiment], done: Mapping[str, Rows], studies: Sequence[Study], path: Path) -> None:
    """A panel for each experiment and study: its differences in the deciding metric with their intervals."""
    from matplotlib.figure import Figure

    known = [experiment for experiment in experiments if experiment.name in done]
    shown = [(f"{one.remedy}: {one.metrics[0]}", differences(one, done[one.name])) for one in known]
    shown += [(f"{study.remedy}: {study.metric}", _differences(study.arms, study.contrasts)) for study in studies]
    if not shown:
        return
    figure = Figure(figsize=(11, 0.5 + sum(0.5 + 0.28 * len(found) for _, found in shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[1 + 0.5 * len(found) for _, found in shown])
    for (axes,), (title, found) in zip(panels, shown, strict=True):
        for row, (_, _, difference, p) in enumerate(found):
            colour = "tab:gray" if p is None or p >= ALPHA else "tab:blue"
            axes.errorbar([difference.mean], [row], xerr=[difference.half_width or 0.0], fmt="o", color=colour, capsize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(found)), [f"{arm} - {against}" for arm, against, *_ in found], fontsize=8)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=80)
