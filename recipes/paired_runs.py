"""The runs of a comparison, kept in a folder so that a stopped comparison goes on where it was."""

from __future__ import annotations

__all__ = ["ARMS", "Arm", "PairedRun", "RunStore"]

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pl_normkit.errors import ConfigError

Arm = Literal["without", "with"]
ARMS: tuple[Arm, Arm] = ("without", "with")

_RUN_COLUMNS = ("seed", "arm", "metric", "seconds", "weights")
_CURVE_COLUMNS = ("seed", "arm", "step", "metric")


@dataclass(frozen=True)
class PairedRun:
    """One training.

    Attributes:
        seed: of weights, data order and everything else.
        arm: with the compared callbacks or without.
        metric: the recipe's main validation metric at the end.
        seconds: wall time of the whole fit.
        weights: digest of the weights before the fit.
        curve: (step, metric) of every validation.
    """

    seed: int
    arm: Arm
    metric: float
    seconds: float
    weights: str
    curve: tuple[tuple[int, float], ...]


class RunStore:
    """`settings.json`, `runs.csv` and `curves.csv` in a folder.

    Raises ConfigError when the folder holds finished runs of a comparison with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.runs = {(run.seed, run.arm): run for run in self._read()}
        path = folder / "settings.json"
        if self.runs and path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8"))) != settings:
            differing = [key for key in settings if kept.get(key) != settings[key]]
            evidence = "; ".join(f"{key}: {kept.get(key)!r} there, {settings[key]!r} now" for key in differing)
            raise ConfigError("the folder holds another comparison", where=str(folder), evidence=evidence, mend="name another with --out")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _read(self) -> list[PairedRun]:
        curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in _read_rows(self.folder / "curves.csv"):
            curves.setdefault((row["seed"], row["arm"]), []).append((int(row["step"]), float(row["metric"])))
        return [
            PairedRun(
                seed=int(row["seed"]),
                arm=ARMS[ARMS.index(row["arm"])],
                metric=float(row["metric"]),
                seconds=float(row["seconds"]),
                weights=row["weights"],
                curve=tuple(curves.get((row["seed"], row["arm"]), ())),
            )
            for row in _read_rows(self.folder / "runs.csv")
        ]

    def add(self, run: PairedRun) -> None:
        """Keep `run`, on disk too."""
        self.runs[run.seed, run.arm] = run
        curves = [(kept.seed, kept.arm, step, value) for kept in self.runs.values() for step, value in kept.curve]
        _write_rows(self.folder / "curves.csv", _CURVE_COLUMNS, curves)
        rows = [(kept.seed, kept.arm, kept.metric, f"{kept.seconds:.3f}", kept.weights) for kept in self.runs.values()]
        _write_rows(self.folder / "runs.csv", _RUN_COLUMNS, rows)


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
