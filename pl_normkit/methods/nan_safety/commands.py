"""What this room adds to the command line: `lint --loss` and `replay`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from pl_normkit.commands import command, lint_part
from pl_normkit.errors import ConfigError, DataError
from pl_normkit.importing import users_code
from pl_normkit.methods.nan_safety.diagnosis.replay import replay
from pl_normkit.methods.nan_safety.losses.arguments import NOT_EMPTY, Bounds
from pl_normkit.methods.nan_safety.losses.loss_call import read_loss_call


@lint_part(
    {
        "--loss": {"metavar": "MODULE:NAME", "help": "a loss function or class: searched for arguments at which it is not finite"},
        "--example": {"metavar": "MODULE:NAME", "help": "a function without arguments that returns the arguments of --loss"},
        "--domain": {
            "metavar": "NAME=LOW:HIGH",
            "action": "append",
            "help": "an argument of --loss stays within; NAME=not-empty for a mask",
        },
        "--fixed": {"metavar": "NAME", "action": "append", "help": "an argument of --loss that is not moved"},
        "--search-seconds": {"type": float, "metavar": "SECONDS", "help": "how long to search (1), in processor time"},
    }
)
def _fill_loss(options: argparse.Namespace, _: nn.Module | None) -> dict[str, Any]:
    """The loss and how it is called; a script for each witness goes to the working directory."""
    call = read_loss_call(
        options.loss,
        options.example,
        domain=dict(map(_domain, options.domain or ())),
        fixed=options.fixed or (),
        seconds=1.0 if options.search_seconds is None else options.search_seconds,
        folder=Path.cwd(),
    )
    return {"loss": call.recorded(), "loss_call": call}


def _domain(words: str) -> tuple[str, Bounds | str]:
    name, _, allowed = words.partition("=")
    if allowed == "not-empty":
        return name, NOT_EMPTY
    low, _, high = allowed.partition(":")
    try:
        return name, (float(low), float(high))
    except ValueError as error:
        raise ConfigError(f"--domain {words!r} is not known", fix="write NAME=LOW:HIGH or NAME=not-empty") from error


@command("replay", "run the operation of a NaNGuard file again", {"file": {"help": "a .pt file from a nan_guard folder"}})
def _replay(options: argparse.Namespace) -> int:
    """0 when the event came again, 1 when it did not or the file alone does not allow it."""
    with users_code("the replay file cannot be used", where=options.file, fix="give a file that NaNGuard wrote", kind=DataError):
        report = replay(options.file)
        print(report)  # noqa: T201
    return int(not report.reproduced)
