"""How large the scales of each role are, over the steps of a run."""

from __future__ import annotations

__all__ = [
    "HISTORY_FILE",
    "NormHistory",
    "add_gamma_norms",
    "draw_history",
    "gamma_norms",
    "measure_gamma_norms",
    "plot_gamma_norms",
    "read_history",
    "squared_gamma_norms",
    "write_history",
]

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pl_normkit.errors import DataError
from pl_normkit.methods.weight_decay.find import ModelRoles, read_model
from pl_normkit.methods.weight_decay.roles import GAMMAS, Role
from pl_normkit.wrappers import unwrapped_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NormHistory = dict[str, list[tuple[int, float]]]
"""Role -> (step, norm) pairs."""


HISTORY_FILE = "gamma_norms.json"


def write_history(history: NormHistory, path: Path) -> None:
    """Keep a run's history as JSON: role -> list of [step, norm]."""
    path.write_text(json.dumps(history) + "\n")


def read_history(path: Path) -> NormHistory:
    """What `write_history` wrote. Raises DataError when the file is missing, empty or something else."""
    try:
        history = {
            role: [(int(step), float(norm)) for step, norm in points] for role, points in json.loads(path.read_text()).items() if points
        }
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            "no gamma norms can be read",
            where=str(path),
            evidence=f"{type(error).__name__}: {error}",
            fix="name the log folder of a run trained with GammaDecay and a logger",
        ) from error
    if not history:
        raise DataError("no gamma norms were recorded", where=str(path), fix="train at least one step of a model with norm scales")
    return history


def gamma_norms(model: nn.Module, known: ModelRoles) -> dict[Role, float]:
    """L2 norm of all norm scales of each role, float32; roles that the model lacks are left out.

    >>> import torch
    >>> from pl_normkit import read_model
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> gamma_norms(model, read_model(model, torch.zeros(2, 3, 8, 8)))
    {<Role.GAMMA_TRUNK: 'gamma_trunk'>: 2.0}
    """
    return {role: float(square) ** 0.5 for role, square in squared_gamma_norms(model, known).items()}


def measure_gamma_norms(model: nn.Module, example_inputs: Any = None) -> dict[str, dict[str, float]]:
    """Root mean square of the scale of every norm, by role and by path of the norm; what `Report.to_html(probes=...)` draws.

    Args:
        model: with real weights.
        example_inputs: for the trace that tells the roles; None where the model needs none.

    >>> import torch
    >>> measure_gamma_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.zeros(2, 3, 8, 8))
    {'gamma_trunk': {'1': 1.0}}
    """
    roles = {unwrapped_name(name): role for name, role in read_model(model, example_inputs).roles.items()}
    found: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        role = roles.get(unwrapped_name(name))
        if role in GAMMAS:
            found.setdefault(role.value, {})[name.rpartition(".")[0]] = float(parameter.detach().float().square().mean()) ** 0.5
    return found


def squared_gamma_norms(model: nn.Module, known: ModelRoles) -> dict[Role, Tensor]:
    """Sum of the squared scales of each role, () float32 on their device: of this process's shard where parameters are sharded.

    A role that `known` names is there also when this process holds none of its elements.
    """
    roles = {unwrapped_name(name): role for name, role in known.roles.items()}
    squares: dict[Role, Tensor] = {}
    for name, parameter in model.named_parameters():
        role = roles.get(unwrapped_name(name))
        if role in GAMMAS:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # DTensor: this process's shard
            square = local.detach().float().square().sum()
            squares[role] = squares[role] + square if role in squares else square
    return {role: squares[role] for role in GAMMAS if role in squares}


def add_gamma_norms(
    history: NormHistory, squares: Mapping[Role, Tensor], step: int, total: Callable[[Tensor], Tensor | float] = float
) -> None:
    """Put the norms of `squared_gamma_norms` at `step` into `history`, once for each step; `total` sums a square over processes."""
    for role, square in squares.items():
        points = history.setdefault(role.value, [])
        summed = total(square)
        if not points or points[-1][0] != step:
            points.append((step, float(summed) ** 0.5))


def draw_history(history: NormHistory, folder: str | Path, loggers: Iterable[Any] = (), step: int = 0) -> None:
    """Write the history to `folder`, and draw it there and into those loggers that take figures, where matplotlib is installed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_history(history, folder / HISTORY_FILE)
    try:
        figure = plot_gamma_norms(history, folder / "gamma_norms.png")
    except ImportError:
        return
    for logger in loggers:
        board = getattr(logger, "experiment", None)
        if board is not None and hasattr(board, "add_figure"):
            board.add_figure("normkit/gamma_norms", figure, step)
        elif hasattr(logger, "log_image"):
            logger.log_image("normkit/gamma_norms", [str(folder / "gamma_norms.png")])


def plot_gamma_norms(history: NormHistory, path: Path | None = None) -> Figure:
    """Lines of gamma norm over steps, one per role, each relative to its first value; also written to `path` (PNG) when given.

    >>> len(plot_gamma_norms({"gamma_last": [(0, 4.0), (10, 2.0)]}).axes)
    1

    Raises DataError when there is nothing to draw, ImportError without matplotlib (`pip install pl_normkit[demo]`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = {role: points for role, points in history.items() if points}
    if not lines:
        raise DataError("no gamma norms were recorded", fix="train at least one step of a model with norm scales")
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for role, points in lines.items():
        first = points[0][1] or 1.0
        axes.plot([step for step, _ in points], [norm / first for _, norm in points], label=f"{role} (starts at {points[0][1]:.3g})")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("norm of the scales / first value")
    axes.legend(fontsize="small")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
