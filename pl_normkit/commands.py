"""What rooms add to the command line: parts of the subject of `lint`, and commands of their own."""

from __future__ import annotations

__all__ = ["Command", "LintPart", "command", "lint_part", "load_commands", "load_lint_parts"]

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pl_normkit.rules import Subject, load_rules

Fill = Callable[[Subject, argparse.Namespace], None]
Run = Callable[[argparse.Namespace], int]
Arguments = Mapping[str, Mapping[str, Any]]
"""Argument name or flag -> keyword arguments of `ArgumentParser.add_argument`."""


@dataclass(frozen=True)
class LintPart:
    """Options of `pl-normkit lint` that give the subject a part, such as its optimizers.

    Attributes:
        arguments: the options; `fill` runs when the first of them is given.
        fill: puts the part into the subject. Raises a NormkitError on bad words.
    """

    arguments: Arguments
    fill: Fill


@dataclass(frozen=True)
class Command:
    """A command `pl-normkit NAME`; `run` returns the exit code."""

    name: str
    help: str
    arguments: Arguments
    run: Run


_parts: dict[str, LintPart] = {}
_commands: dict[str, Command] = {}


def lint_part(arguments: Arguments) -> Callable[[Fill], Fill]:
    """Register the decorated function as a part of the subject of `pl-normkit lint`."""

    def register(fill: Fill) -> Fill:
        _parts[next(iter(arguments))] = LintPart(arguments, fill)
        return fill

    return register


def command(name: str, help: str, arguments: Arguments) -> Callable[[Run], Run]:  # noqa: A002 - argparse's word
    """Register the decorated function as the command `pl-normkit NAME`."""

    def register(run: Run) -> Run:
        _commands[name] = Command(name, help, arguments, run)
        return run

    return register


def load_lint_parts() -> list[LintPart]:
    """The parts that all rooms give, by their first option."""
    load_rules()
    return [_parts[flag] for flag in sorted(_parts)]


def load_commands() -> list[Command]:
    """The commands of all rooms, by name."""
    load_rules()
    return [_commands[name] for name in sorted(_commands)]
