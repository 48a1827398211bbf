"""Proof of value: each remedy where its mechanism must show, on seeds that were not used to find the setting.

python benchmarks/value                      # all: benchmarks/results/value/*.csv, docs/value.md and docs/value.png
python benchmarks/value head --seeds 1       # a look at one of them, kept nowhere
python benchmarks/value --page               # the page alone, from the CSVs that are there
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from experiment import Experiment
from experiments import EXPERIMENTS
from page import draw_differences, write_page
from rich.console import Console
from studies import read_studies

from pl_normkit.recipes.comparison_report import Comparison

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "value"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *(experiment.name for experiment in EXPERIMENTS)], help="which; default all")
    parser.add_argument("--seeds", type=int, help="how many seeds from 0 on, to look for a setting; nothing is written")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for experiment in [] if given.page else EXPERIMENTS:
        if not given.names or experiment.name in given.names:
            _run(experiment, given.seeds)
    if given.seeds is None:
        done = {experiment.name: _read(experiment) for experiment in EXPERIMENTS if _path(experiment).exists()}
        studies = read_studies(RESULTS.parent)
        draw_differences(EXPERIMENTS, done, studies, ROOT / "docs" / "value.png")
        write_page(EXPERIMENTS, done, studies, ROOT / "docs" / "value.md")


def _run(experiment: Experiment, seeds: int | None) -> None:
    print(f"\n== {experiment.name}: {experiment.question}", flush=True)
    started = time.perf_counter()
    found = experiment.run(range(seeds) if seeds is not None else experiment.seeds)
    found.print(Console(width=200))
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if seeds is None:
        _write(experiment, found)


def _path(experiment: Experiment) -> Path:
    return RESULTS / f"{experiment.name}.csv"


def _write(experiment: Experiment, found: Comparison) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with _path(experiment).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "arm", *found.metrics, "seconds"])
        for (seed, arm), run in sorted(found.runs.items()):
            writer.writerow([seed, arm, *(f"{run.metrics[name]:.6g}" for name in found.metrics), f"{run.seconds:.1f}"])


def _read(experiment: Experiment) -> list[dict[str, str]]:
    with _path(experiment).open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
