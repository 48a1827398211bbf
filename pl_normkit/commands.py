"""What rooms add to the command line: parts of the subject of `lint`, drawings of `report`, and commands of their own."""

from __future__ import annotations

__all__ = [
    "Command",
    "LintPart",
    "command",
    "lint_part",
    "lint_probe",
    "load_commands",
    "load_lint_parts",
    "load_lint_probes",
    "model_command",
    "run_drawing",
    "run_drawings",
]

import argparse
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_normkit.errors import ConfigError
from pl_normkit.rules import load_of_rooms

if TYPE_CHECKING:
    from torch import nn

Fill = Callable[[argparse.Namespace, "nn.Module | None"], Mapping[str, Any]]
Run = Callable[[argparse.Namespace], int]
Arguments = Mapping[str, Mapping[str, Any]]
"""Argument name or flag -> keyword arguments of `ArgumentParser.add_argument`."""


@dataclass(frozen=True)
class LintPart:
    """Options of `pl-normkit lint` that give the subject a part, such as its optimizers.

    Attributes:
        arguments: the options; `fill` runs when the first of them is given, which the others only qualify.
        fill: from the options and the model (None where none is named) to fields of the `Subject`. Raises a NormkitError on bad words.
    """

    arguments: Arguments
    fill: Fill

    @property
    def destinations(self) -> dict[str, str]:
        """Option -> the name under which argparse keeps it."""
        return {option: option.lstrip("-").replace("-", "_") for option in self.arguments}


@dataclass(frozen=True)
class Command:
    """A command `pl-normkit NAME`; `run` returns the exit code."""

    name: str
    help: str
    arguments: Arguments
    run: Run


Draw = Callable[[Path, Path], list[str]]
"""From the log folder of a run and a folder for pictures to lines on what was drawn, none where the run recorded nothing of it."""

_CORE = ("pl_normkit.receptive_field.commands", "pl_normkit.report.commands")
"""Commands of what is no room."""

Measure = Callable[["nn.Module", Any], Any]
"""From a model and its example inputs to something that `Report.with_probes` can draw."""

_probes: dict[str, tuple[str, Measure]] = {}
_parts: dict[str, LintPart] = {}
_commands: dict[str, Command] = {}
_drawings: list[Draw] = []


def lint_part(arguments: Arguments) -> Callable[[Fill], Fill]:
    """Register the decorated function as a part of the subject of `pl-normkit lint`."""

    def register(fill: Fill) -> Fill:
        part = LintPart(arguments, fill)
        first = next(iter(arguments))
        _refuse_second(first, _parts.setdefault(first, part).fill, fill)
        return fill

    return register


def run_drawing(draw: Draw) -> Draw:
    """Register the decorated function as a drawing of `pl-normkit report`."""
    if draw not in _drawings:
        _drawings.append(draw)
    return draw


def run_drawings() -> list[Draw]:
    """The drawings of all rooms that are loaded."""
    return list(_drawings)


def lint_probe(name: str, title: str) -> Callable[[Measure], Measure]:
    """Register the decorated function as what `pl-normkit lint --probe NAME` measures and draws under `title`."""

    def register(measure: Measure) -> Measure:
        _refuse_second(name, _probes.setdefault(name, (title, measure))[1], measure)
        return measure

    return register


def command(name: str, help: str, arguments: Arguments) -> Callable[[Run], Run]:  # noqa: A002 - argparse's word
    """Register the decorated function as the command `pl-normkit NAME`."""

    def register(run: Run) -> Run:
        _refuse_second(name, _commands.setdefault(name, Command(name, help, arguments, run)).run, run)
        return run

    return register


def model_command(
    name: str,
    help: str,  # noqa: A002 - argparse's word
    arguments: Arguments,
    *,
    device: str = "meta",
    takes_inputs: bool = True,
) -> Callable[[Callable[[argparse.Namespace, nn.Module, Any], int]], Callable[[argparse.Namespace, nn.Module, Any], int]]:
    """The same for a command on a model: it gets the model and its example inputs as well, on `device`.

    Where they hold values, these are the same in every run. Without `takes_inputs` there is no `--input`, and the inputs are None.
    """
    of_model: dict[str, Mapping[str, Any]] = {
        "model": {"help": "as for lint: timm:NAME, package.module:builder and the like; the code it names is run"},
    }
    if takes_inputs:
        of_model["--input"] = {
            "action": "append",
            "default": [],
            "metavar": "SIZES",
            "help": "sizes without the batch, as for lint: 3,224,224 (default: the model's own)",
        }

    def register(run: Callable[[argparse.Namespace, nn.Module, Any], int]) -> Callable[[argparse.Namespace, nn.Module, Any], int]:
        def build_and_run(options: argparse.Namespace) -> int:
            import torch

            from pl_normkit.inputs import parse_inputs
            from pl_normkit.specs import build_model

            if device != "meta":
                torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = build_model(options.model, device=device)
                inputs = parse_inputs(options.input, model, spec=options.model, device=device) if takes_inputs else None
                return run(options, model, inputs)

        build_and_run.__module__, build_and_run.__qualname__ = run.__module__, run.__qualname__
        command(name, help, {**of_model, **arguments})(build_and_run)
        return run

    return register


def _refuse_second(name: str, first: Callable[..., Any], second: Callable[..., Any]) -> None:
    if first is not second:
        raise ConfigError(
            f"{name!r} is on the command line already",
            where=f"{first.__module__}.{first.__qualname__} and {second.__module__}.{second.__qualname__}",
            fix="give one of them another name",
        )


def load_lint_parts() -> list[LintPart]:
    """The parts that all rooms give, by their first option."""
    load_of_rooms("commands")
    return [_parts[flag] for flag in sorted(_parts)]


def load_lint_probes() -> dict[str, tuple[str, Measure]]:
    """Name -> (title, probe) of all rooms."""
    load_of_rooms("commands")
    return dict(sorted(_probes.items()))


def load_commands() -> list[Command]:
    """The commands of all rooms and of the core, by name."""
    for module in _CORE:
        importlib.import_module(module)
    load_of_rooms("commands")
    return [_commands[name] for name in sorted(_commands)]
