"""What this room adds to the command line: `lint --optimizer`, `lint --probe gamma_norms`, `roles` and a drawing of `report`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from pl_normkit.commands import lint_part, lint_probe, model_command, run_drawing
from pl_normkit.errors import ConfigError
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


@run_drawing
def _draw_gamma_norms(folder: Path, out: Path) -> list[str]:
    """The norms of the scales by role, which GammaDecay recorded."""
    if not (folder / HISTORY_FILE).exists():
        return []
    history, picture = read_history(folder / HISTORY_FILE), out / "gamma_norms.png"
    plot_gamma_norms(history, picture)
    lines = []
    for role, points in history.items():
        (first, start), (last, end) = points[0], points[-1]
        lines.append(f"{role}: {start:.4g} at step {first} -> {end:.4g} at step {last}")
    return [*lines, str(picture)]
