"""What a fit came to, for its page: scores of the best checkpoint beside those of the last state, tables, curves, configuration."""

from __future__ import annotations

__all__ = ["result_of"]

import math
from collections.abc import Mapping

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from pl_normkit.recipes.history import FitHistory, Validation
from pl_normkit.recipes.writing import log_folder
from pl_normkit.report.landmarks import RunResult, Score, Table

_Columns = Mapping[str, Mapping[str, float]]


def _history(trainer: L.Trainer) -> FitHistory | None:
    """The history of the Trainer's fit, with its best validation."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    history = next((callback for callback in callbacks if isinstance(callback, FitHistory)), None)
    if history is not None:
        history.find_best(trainer)
    return history


def _last_state(trainer: L.Trainer, step: int) -> str:
    """Which state of the network the scores of its last validation, after `step` steps, are of."""
    return f"last state, step {step}" if step == trainer.global_step else f"step {step}, the last validation of {trainer.global_step} steps"


def result_of(trainer: L.Trainer) -> RunResult:
    """The result of a finished fit; the metric by which the best checkpoint is chosen comes first.

    Without a FitHistory among the Trainer's callbacks there are neither scores nor curves.
    """
    history, checkpoint = _history(trainer), trainer.checkpoint_callback
    metric = checkpoint.monitor or "" if isinstance(checkpoint, ModelCheckpoint) else ""
    states = _states(trainer, history)
    return RunResult(
        scores=[Score(metric, found.metrics[metric], state) for state, found in states.items() if metric in found.metrics],
        checkpoint=checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else "",
        curves={} if history is None else _ordered(history.learning_curves(), metric),
        tables=_tables(states, metric),
        configuration=_configuration(trainer),
    )


def _states(trainer: L.Trainer, history: FitHistory | None) -> dict[str, Validation]:
    """The best checkpoint first; once where it is the last state too."""
    if history is None or not history.validations:
        return {}
    last, named = history.validations[-1], _last_state(trainer, history.validations[-1].step)
    if history.best is last:
        return {f"best checkpoint and {named}": last}
    return {named: last} if history.best is None else {f"best checkpoint, step {history.best.step}": history.best, named: last}


def _ordered(curves: Mapping[str, list[tuple[float, float]]], metric: str) -> dict[str, list[tuple[float, float]]]:
    """The main metric first; what never changes says nothing."""
    names = sorted(curves, key=lambda name: (name != metric, name == "learning rate"))
    return {name: curves[name] for name in names if len({value for _, value in curves[name]}) > 1}


def _tables(states: Mapping[str, Validation], metric: str) -> list[Table]:
    scores = {state: _scores(validation, metric) for state, validation in states.items()}
    tables = [_table("Scores on the validation data", "metric", scores)]
    titles = dict.fromkeys(title for validation in states.values() for title in validation.tables)
    for title in titles:
        tables.append(_table(title, "", {state: validation.tables.get(title, {}) for state, validation in states.items()}))
    return [table for table in tables if table.rows]


def _scores(validation: Validation, metric: str) -> dict[str, float]:
    names = sorted(validation.metrics, key=lambda name: name != metric)
    return {name: validation.metrics[name] for name in names if "/" not in name and not name.startswith("train_")}


def _table(title: str, what: str, columns: _Columns) -> Table:
    rows = dict.fromkeys(name for column in columns.values() for name in column)
    return Table(title, [what, *columns], [[name, *(_text(column.get(name, math.nan)) for column in columns.values())] for name in rows])


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _configuration(trainer: L.Trainer) -> str:
    """What Lightning wrote beside the checkpoints."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    saved = next((callback for callback in callbacks if isinstance(callback, SaveConfigCallback)), None)
    path = log_folder(trainer) / (saved.config_filename if saved is not None else "")
    return path.read_text(encoding="utf-8") if path.is_file() else ""
