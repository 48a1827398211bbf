"""`WeightProjection`: weights in front of norms are brought back to the length they had."""

from __future__ import annotations

__all__ = ["WeightProjection"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pl_normkit.errors import ConfigError, DataError, NothingMatchedError
from pl_normkit.graph import Kind, ModelGraph, Node
from pl_normkit.graph.norms import norms_that_read
from pl_normkit.graph.structure import PASSING
from pl_normkit.surgery import Change
from pl_normkit.wrappers import unwrapped


@dataclass(frozen=True)
class _Layer:
    """A layer whose scale a norm takes away, by path, and the norms with running statistics behind it."""

    path: str
    module: nn.Linear | _ConvNd
    batch_norms: tuple[_BatchNorm, ...]


class WeightProjection:
    """The projection of normalize-and-project: W <- W ||W_0|| / ||W|| for weights whose length a norm behind them takes away.

    Such a weight grows while it trains without changing what the network computes, and its effective learning rate falls with it: lr /
    ||W||^2 under SGD, lr / ||W|| under Adam (derived). Projected, it keeps its rate; a schedule must then lower it on purpose.

    A linear layer or convolution takes part where the traced model shows that norms alone read its output, through views and dropouts.
    A bias is scaled with it, and running statistics of batch norms behind it, so that the function stays in training and evaluation up
    to the norms' eps. Other weights are left alone: there the projection of the paper changes the function.

    Args:
        model: any module that is not sharded; its weights now are those whose lengths are kept.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for `audit`.

    Attributes:
        lengths: Frobenius norms to keep, by the weight's name.
        skipped: layers left alone, with the reason.

    Raises:
        NothingMatchedError: when no weight takes part.
        ConfigError: for sharded parameters.
        TraceError: when the model cannot be traced.

    Source: "Normalization and effective learning rates in reinforcement learning", arXiv 2407.01800 (abstract: a norm before each
    nonlinearity, and this projection). Which weights take part, biases and running statistics are derived here; scales and shifts of
    norms are not projected.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    >>> projection = WeightProjection(model, torch.randn(3, 2))
    >>> _ = model[0].weight.data.mul_(3.0)
    >>> {name: round(growth, 3) for name, growth in projection.growth().items()}
    {'0.weight': 3.0}
    >>> projection.project()
    >>> {name: round(growth, 3) for name, growth in projection.growth().items()}
    {'0.weight': 1.0}
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        model = unwrapped(model)
        if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
            raise ConfigError("the length of a weight is not known where each process holds a part of it", fix="use DDP or one device")
        graph = ModelGraph.from_model(model, example_inputs)
        self.skipped: list[Change] = []
        self._layers: dict[str, _Layer] = {}
        for path in dict.fromkeys(node.module for node in graph.nodes if node.kind is Kind.WEIGHT):
            found = _read(model, graph, path)
            if isinstance(found, str):
                self.skipped.append(Change(path, found))
            else:
                self._layers[f"{path}.weight".lstrip(".")] = found
        if not self._layers:
            raise NothingMatchedError("no weight whose length a norm takes away", evidence="; ".join(map(str, self.skipped)))
        self.lengths = {name: _length(layer) for name, layer in self._layers.items()}

    def growth(self) -> dict[str, float]:
        """||W|| / ||W_0|| of each weight that takes part; 2 is a quarter of the effective learning rate under SGD, half under Adam."""
        return {name: _length(layer) / self.lengths[name] for name, layer in self._layers.items()}

    @torch.no_grad()
    def project(self) -> None:
        """Bring all lengths back. A weight that is not finite, or zero, is left as it is."""
        for name, layer in self._layers.items():
            length = layer.module.weight.norm(dtype=torch.promote_types(layer.module.weight.dtype, torch.float32))
            factor = torch.where(length.isfinite() & (length > 0), self.lengths[name] / length, 1)
            _scale(layer, factor)

    def state_dict(self) -> dict[str, float]:
        """The lengths to keep, for a checkpoint."""
        return dict(self.lengths)

    def load_state_dict(self, lengths: Mapping[str, float]) -> None:
        """Keep the lengths of an earlier run. Raises DataError where they belong to other weights."""
        if set(lengths) != set(self.lengths):
            other = sorted(set(lengths) ^ set(self.lengths))
            raise DataError("the lengths belong to other weights", evidence=", ".join(other[:5]), fix="build the same model")
        self.lengths = dict(lengths)


def _read(model: nn.Module, graph: ModelGraph, path: str) -> _Layer | str:
    module = model.get_submodule(path)
    if not isinstance(module, (nn.Linear, _ConvNd)) or "weight" not in module._parameters:
        return f"{type(module).__name__} is not known as a layer with one weight of its own"
    own = f"{path}.weight".lstrip(".")
    nodes = [node for node in graph.nodes if own in node.parameters]
    if any(node.module != path for node in nodes) or sum(held is module.weight for held in _held(model)) > 1:
        return "its weight is read elsewhere too"
    others = set().union(*(norms_that_read(node, graph.norms) for node in nodes))
    if "" in others:
        return "more than norms read its output"
    behind = {reader.module for node in nodes for reader in _readers(node, {norm.node for norm in graph.norms})}
    batch_norms = [model.get_submodule(name) for name in sorted(behind)]
    if any(norm.module in behind and not _reads_only(norm.node, set(nodes)) for norm in graph.norms):
        return "the norm behind it reads another layer too"
    return _Layer(path, module, tuple(norm for norm in batch_norms if isinstance(norm, _BatchNorm)))


def _held(model: nn.Module) -> list[Tensor]:
    return [parameter for module in model.modules() for parameter in module._parameters.values() if parameter is not None]


def _readers(node: Node, norms: set[Node]) -> set[Node]:
    return {reader for user in node.users for reader in ({user} if user in norms else _readers(user, norms))}


def _reads_only(norm: Node, layers: set[Node]) -> bool:
    node = norm.inputs[0]
    while node.kind in PASSING and len(node.inputs) == 1 and node not in layers:
        node = node.inputs[0]
    return node in layers


def _length(layer: _Layer) -> float:
    return float(layer.module.weight.detach().double().norm())


def _scale(layer: _Layer, factor: Tensor) -> None:
    for held in (layer.module.weight, layer.module.bias):
        if held is not None:
            held.mul_(factor.to(held.dtype))
    for norm in layer.batch_norms:
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.mul_(factor.to(norm.running_mean.dtype))
            norm.running_var.mul_(factor.to(norm.running_var.dtype).square())
