"""What this room adds to the command line: `lint --optimizer`, `lint --probe gamma_norms`, `roles` and `report`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from pl_normkit.commands import command, lint_part, lint_probe, model_command
from pl_normkit.errors import ConfigError
from pl_normkit.importing import users_code
from pl_normkit.methods.weight_decay.find import read_model
from pl_normkit.methods.weight_decay.measure import HISTORY_FILE, measure_gamma_norms, plot_gamma_norms, read_history
from pl_normkit.methods.weight_decay.optimizer_text import build_optimizer
from pl_normkit.methods.weight_decay.policy import PRESETS, resolve_policy


@lint_part({"--optimizer": {"metavar": "CALL", "help": 'judge this optimizer too: "torch.optim.AdamW(lr=1e-3, weight_decay=0.05)"'}})
def _fill_optimizer(options: argparse.Namespace, model: nn.Module | None) -> dict[str, Any]:
    if model is None:
        raise ConfigError("an optimizer needs a model to optimize", fix="name one: pl-normkit lint timm:resnet50 --optimizer ...")
    return {"optimizers": (build_optimizer(options.optimizer, model),)}


@model_command(
    "roles",
    "list every parameter of a model with its role, whether it is decayed, and why",
    {"--policy": {"choices": tuple(PRESETS), "default": "gamma_roles", "help": "which roles are decayed"}},
)
def _roles(options: argparse.Namespace, model: nn.Module, inputs: Any) -> int:
    """One line a parameter, which may be longer than the terminal is wide, so that names stay whole."""
    known, policy = read_model(model, inputs), resolve_policy(options.policy)
    factors, shapes = policy.factors(known), {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    lines = [("parameter", "shape", "role", "decay", "why")]
    for name, role in known.roles.items():
        shape = "x".join(map(str, shapes[name])) or "scalar"
        lines.append((name, shape, role.value, "yes" if factors[name] else "no", policy.line(role).reason))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())  # noqa: T201
    return 0


@lint_probe("gamma_norms", "Scale of the norms by role")
def _gamma_norms(model: nn.Module, inputs: Any) -> Any:
    return measure_gamma_norms(model, inputs)


@command(
    "report",
    "draw what GammaDecay recorded in a run: the norms of the scales by role",
    {
        "folder": {"type": Path, "help": f"log folder of the run, with {HISTORY_FILE} in it"},
        "--out": {"type": Path, "metavar": "FILE", "help": "PNG to write, gamma_norms.png in the folder by default"},
    },
)
def _report(options: argparse.Namespace) -> int:
    out = options.out or options.folder / "gamma_norms.png"
    history = read_history(options.folder / HISTORY_FILE)
    with users_code("the history cannot be drawn", where=str(out), fix="name a file in a folder that exists", kind=ConfigError):
        plot_gamma_norms(history, out)
    for role, points in history.items():
        print(f"{role}: {points[0][1]:.4g} at step {points[0][0]} -> {points[-1][1]:.4g} at step {points[-1][0]}")  # noqa: T201
    print(out)  # noqa: T201
    return 0
