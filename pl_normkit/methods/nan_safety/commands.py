"""What this room adds to the command line: `lint --loss` and `replay`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from typing import Any

from torch import nn

from pl_normkit.commands import command, lint_part
from pl_normkit.errors import DataError
from pl_normkit.importing import users_code
from pl_normkit.methods.nan_safety.lint import audit_loss
from pl_normkit.methods.nan_safety.replay import replay


@lint_part(
    {
        "--loss": {"metavar": "MODULE:NAME", "help": "a loss function or class, called once on example arguments"},
        "--example": {"metavar": "MODULE:NAME", "help": "a function without arguments that returns the arguments of --loss"},
    }
)
def _fill_loss(options: argparse.Namespace, _: nn.Module | None) -> dict[str, Any]:
    return {"loss": audit_loss(options.loss, options.example)}


@command("replay", "run the operation of a NaNGuard file again", {"file": {"help": "a .pt file from a nan_guard folder"}})
def _replay(options: argparse.Namespace) -> int:
    """0 when the event came again, 1 when it did not or the file alone does not allow it."""
    with users_code("the replay file cannot be used", where=options.file, mend="give a file that NaNGuard wrote", kind=DataError):
        report = replay(options.file)
        print(report)  # noqa: T201
    return int(not report.reproduced)
