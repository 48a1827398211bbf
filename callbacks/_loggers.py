"""Findings in the user's loggers, as a table or a text where the logger has one; counts are metrics and go to all of them."""

from __future__ import annotations

__all__ = ["log_findings"]

import csv
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pl_normkit.errors import NormkitWarning
from pl_normkit.report import Report

_NAME = "normkit_findings"
_COLUMNS = ["rule", "severity", "message", "places", "evidence", "advice"]


def log_findings(loggers: Iterable[Any], report: Report, step: int) -> None:
    """Write the findings where a logger has a way; one that fails is a warning, since a run must not end by it."""
    if not report.findings:
        return
    for logger in loggers:
        write = next((_WRITERS[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in _WRITERS), None)
        try:
            if write is not None:
                write(logger, _rows(report), step)
        except Exception as error:
            what = f"{type(logger).__name__} could not store the findings: {type(error).__name__}: {error}"
            warnings.warn(what, NormkitWarning, stacklevel=2)


def _rows(report: Report) -> list[list[str]]:
    return [
        [
            f"{finding.code} {finding.name}",
            finding.severity.value,
            finding.message,
            "; ".join(map(str, finding.places)),
            "; ".join(map(str, finding.evidence)),
            finding.advice,
        ]
        for finding in report.findings
    ]


def _markdown(rows: list[list[str]]) -> str:
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), ' ') for cell in line)} |" for line in lines)


def _to_tensorboard(logger: Any, rows: list[list[str]], step: int) -> None:
    logger.experiment.add_text(_NAME, _markdown(rows), step)


def _to_wandb(logger: Any, rows: list[list[str]], step: int) -> None:
    logger.log_table(key=_NAME, columns=_COLUMNS, data=rows, step=step)


def _to_mlflow(logger: Any, rows: list[list[str]], _: int) -> None:
    logger.experiment.log_text(logger.run_id, _markdown(rows), f"{_NAME}.md")


def _to_csv(logger: Any, rows: list[list[str]], _: int) -> None:
    folder = Path(logger.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{_NAME}.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *rows])


_WRITERS: dict[str, Callable[[Any, list[list[str]], int], None]] = {
    "TensorBoardLogger": _to_tensorboard,
    "WandbLogger": _to_wandb,
    "MLFlowLogger": _to_mlflow,
    "CSVLogger": _to_csv,
}
