"""Bake-offs of norms on built-in data: a ViT, a CNN and a language model. Writes results/compare_norms.csv and compare_norms_curves.csv.

    python benchmarks/compare_norms.py --seeds 5            # about half an hour of one core; --only vit for one of them

Each is a `pl-normkit compare` that anyone can type; the command is printed. Runs that a former call has trained are not trained again: they
lie in runs/compare. Seeds are trained one after another over all recipes, so that a call which is stopped leaves as many of each.
"""

from __future__ import annotations

import argparse
import csv
import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pl_normkit.cli import main
from pl_normkit.recipes.paired_difference import holm, paired_difference

RESULTS = Path(__file__).parent / "results"
POINTS = 4
"""Points of a curve that the table shows."""


@dataclass(frozen=True)
class Bakeoff:
    """Arms by the words of `--with`, the metric that decides, and the options that keep it short."""

    arms: tuple[str, ...]
    metric: str
    options: tuple[str, ...]

    def words(self, recipe: str, seeds: int, folder: Path) -> list[str]:
        chosen = [word for arm in self.arms for word in ("--with", arm)]
        return ["compare", recipe, *chosen, "--metric", self.metric, f"--seeds={seeds}", f"--out={folder}", *self.options]


BAKEOFFS = {
    "vit": Bakeoff(("SwapNorms('rmsnorm')", "SwapNorms('dyt')"), "val_acc,val_loss", ("--trainer.max_epochs=12",)),
    "segmentation": Bakeoff(
        ("SwapNorms('groupnorm')", "SwapNorms('evonorm')"),
        "val_miou",
        (
            "--model.architecture=Unet",
            "--model.encoder_name=tu-test_resnet",
            "--model.model_options={}",
            "--data=TextureMosaic",
            "--data.train_count=120",
            "--data.val_count=16",
            "--data.batch_size=8",
            "--data.crop_size=64",
            "--trainer.max_epochs=6",
            "--trainer.check_val_every_n_epoch=2",
        ),
    ),
    "language": Bakeoff(
        ("SwapNorms('rmsnorm')", "SwapNorms('dyt')"), "val_bpb", ("--trainer.max_epochs=2", "--trainer.limit_train_batches=48")
    ),
}


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_of(recipe: str, folder: Path, seeds: int) -> list[dict[str, Any]]:
    """One row an arm: mean, and the difference to the norms that the network has, with its interval."""
    metric = BAKEOFFS[recipe].metric.split(",")[0]
    runs = _read(folder / "runs.csv")
    values = {(int(row["seed"]), row["arm"]): float(row[metric]) for row in runs}
    arms = ["without", *BAKEOFFS[recipe].arms]
    columns = {arm: [values[seed, arm] for seed in range(seeds)] for arm in arms}
    found = {arm: paired_difference(columns["without"], columns[arm]) for arm in arms[1:]}
    last = paired_difference(columns[arms[1]], columns[arms[2]])
    each = [*found.values(), last]
    adjusted = holm([difference.p if difference.p is not None else 1.0 for difference in each])
    rows = [{"recipe": recipe, "metric": metric, "arm": "without", "pairs": seeds, "mean": f"{math.fsum(columns['without']) / seeds:.4f}"}]
    for arm, difference, p in zip(found, each, adjusted, strict=False):
        row = {"recipe": recipe, "metric": metric, "arm": arm, "pairs": difference.count, "mean": f"{math.fsum(columns[arm]) / seeds:.4f}"}
        row |= {
            "difference": f"{difference.mean:+.4f}",
            "low": f"{difference.low:+.4f}",
            "high": f"{difference.high:+.4f}",
            "p (Holm)": f"{p:.3f}",
        }
        rows.append(row)
    return [row | _costs([run for run in runs if run["arm"] == row["arm"]]) for row in rows]


def _costs(runs: list[dict[str, str]]) -> dict[str, str]:
    """Time and memory of the median run's step."""
    found = {name: statistics.median(float(run[name]) for run in runs) for name in ("step_seconds", "step_bytes")}
    return {"step ms": f"{1000 * found['step_seconds']:.1f}", "step MiB": f"{found['step_bytes'] / 2**20:.2f}"}


def curves_of(recipe: str, folder: Path) -> list[dict[str, Any]]:
    """The metric's mean over seeds at a few steps, by arm."""
    metric = BAKEOFFS[recipe].metric.split(",")[0]
    points: dict[str, dict[int, list[float]]] = {}
    for row in _read(folder / "curves.csv"):
        if row.get(metric):
            points.setdefault(row["arm"], {}).setdefault(int(row["step"]), []).append(float(row[metric]))
    rows = []
    for arm, at in points.items():
        steps = sorted(at)
        chosen = sorted({steps[round((len(steps) - 1) * number / (POINTS - 1))] for number in range(POINTS)})
        rows += [
            {
                "recipe": recipe,
                "metric": metric,
                "arm": arm,
                "step": step,
                "runs": len(at[step]),
                "mean": f"{math.fsum(at[step]) / len(at[step]):.4f}",
            }
            for step in chosen
        ]
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(max(rows, key=len)), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def run() -> None:
    """Train what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=BAKEOFFS, default=list(BAKEOFFS))
    options = parser.parse_args()
    folders = {recipe: Path("runs/compare") / f"norms-{recipe}" for recipe in options.only}
    for seeds in range(1, options.seeds + 1):
        for recipe, folder in folders.items():
            words = BAKEOFFS[recipe].words(recipe, seeds, folder)
            print("pl-normkit", shlex.join(words), flush=True)
            if code := main(words):
                raise SystemExit(code)
        _write(RESULTS / "compare_norms.csv", [row for recipe, folder in folders.items() for row in rows_of(recipe, folder, seeds)])
        _write(RESULTS / "compare_norms_curves.csv", [row for recipe, folder in folders.items() for row in curves_of(recipe, folder)])


if __name__ == "__main__":
    run()
