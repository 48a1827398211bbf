"""IBN-a: the first half of the channels gets an instance norm, the rest a batch norm."""

from __future__ import annotations

__all__ = ["OPERATOR", "InstanceBatchNorm"]

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.norm_operators.operators import OldNorm, Operator, Place
from pl_normkit.methods.norm_operators.places import batch_norms


class InstanceBatchNorm(nn.Module):
    """Instance norm of the first channels, batch norm of the others, with the values of the old parameters and statistics."""

    def __init__(self, old: OldNorm, ratio: float) -> None:
        super().__init__()
        batch = old.module
        assert isinstance(batch, nn.modules.batchnorm._BatchNorm)
        if not 0 < int(old.width * ratio) < old.width:
            raise ConfigError("ratio leaves one of the two norms no channel", evidence=f"{ratio} of {old.width}")
        self.first = int(old.width * ratio)
        common: dict[str, Any] = {"eps": old.eps, "affine": batch.affine, "device": old.device, "dtype": old.dtype}
        self.instance = nn.InstanceNorm2d(self.first, **common)
        common |= {"momentum": batch.momentum, "track_running_stats": batch.track_running_stats}
        self.batch = nn.BatchNorm2d(old.width - self.first, **common)
        with torch.no_grad():
            for name, value in batch.state_dict().items():
                for part, values in ((self.instance, value[: self.first] if value.ndim else None), (self.batch, value)):
                    target = part._parameters.get(name) if name in part._parameters else part._buffers.get(name)
                    if target is not None and values is not None:
                        target.copy_(values[self.first :] if part is self.batch and values.ndim else values)

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape (batch, channels, height, width); the same shape."""
        return torch.cat([self.instance(x[:, : self.first]), self.batch(x[:, self.first :])], 1)


def _places(model: nn.Module, graph: ModelGraph | None) -> Iterator[Place]:
    """The first batch norm of each residual branch, but not where the last residual branch ends at the same resolution."""
    assert graph is not None
    modules = dict(model.named_modules())
    last = graph.residual_adds[-1].node.shape[2:] if graph.residual_adds else ()
    first: dict[str, tuple[int, ...]] = {}
    for add in graph.residual_adds:
        for branch in add.branches:
            names = [norm.module for norm in graph.norms if norm.kind == "batch" and norm.node in branch]
            if names:
                first.setdefault(names[0], add.node.shape[2:])
    for place in batch_norms(model, graph):
        if place.path not in first:
            continue
        reason = place.reason
        if type(modules[place.path]) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or len(last) != 2:
            reason = reason or "it normalizes no images"
        elif first[place.path] == last:
            reason = reason or "it is in the last stage, where instance norm takes away what tells classes apart"
        yield Place(place.path, reason)


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return InstanceBatchNorm(old, options["ratio"])


OPERATOR = Operator(
    name="ibn_a",
    formula="IN of the first half of the channels, BN of the others",
    source="Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, arXiv 1807.09441 (code)",
    replaces="the first batch norm of each residual branch but those of the last stage",
    places=_places,
    make=_make,
    kept="no",
    when="data of other looks (style, lighting) at test time than in training",
    options={"ratio": 0.5},
    needs="the traced model; statistics across ranks by `sync_batchnorm=True`",
    reads_graph=True,
)
