"""`to_scalenorm`: RMS norms to ScaleNorms that compute the same."""

from __future__ import annotations

__all__ = ["to_scalenorm"]

import math
from typing import Any

import torch
from torch import nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.graph import ModelGraph
from pl_normkit.graph.structure import Norm
from pl_normkit.methods.norm_operators.fold import Affine, folded_values, read_affine
from pl_normkit.methods.norm_operators.last_dim import readers_by_parameter
from pl_normkit.methods.norm_operators.modules import ShiftedRMSNorm
from pl_normkit.methods.norm_operators.operators.scalenorm import ScaleNorm
from pl_normkit.methods.norm_operators.places import old_norm, row_norms
from pl_normkit.methods.norm_operators.weights import convert_checked, refuse_sharded
from pl_normkit.norm_modules import eps_of, is_written_rms_norm
from pl_normkit.surgery import Change, Changes, Edit, Filter, Replace, get_module
from pl_normkit.values import SetValues
from pl_normkit.wrappers import unwrapped


def to_scalenorm(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """Turn RMS norms into ScaleNorms with the same function in eval mode, for inference: one number a norm is left of its scale.

    An RMS norm without scale is g x / sqrt(||x||^2 + width eps) with g = sqrt(width), so its scale (and a shift, as `to_rmsnorm` leaves
    one) first goes into the linear layers that read it, as `fold_norms` does. A norm is left alone, and `skipped` says why, where the
    scale cannot go there and is not the same for all channels; where it is, g takes it. The published ScaleNorm divides by
    max(||x||, eps): here eps stays where the RMS norm has it, under the root, for else small rows would change.

    A layer norm takes a mean away, which no ScaleNorm does: turn it by `to_rmsnorm` first where that is exact. Where nothing here is
    exact, `swap_norms(model, to="scalenorm")` replaces norms before training.

    Args:
        model: edited in place. Keys `weight` and `bias` of the norms go, `g` comes.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as for `audit`; the model is run on them before
            and after, and left as it was where the outputs differ.
        filter_fn: called with (module, path) for each norm, says whether to turn it.

    Raises:
        NothingMatchedError: when no norm can be turned; its evidence lists the reasons.
        EditError: for weights that are sharded or on the meta device.
        TraceError: when `torch.export` cannot read the model. The model is untouched in each case.

    Source: "Transformers without Tears", arXiv 1910.05895, is ScaleNorm. That an RMS norm is one once its scale is gone is derived here:
    tests/methods/norm_operators/test_scale_conversion.py.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 2)).eval()
    >>> print(to_scalenorm(model, torch.randn(5, 4)))
    1: scale folded into 2
    1: ScaleNorm in place of RMSNorm
    >>> sorted(model[1].state_dict()), round(model[1].g.item(), 3)
    (['g'], 2.828)
    """
    model = unwrapped(model)
    refuse_sharded(model)
    graph = ModelGraph.from_model(model, example_inputs, training=False)
    readers = readers_by_parameter(graph)
    reasons = {place.path: place.reason for place in row_norms(model, None)}
    edits: list[Edit] = []
    skipped: list[Change] = []
    for path, norm in {norm.module: norm for norm in graph.norms if norm.kind in ("layer", "rms")}.items():
        module = get_module(model, path)
        if isinstance(module, ScaleNorm):
            continue
        reason = _why_not(module, norm, reasons)
        if filter_fn is not None and not filter_fn(module, path):
            reason = "not chosen by the filter"
        found = reason or read_affine(norm, readers)
        if not reason and isinstance(found, str) and _is_uniform(module):
            found = Affine("", "", (), ())  # g takes it
        if isinstance(found, str):
            skipped.append(Change(path, found))
        else:
            edits += _edits(model, path, found)
    if not edits:
        raise NothingMatchedError("no RMS norm can be turned into a ScaleNorm", evidence="; ".join(map(str, skipped)))
    return convert_checked(model, example_inputs, edits, skipped, precision=_precision(model, edits))


def _why_not(module: nn.Module, norm: Norm, reasons: dict[str, str]) -> str:
    if norm.kind == "layer":
        return "it is a layer norm, and takes the mean away: turn it by to_rmsnorm first"
    if not norm.module or (type(module) is not ShiftedRMSNorm and norm.module not in reasons):
        return "no module of its own computes it alone"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    return "" if type(module) is ShiftedRMSNorm else reasons[norm.module]


def _is_uniform(module: nn.Module) -> bool:
    """Whether a norm scales all channels alike and shifts none."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (weight is None or bool((weight == weight.flatten()[0]).all())) and not (bias is not None and bool(bias.any()))


@torch.no_grad()
def _edits(model: nn.Module, path: str, found: Affine) -> list[Edit]:
    old = get_module(model, path)
    norm = old_norm(old)
    new = ScaleNorm(norm, norm.width * norm.eps, under_root=True)
    edits: list[Edit] = []
    if found.layers:
        gamma = norm.weight.double() if norm.weight is not None else norm.ones().double()
        shift = model.get_parameter(found.beta).double() if found.beta else None
        values = folded_values(model, found.layers, gamma * (math.sqrt(norm.width) / new.g.double()), shift)
        names = ", ".join(sorted({layer.node.module for layer in found.layers}))
        edits.append(SetValues(path, values, f"scale{' and shift' if found.beta else ''} folded into {names or 'the model'}"))
    elif norm.weight is not None:
        new.g.copy_(norm.weight.double().flatten()[:1] * math.sqrt(norm.width))
    keys = set(old.state_dict()) ^ set(new.state_dict())
    return [*edits, Replace(path, new, f"ScaleNorm in place of {type(old).__name__}", keys)]


@torch.no_grad()
def _precision(model: nn.Module, edits: list[Edit]) -> torch.dtype | None:
    """float32 where one of the norms rounds to it whatever it gets, as Llama's does; else None."""
    for edit in edits:
        old = get_module(model, edit.path) if isinstance(edit, Replace) else None
        weight = None if old is None else old._parameters.get("weight")
        if old is None or weight is None or weight.dtype != torch.float64 or not is_written_rms_norm(old):
            continue
        rows = torch.linspace(-1, 2, 3 * weight.numel(), device=weight.device, dtype=weight.dtype).reshape(3, -1)
        exact = nn.functional.rms_norm(rows, weight.shape, weight, eps_of(old))
        if float((old(rows) - exact).abs().max()) > 1e-10:
            return torch.float32
    return None
