"""How the blocks of a model fare in a training step: gradient norm, update-to-weight ratio, share of dead units."""

from __future__ import annotations

__all__ = ["BlockHealth", "HealthMeter", "blocks_of", "curves_of"]

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pl_normkit.first_step.autograd_nodes import GraphView
from pl_normkit.first_step.backward_graph import dead_shares


@dataclass(frozen=True)
class BlockHealth:
    """One block in one step.

    Attributes:
        gradient_norm: Euclidean norm of all its gradients; 0 where it has none.
        update_ratio: norm of the step's change over norm of the weights before; None where the step was not seen.
        dead_share: mean share of units that its ReLUs gave 0 for over the whole batch; None without ReLUs.
    """

    gradient_norm: float
    update_ratio: float | None = None
    dead_share: float | None = None


def blocks_of(model: nn.Module) -> dict[str, str]:
    """The block of every trainable parameter: a child of the model, or an entry of its lists; an only child is looked into."""
    return {name: _block(model, name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def _block(model: nn.Module, name: str) -> str:
    parts = name.split(".")[:-1]
    holder, depth = model, 0
    while depth < len(parts):
        is_only = sum(any(True for _ in child.parameters()) for child in holder.children()) == 1
        holder = holder.get_submodule(parts[depth])
        depth += 1
        if not is_only and not _holds_blocks(holder):
            break
    return ".".join(parts[:depth])


def _holds_blocks(holder: nn.Module) -> bool:
    """A list, or a sequence of more than single layers."""
    if isinstance(holder, nn.Sequential):
        return any(True for child in holder for _ in child.children())
    return isinstance(holder, (nn.ModuleList, nn.ModuleDict))


def curves_of(measured: Mapping[str, BlockHealth], when: str) -> dict[str, dict[str, float]]:
    """For a page: each of the numbers along the blocks that have it, with `when` in the title.

    >>> curves_of({"stem": BlockHealth(0.5), "head": BlockHealth(2.0)}, "by block")
    {'Gradient norm by block': {'stem': 0.5, 'head': 2.0}}
    """
    numbers: dict[str, dict[str, float | None]] = {
        f"Gradient norm {when}": {block: health.gradient_norm for block, health in measured.items()},
        f"Update-to-weight ratio {when}": {block: health.update_ratio for block, health in measured.items()},
        f"Share of dead units {when}": {block: health.dead_share for block, health in measured.items()},
    }
    known = {title: {block: value for block, value in values.items() if value is not None} for title, values in numbers.items()}
    return {title: values for title, values in known.items() if values}


class HealthMeter:
    """Measures one step at a time; between the measured steps it does nothing and holds nothing.

    For a plain loop:

        meter = HealthMeter(model)
        loss = loss_fn(model(x), y)
        if step % 50 == 0:
            meter.before_backward(loss)
        loss.backward()
        meter.before_step()
        optimizer.step()
        print(meter.after_step())  # {} in steps that are not measured

    Args:
        model: the module that trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._dead: dict[str, float] | None = None
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, float] = {}

    def before_backward(self, loss: Tensor) -> None:
        """Begin to measure this step: read the ReLUs of the loss's graph."""
        if self._dead is not None:
            return  # the first of the backwards that make a step
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        self._dead = dead_shares(GraphView.of([loss], names))

    def before_step(self) -> None:
        """Read the gradients and keep the weights, where this step is measured."""
        if self._dead is None or self._before:
            return
        trainable = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        with_gradient = {name: p.grad for name, p in trainable.items() if p.grad is not None and not p.grad.is_sparse}
        self._gradients = dict(zip(with_gradient, _norms(list(with_gradient.values())), strict=True))
        self._before = {name: p.detach().clone() for name, p in trainable.items()}

    def after_step(self) -> dict[str, BlockHealth]:
        """The blocks' health by path, in the order of the model; empty where this step is not measured."""
        if self._dead is None or not self._before:
            return {}
        blocks, parameters = blocks_of(self._model), dict(self._model.named_parameters())
        names = [name for name in self._before if name in blocks]
        weights = dict(zip(names, _norms([self._before[name] for name in names]), strict=True))
        moved = [parameters[name].detach() - self._before[name] for name in names]
        changes = dict(zip(names, _norms(moved), strict=True))
        gradient, weight, change = (_by_block(values, blocks) for values in (self._gradients, weights, changes))
        dead = _mean_by_block(self._dead, blocks)
        self._dead, self._before, self._gradients = None, {}, {}
        return {
            block: BlockHealth(gradient.get(block, 0.0), change[block] / weight[block] if weight[block] else None, dead.get(block))
            for block in dict.fromkeys(blocks[name] for name in names)
        }


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """Euclidean norms with one synchronisation."""
    if not tensors:
        return []
    return [float(norm) for norm in torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))]).tolist()]


def _by_block(values: Mapping[str, float], blocks: Mapping[str, str]) -> dict[str, float]:
    squares: dict[str, float] = defaultdict(float)
    for name, value in values.items():
        squares[blocks[name]] += value * value
    return {block: total**0.5 for block, total in squares.items()}


def _mean_by_block(values: Mapping[str, float], blocks: Mapping[str, str]) -> dict[str, float]:
    gathered: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        if name in blocks:
            gathered[blocks[name]].append(value)
    return {block: sum(found) / len(found) for block, found in gathered.items()}
