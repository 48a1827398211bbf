"""What this room adds to the command line: `pl-normkit profile`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from pl_normkit.commands import model_command
from pl_normkit.importing import users_code
from pl_normkit.methods.depth_profile.measure import measure_depth_profile


@model_command(
    "profile",
    "measure the residual stream of a model over its depth, on made-up inputs",
    {
        "--eval": {"action": "store_true", "help": "in eval mode, without dropout (default: the mode the builder gives)"},
        "--json": {"action": "store_true", "help": "print JSON instead of a table"},
        "--out": {"type": Path, "metavar": "FILE", "help": "PNG to write, a panel a measure"},
    },
    device="cpu",
)
def _profile(options: argparse.Namespace, model: nn.Module, inputs: Any) -> int:
    if options.eval:
        model.eval()
    with users_code("the model cannot be profiled", fix="check --input and the model"):
        profile = measure_depth_profile(model, inputs)
    if options.out is not None:
        profile.plot(options.out)
    print(profile.to_json() if options.json else profile)  # noqa: T201
    return 0
