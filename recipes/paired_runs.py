"""The runs of a comparison, kept in a folder so that a stopped comparison goes on where it was."""

from __future__ import annotations

__all__ = ["PairedRun", "RunStore", "digest_settings"]

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pl_normkit.errors import ConfigError

_RUN_COLUMNS = ("seed", "arm", "seconds", "step_seconds", "step_bytes", "weights", "trained", "edits")
_CURVE_COLUMNS = ("seed", "arm", "step")


@dataclass(frozen=True)
class PairedRun:
    """One training.

    Attributes:
        seed: of weights, data order and everything else.
        arm: name of the arm.
        metrics: name -> value at the end; the first is the one that decides.
        seconds: wall time of the whole fit.
        step_seconds: of the median training step, its batch included; NaN where none followed another.
        step_bytes: memory that a training step takes above what is there before it; NaN for fits of fewer than four steps.
        weights: digest of the weights before the fit.
        trained: digest of the weights after it.
        edits: how many edits of the network its callbacks made; None where they do not say.
        curve: (step, metrics) of every validation.
    """

    seed: int
    arm: str
    metrics: Mapping[str, float]
    seconds: float
    step_seconds: float
    step_bytes: float
    weights: str
    trained: str
    edits: int | None
    curve: tuple[tuple[int, Mapping[str, float]], ...]

    def ends_as(self, other: PairedRun) -> bool:
        """Whether both ended with the same weights and metrics, bit for bit."""
        both_nan = {name for name in self.metrics if math.isnan(self.metrics[name]) and math.isnan(other.metrics[name])}
        alike = all(name in both_nan or value == other.metrics[name] for name, value in self.metrics.items())
        return alike and self.trained == other.trained


class RunStore:
    """`settings.json`, `runs.csv` and `curves.csv` in a folder; without a folder, in memory.

    Raises ConfigError when the folder holds finished runs of a comparison with other settings.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.runs: dict[tuple[int, str], PairedRun] = {}
        if folder is None:
            return
        path = folder / "settings.json"
        if (folder / "runs.csv").is_file() and path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8"))) != settings:
            differing = [key for key in settings if kept.get(key) != settings[key]]
            evidence = "; ".join(f"{key}: {kept.get(key)!r} there, {settings[key]!r} now" for key in differing)
            raise ConfigError("the folder holds another comparison", where=str(folder), evidence=evidence, fix="name another with --out")
        self.runs = {(run.seed, run.arm): run for run in _read_runs(folder)}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def add(self, run: PairedRun) -> None:
        """Keep `run`, on disk too."""
        self.runs[run.seed, run.arm] = run
        if self.folder is None:
            return
        runs, names = list(self.runs.values()), list(run.metrics)
        curves = [(kept.seed, kept.arm, step, *(found.get(name, "") for name in names)) for kept in runs for step, found in kept.curve]
        _write_rows(self.folder / "curves.csv", (*_CURVE_COLUMNS, *names), curves)
        rows = [(*_facts(kept), *(kept.metrics[name] for name in names)) for kept in runs]
        _write_rows(self.folder / "runs.csv", (*_RUN_COLUMNS, *names), rows)


def _facts(run: PairedRun) -> tuple[object, ...]:
    """In the order of _RUN_COLUMNS."""
    edits = "" if run.edits is None else run.edits
    return run.seed, run.arm, f"{run.seconds:.3f}", f"{run.step_seconds:.6f}", run.step_bytes, run.weights, run.trained, edits


def _read_runs(folder: Path) -> list[PairedRun]:
    curves: dict[tuple[str, str], list[tuple[int, Mapping[str, float]]]] = {}
    for row in _read_rows(folder / "curves.csv"):
        values = {name: float(value) for name, value in row.items() if name not in _CURVE_COLUMNS and value}
        curves.setdefault((row["seed"], row["arm"]), []).append((int(row["step"]), values))
    return [
        PairedRun(
            seed=int(row["seed"]),
            arm=row["arm"],
            metrics={name: float(value) for name, value in row.items() if name not in _RUN_COLUMNS},
            seconds=float(row["seconds"]),
            step_seconds=float(row.get("step_seconds", "nan")),
            step_bytes=float(row.get("step_bytes", "nan")),
            weights=row["weights"],
            trained=row["trained"],
            edits=int(row["edits"]) if row["edits"] else None,
            curve=tuple(curves.get((row["seed"], row["arm"]), ())),
        )
        for row in _read_rows(folder / "runs.csv")
    ]


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Replace the file at once: a stop in between leaves the old one."""
    written = path.with_suffix(".part")
    with written.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    written.replace(path)


def digest_settings(settings: dict[str, Any]) -> str:
    """Eight characters that differ where settings differ."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
