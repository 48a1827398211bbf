"""Results of probes as curves along a network: title -> (module path -> number)."""

from __future__ import annotations

__all__ = ["curves_of_probes"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pl_normkit.errors import ConfigError

Curves = dict[str, dict[str, float]]


def curves_of_probes(probes: Mapping[str, Any]) -> Curves:
    """The curves of each result, whose names are titles.

    A result is a number a module (`measure_variance_shift`), a number a module for each of several names (`measure_gamma_norms`), a record
    of numbers a block (`HealthMeter.after_step`), a sequence of things with `module` and `ratio` (`measure_fusion_scales`), or anything
    whose `curves` are such, as an attribute or a method (`measure_time_awareness`, `GradientHealth`).

    Raises ConfigError for anything else.
    """
    found: Curves = {}
    for title, result in probes.items():
        curves = _curves(title, result)
        if curves is None:
            fix = "give what a measure_... function returned, or module paths with numbers"
            raise ConfigError("the result of a probe cannot be drawn", where=title, evidence=type(result).__name__, fix=fix)
        found |= curves
    return found


def _curves(title: str, result: Any) -> Curves | None:
    own = getattr(result, "curves", None)
    if own is not None:
        return _curves(title, own() if callable(own) else own)
    if isinstance(result, Mapping):
        return _of_mapping(title, result)
    if (
        isinstance(result, Sequence)
        and not isinstance(result, str)
        and all(hasattr(item, "module") and hasattr(item, "ratio") for item in result)
    ):
        values: dict[str, float] = {}
        for item in result:
            values[item.module] = max(float(item.ratio), values.get(item.module, 0.0))
        return {title: values}
    return None


def _of_mapping(title: str, result: Mapping[str, Any]) -> Curves | None:
    if all(_is_number(value) for value in result.values()):
        return {title: {name: float(value) for name, value in result.items()}}
    if all(dataclasses.is_dataclass(value) for value in result.values()):
        fields = [field.name for field in dataclasses.fields(next(iter(result.values())))]
        records = {field: {name: getattr(record, field, None) for name, record in result.items()} for field in fields}
        return _named(title, {field.replace("_", " "): values for field, values in records.items()})
    if all(isinstance(value, Mapping) for value in result.values()):
        return _named(title, result)
    return None


def _named(title: str, curves: Mapping[str, Mapping[str, Any]]) -> Curves:
    """Each with its numbers; those without any are left out."""
    known = {name: {path: float(value) for path, value in curve.items() if _is_number(value)} for name, curve in curves.items()}
    return {f"{title}: {name}": curve for name, curve in known.items() if curve}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
