"""`merge_batch_norms`: progressive batch norms that have turned become part of the next linear layers."""

from __future__ import annotations

__all__ = ["merge_batch_norms"]

from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.graph import ModelGraph, Node
from pl_normkit.methods.norm_operators.fold import folded_values, layers_behind, why_layers_cannot
from pl_normkit.methods.norm_operators.last_dim import Layer, readers_by_parameter
from pl_normkit.methods.norm_operators.operators.prepbn import ProgressiveBatchNorm
from pl_normkit.methods.norm_operators.weights import convert_checked, refuse_sharded
from pl_normkit.surgery import Change, Changes, Edit, Filter, Replace
from pl_normkit.values import SetValues
from pl_normkit.wrappers import unwrapped


def merge_batch_norms(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """Put the norms of `swap_norms(model, to="prepbn")` into the linear layers that read them, after their schedule; for inference.

    In evaluation such a norm is a gain a = gamma / sigma + eta and a shift beta - gamma mu / sigma of each channel, so the next layer takes
    it: `W <- W diag(a)`, `c <- c + W shift` with the old W, and an identity stands in its place. A norm is merged where the traced model
    shows that linear layers alone read its output, as for `fold_norms`; `skipped` says why the others are not.

    Args:
        model: edited in place.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the model is run on them before and after, and
            left as it was where the outputs differ.
        filter_fn: called with (module, path) for each norm, says whether to merge it.

    Raises:
        NothingMatchedError: when no norm can be merged; its evidence lists the reasons.
        EditError: for weights that are sharded or on the meta device.
        TraceError: when `torch.export` cannot read the model. The model is untouched in each case.

    Source: SLAB, arXiv 2405.11582 (code), merges into the next layer alike; the conditions are derived here.

    >>> from pl_normkit import swap_norms
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> changes = swap_norms(model, to="prepbn")
    >>> _ = model[1].share.zero_()  # what NormSchedule does over training
    >>> print(merge_batch_norms(model.eval(), torch.randn(5, 4)))
    1: batch norm merged into 2
    1: an identity
    """
    model = unwrapped(model)
    refuse_sharded(model)
    graph = ModelGraph.from_model(model, example_inputs, training=False)
    readers = readers_by_parameter(graph)
    edits: list[Edit] = []
    skipped: list[Change] = []
    for path, norm in model.named_modules():
        if not isinstance(norm, ProgressiveBatchNorm):
            continue
        found = "not chosen by the filter" if filter_fn is not None and not filter_fn(norm, path) else _layers(norm, path, graph, readers)
        if isinstance(found, str):
            skipped.append(Change(path, found))
            continue
        gain, shift = _gain_and_shift(norm)
        names = ", ".join(sorted({layer.node.module for layer in found}))
        edits.append(SetValues(path, folded_values(model, found, gain, shift), f"batch norm merged into {names or 'the model'}"))
        edits.append(Replace(path, nn.Identity(), "an identity", set(norm.state_dict())))
    if not edits:
        raise NothingMatchedError("no progressive batch norm can be merged", evidence="; ".join(map(str, skipped)))
    return convert_checked(model, example_inputs, edits, skipped)


def _layers(norm: ProgressiveBatchNorm, path: str, graph: ModelGraph, readers: dict[str, set[Node]]) -> list[Layer] | str:
    """The layers that read the norm, or why they cannot take it."""
    if float(norm.share) > 0:
        return f"its share of the layer norm is {float(norm.share):.2g}, not 0"
    nodes = [node for node in graph.nodes if node.module == path]
    ends = [node for node in nodes if any(user.module != path for user in node.users) or any(u.op == "output" for u in node.target.users)]
    if norm.axis != -1 or not path or norm._forward_hooks or norm._forward_pre_hooks:
        return "its channels are not the last dimension, or it has hooks, or it is the model itself"
    if len(ends) != 1:
        return f"it runs {len(ends)} times"
    layers = layers_behind(ends[0])
    return layers if isinstance(layers, str) else (why_layers_cannot(layers, readers, has_shift=True) or layers)


@torch.no_grad()
def _gain_and_shift(norm: ProgressiveBatchNorm) -> tuple[Tensor, Tensor]:
    scale = norm.batch_weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale + norm.eta.double(), norm.batch_bias.double() - scale * norm.running_mean.double()
