"""The stability triad: the first steps again with a higher learning rate, smaller initial weights and no warm-up."""

from __future__ import annotations

__all__ = ["StabilityReport", "StabilityRun", "stability_probe"]

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from pl_normkit.errors import ConfigError
from pl_normkit.preserve import objects_kept, preserved

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[nn.Module], Optimizer]

RATE, SPREAD = 5.0, 0.1
_LAST = 0.1
"""Share of the steps whose mean is the final loss."""


@dataclass(frozen=True)
class StabilityRun:
    """One run of the probe.

    Attributes:
        name: "as it is", "learning rate x5", "initial std x0.1" or "no warm-up".
        losses: of each step; it ends at the first that is not finite.
        final: mean over the last tenth of the steps, NaN where one was not finite.
        has_diverged: whether a loss was not finite, or the final one is not below the first.
    """

    name: str
    losses: tuple[float, ...]
    final: float
    has_diverged: bool


@dataclass(frozen=True)
class StabilityReport:
    """What `stability_probe` found.

    Attributes:
        runs: "as it is" first.
        warmup_steps: steps over which the learning rate rose, except without warm-up.
    """

    runs: tuple[StabilityRun, ...]
    warmup_steps: int

    @property
    def diverged(self) -> tuple[str, ...]:
        """Names of the runs that diverged."""
        return tuple(run.name for run in self.runs if run.has_diverged)

    def share(self, run: StabilityRun) -> float | None:
        """What the loss fell by in a run, over what it fell by in the one "as it is"; None where that is no positive number."""
        fall = self.runs[0].losses[0] - self.runs[0].final
        return (self.runs[0].losses[0] - run.final) / fall if fall > 0.0 and math.isfinite(run.final) else None

    def to_json(self) -> str:
        """A JSON object; what is not finite becomes null."""
        runs = [asdict(run) | {"share": self.share(run)} for run in self.runs]
        for run in runs:
            run["losses"] = [loss if math.isfinite(loss) else None for loss in run["losses"]]
            run["final"] = run["final"] if math.isfinite(run["final"]) else None
        return json.dumps({"runs": runs, "warmup_steps": self.warmup_steps, "diverged": list(self.diverged)}, indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"{'run':<18}{'first loss':>12}{'final loss':>12}{'share of the fall':>20}"]
        for run in self.runs:
            share = self.share(run)
            shown = "-" if share is None else f"{share:.0%}"
            end = "   diverged" if run.has_diverged else ""
            lines.append(f"{run.name:<18}{run.losses[0]:>12.4g}{run.final:>12.4g}{shown:>20}{end}")
        return "\n".join(lines)


def stability_probe(
    module: nn.Module,
    batches: Any,
    loss_fn: Loss | None = None,
    *,
    optimizer: Optimizer | MakeOptimizer | None = None,
    steps: int = 50,
    warmup_steps: int = 10,
    clip_norm: float | None = None,
) -> StabilityReport:
    """Train the first steps four times: as it is, with the learning rate x5, with the initial std x0.1, and without warm-up.

    Every run starts from the present weights, an optimizer without history and the same RNG, and takes the same batches in train mode.
    The learning rate rises linearly over the warm-up steps and then stays. Give a model that was initialized and not yet trained:
    otherwise "initial std" has no meaning. Afterwards weights, `.grad`, buffers, mode, the optimizer and every RNG are as before.

    Args:
        module: any module. One with a `training_step(batch, index)` and `configure_optimizers()` needs neither of the next two arguments.
        batches: an iterable of batches, such as a DataLoader, read from the start and repeated where it is too short. A tensor, a dict
            or a tuple is one batch.
        loss_fn: from the module and a batch to the scalar loss: `lambda model, batch: model(**batch).loss`.
        optimizer: one that holds the parameters, or a function from the module to one. The peak of a learning rate that a scheduler
            drives is taken from `initial_lr`.
        steps: of each run.
        warmup_steps: 0 leaves out the run without warm-up, which would be the first one again.
        clip_norm: largest norm of the gradients, None without clipping.

    Returns:
        The losses of the runs. A run counts as diverged when a loss is not finite, or when the mean over its last tenth is not below its
        first loss. A run that learns only what is easy falls too: see its share of the fall.

    Raises:
        ConfigError: without a loss, an optimizer or batches, for a loss that is not a scalar, for more than one optimizer, for no more
            steps than warm-up steps, and for a model on the meta device.

    Source: the three changes are those of arXiv 2502.15499, Table 2, which trains language models under them; when a run counts as
    diverged is derived here. The initial std is that of all trainable parameters with two dimensions or more.

    >>> from torch import nn
    >>> model, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
    >>> stability_probe(model, x, lambda model, x: (model(x) - 1).square().mean(), optimizer=sgd).diverged
    ('learning rate x5',)
    """
    if not 0 <= warmup_steps < steps:
        raise ConfigError("the probe needs more steps than the warm-up has", evidence=f"{steps} steps, {warmup_steps} of warm-up")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ConfigError("a model on the meta device cannot be trained", fix="build it on the CPU")
    with preserved(module), objects_kept(batches, module):
        loss_of, make = _loss_of(module, loss_fn), _optimizer_of(module, optimizer)
        drawn = _draw(module, batches, steps)
        changes = {"as it is": {}, f"learning rate x{RATE:g}": {"rate": RATE}, f"initial std x{SPREAD:g}": {"spread": SPREAD}}
        plans = [(name, warmup_steps, change) for name, change in changes.items()] + [("no warm-up", 0, {})] * bool(warmup_steps)
        runs = [_run(name, module, drawn, loss_of, make, warmup, clip_norm, **change) for name, warmup, change in plans]
    return StabilityReport(tuple(runs), warmup_steps)


def _run(
    name: str,
    module: nn.Module,
    batches: list[Any],
    loss_of: Callable[[Any, int], Tensor],
    make: Callable[[], Optimizer],
    warmup_steps: int,
    clip_norm: float | None,
    *,
    rate: float = 1.0,
    spread: float = 1.0,
) -> StabilityRun:
    with preserved(module, buffers=True), _weights_kept(module), _fresh(make()) as optimizer, torch.enable_grad():
        module.train()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            for parameter in module.parameters() if spread != 1.0 else ():
                if parameter.requires_grad and parameter.dim() > 1:
                    parameter.mul_(spread)
        peaks = [float(group.get("initial_lr", group["lr"])) * rate for group in optimizer.param_groups]
        losses: list[float] = []
        for index, batch in enumerate(batches):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                _set_rate(group, peak * min(1.0, (index + 1) / warmup_steps if warmup_steps else 1.0))
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*self.log.*trainer.*")  # what a LightningModule logs has nowhere to go here
                loss = loss_of(batch, index)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                break
            loss.backward()  # type: ignore[no-untyped-call]
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
    last = max(1, int(len(batches) * _LAST))
    final = math.fsum(losses[-last:]) / last if math.isfinite(losses[-1]) else math.nan
    return StabilityRun(name, tuple(losses), final, not final < losses[0])


def _set_rate(group: dict[str, Any], value: float) -> None:
    if isinstance(group["lr"], Tensor):  # a compiled or captured optimizer holds its rate so; the old tensor is not written to
        group["lr"] = torch.full_like(group["lr"], value)
    else:
        group["lr"] = value


def _loss_of(module: nn.Module, loss_fn: Loss | None) -> Callable[[Any, int], Tensor]:
    step = getattr(module, "training_step", None)
    if loss_fn is None and step is None:
        raise ConfigError("the probe needs a loss", fix="give loss_fn, or a module with a training_step")

    def loss_of(batch: Any, index: int) -> Tensor:
        found = loss_fn(module, batch) if loss_fn is not None else step(batch, index)  # type: ignore[misc]
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            seen = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError("the loss is no scalar tensor with a gradient", evidence=str(seen))
        return loss

    return loss_of


def _optimizer_of(module: nn.Module, given: Optimizer | MakeOptimizer | None) -> Callable[[], Optimizer]:
    if isinstance(given, Optimizer):
        return lambda: given
    configure = getattr(module, "configure_optimizers", None)
    if given is None and configure is None:
        raise ConfigError("the probe needs an optimizer", fix="give optimizer, or a module with configure_optimizers")

    def make() -> Optimizer:
        found = [leaf for leaf in tree_leaves(given(module) if given is not None else configure()) if isinstance(leaf, Optimizer)]  # type: ignore[misc]
        if len(found) != 1:
            raise ConfigError("the probe needs one optimizer", evidence=f"{len(found)} were configured", fix="give optimizer")
        return found[0]

    return make


def _draw(module: nn.Module, batches: Any, steps: int) -> list[Any]:
    """As many batches as there are steps, on the module's device."""
    source: Iterable[Any] = [batches] if isinstance(batches, (Tensor, Mapping, tuple)) else batches
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    drawn = [tree_map_only(Tensor, lambda value: value.to(device), batch) for batch in islice(source, steps)]
    if not drawn:
        raise ConfigError("there are no batches", fix="give at least one")
    return list(islice(cycle(drawn), steps))


@contextmanager
def _fresh(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer without what it remembers; afterwards all of it is back."""
    attributes, groups = dict(vars(optimizer)), [dict(group) for group in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    try:
        yield optimizer
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)


@contextmanager
def _weights_kept(module: nn.Module) -> Iterator[None]:
    """Values and gradients of the parameters are as before when the block ends."""
    before = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in module.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, value, gradient in before:
            if not torch.equal(parameter.detach(), value):
                parameter.data.copy_(value)
            parameter.grad = gradient
