"""What this room adds to the command line: `pl-normkit profile` and `pl-normkit stability`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pl_normkit.commands import model_command
from pl_normkit.errors import ConfigError, DataError
from pl_normkit.importing import import_object, users_code
from pl_normkit.methods.depth_profile.measure import measure_depth_profile
from pl_normkit.methods.depth_profile.stability import stability_probe


@model_command(
    "profile",
    "measure the residual stream of a model over its depth, on made-up inputs",
    {
        "--eval": {"action": "store_true", "help": "in eval mode, without dropout (default: the mode the builder gives)"},
        "--entropy": {"action": "store_true", "help": "also the entropy of attention weights"},
        "--json": {"action": "store_true", "help": "print JSON instead of a table"},
        "--out": {"type": Path, "metavar": "FILE", "help": "PNG to write, a panel a measure"},
    },
    device="cpu",
)
def _profile(options: argparse.Namespace, model: nn.Module, inputs: Any) -> int:
    if options.eval:
        model.eval()
    with users_code("the model cannot be profiled", fix="check --input and the model"):
        profile = measure_depth_profile(model, inputs, entropy=options.entropy)
    if options.out is not None:
        profile.plot(options.out)
    print(profile.to_json() if options.json else profile)  # noqa: T201
    return 0


@model_command(
    "stability",
    "train the first steps again: learning rate x5, initial std x0.1, no warm-up",
    {
        "--batches": {
            "required": True,
            "metavar": "MODULE:NAME",
            "help": "a function without arguments that returns batches, such as a DataLoader",
        },
        "--loss": {"metavar": "MODULE:NAME", "help": "a function of model and batch (default: the model's own training_step)"},
        "--lr": {"type": float, "help": "of AdamW (default: the model's own configure_optimizers, else 1e-3)"},
        "--steps": {"type": int, "default": 50, "help": "of each run (50)"},
        "--warmup": {"type": int, "default": 10, "help": "steps over which the learning rate rises (10)"},
        "--clip": {"type": float, "metavar": "NORM", "help": "largest norm of the gradients (default: not clipped)"},
        "--device": {"default": "cpu", "help": "where to train (cpu)"},
        "--json": {"action": "store_true", "help": "print JSON instead of a table"},
    },
    device="cpu",
    takes_inputs=False,
)
def _stability(options: argparse.Namespace, model: nn.Module, _: None) -> int:
    """0 when no run diverged, 1 when one did."""
    model.to(options.device)
    loss_fn = None if options.loss is None else _function(options.loss)
    make = None
    if options.lr is not None or not hasattr(model, "configure_optimizers"):
        rate = 1e-3 if options.lr is None else options.lr
        make = lambda module: torch.optim.AdamW(module.parameters(), lr=rate)  # noqa: E731 - one line says it
    with users_code("the batches cannot be had", where=options.batches, kind=DataError):
        batches = _function(options.batches)()
    with users_code("the model cannot be trained", fix="check --loss and --batches"):
        report = stability_probe(
            model, batches, loss_fn, optimizer=make, steps=options.steps, warmup_steps=options.warmup, clip_norm=options.clip
        )
    print(report.to_json() if options.json else report)  # noqa: T201
    return int(bool(report.diverged))


def _function(spec: str) -> Any:
    found = import_object(spec)
    if not callable(found):
        raise ConfigError(f"{spec!r} is no function", evidence=f"a {type(found).__name__}")
    return found
