"""The fix: a resampled positional embedding gets its variance back."""

from __future__ import annotations

__all__ = ["is_rescaled", "rescale_positional_embedding"]

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import EditError, NothingMatchedError, TraceError
from pl_normkit.methods.positional_variance.find import PositionalSite, patch_variance, trace_site
from pl_normkit.methods.positional_variance.pipelines.resampling import Resampling, as_rows, find_resampling, patch_rows
from pl_normkit.surgery import Change, Changes, Undo, apply_edits, get_module
from pl_normkit.wrappers import unwrapped

_RECORD = "positional_embedding_variance"
_CLOSE = 1e-6


def rescale_positional_embedding(
    model: nn.Module, example_inputs: Any = None, *, original: Tensor | Mapping[str, Any] | None = None
) -> Changes:
    """Multiply the patch positions of a resampled embedding by 1 / sqrt(k), k = Var[P_resampled] / Var[P_original].

    k is measured, never assumed: against `original` where it is given; else, where the forward pass resamples, against the parameter;
    else against the original that is recovered from the parameter's values, which works until it is trained at the new size and
    for enlarged grids only. Embeddings of class, distillation and register tokens stay. A second call changes nothing.

    Args:
        model: edited in place; keys and parameter objects stay.
        example_inputs: images of the size the model will run at: a tensor, a tuple of positional or a dict of keyword arguments.
            Without it a size is tried that fits the embedding. Where the forward pass resamples, the embedding is scaled for this size.
        original: the embedding before resampling, (1, L, D), (L, D) or (1, H, W, D), with or without its prefix tokens, or the
            state_dict that holds it under its name.

    Raises:
        NothingMatchedError: without an absolute positional embedding, or where no resampling can be found.
        EditError: for an `original` that does not fit, or a model on the meta device.
        TraceError: where the model cannot be traced. The model is untouched in each case.

    Source: the scaling by 1 / sqrt(k) is published (public reviews of arXiv 2405.14115); the definition of k, variance over channels
    and mean over patch positions, and the recovery of the original are derived here.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    >>> before = model.pos_embed.detach().clone()
    >>> state = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    >>> changes = rescale_positional_embedding(model, original=state)
    >>> changes.undo()
    >>> torch.equal(model.pos_embed, before)
    True
    """
    network = unwrapped(model)
    site = _site(network, example_inputs)
    parameter = network.get_parameter(site.parameter)
    if parameter.is_meta:
        raise EditError("k is measured, and a model on the meta device has no values", where=site.parameter, fix="load the weights first")
    rows = patch_rows(network, site)
    if original is None and is_rescaled(network, site):
        return Changes(skipped=[Change(site.parameter, "has its variance already")])
    found = find_resampling(network, site) if original is None else _against(network, site, rows, original)
    if found is None:
        raise NothingMatchedError(
            "the positional embedding shows no resampling",
            where=site.parameter,
            evidence="it has full rank along rows and columns, and the forward pass does not interpolate it",
            fix="pass original=, the embedding before it was resampled (needed after training at the new size, and for smaller grids)",
        )
    if abs(found.k - 1.0) <= _CLOSE:
        return Changes(skipped=[Change(site.parameter, f"has its variance already ({found})")])
    values = _scaled(parameter, site, rows, 1.0 / math.sqrt(found.k))
    record = patch_variance(as_rows(values, site)[rows])
    return apply_edits(network, [_SetPositions(site.parameter, values, f"patch positions / sqrt(k): {found}", record)])


@dataclass(frozen=True)
class _SetPositions:
    """Write `values` into the parameter `name`, in place, and keep their variance as a plain attribute of its module.

    A later call could not tell from the values that they are scaled: they have the rank of interpolated ones as before.
    """

    name: str
    values: Tensor
    what: str
    variance: float

    def check(self, model: nn.Module) -> None:
        module = get_module(model, self.name.rpartition(".")[0])
        if hasattr(module, _RECORD) and _RECORD not in vars(module):
            raise EditError(f"{_RECORD!r} is taken in {type(module).__name__}", where=self.name)

    def is_done(self, model: nn.Module) -> bool:
        return torch.equal(model.get_parameter(self.name).detach(), self.values)

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        module, parameter = get_module(model, self.name.rpartition(".")[0]), model.get_parameter(self.name)
        before, record = parameter.detach().clone(), vars(module).get(_RECORD)

        def undo() -> None:
            parameter.data.copy_(before)
            vars(module).pop(_RECORD, None)
            if record is not None:
                setattr(module, _RECORD, record)

        parameter.data.copy_(self.values)
        setattr(module, _RECORD, self.variance)
        return Change(self.name, self.what), undo


def is_rescaled(model: nn.Module, site: PositionalSite) -> bool:
    """Whether the patch positions are as `rescale_positional_embedding` left them."""
    owner = get_module(model, site.parameter.rpartition(".")[0])
    recorded = vars(owner).get(_RECORD)
    if recorded is None:
        return False
    now = patch_variance(as_rows(model.get_parameter(site.parameter).detach(), site)[patch_rows(model, site)])
    return math.isclose(now, recorded, rel_tol=_CLOSE)


@torch.no_grad()
def _scaled(parameter: Tensor, site: PositionalSite, rows: Tensor, factor: float) -> Tensor:
    """A copy of the embedding with its patch positions multiplied."""
    gain = torch.ones(parameter.numel() // site.width, dtype=torch.float64, device=parameter.device)
    gain[rows.to(parameter.device)] = factor
    channels_last = parameter.shape[-1] == site.width
    shaped = gain.reshape(*parameter.shape[:-1], 1) if channels_last else gain.reshape(1, 1, *parameter.shape[-2:])
    return (parameter.double() * shaped).to(parameter.dtype)


def _against(model: nn.Module, site: PositionalSite, rows: Tensor, original: Tensor | Mapping[str, Any]) -> Resampling:
    """The resampling from a given original to what the parameter holds now."""
    values = original.get(site.parameter) if isinstance(original, Mapping) else original
    if not isinstance(values, Tensor) or values.shape[-1] != site.width:
        seen = f"{tuple(values.shape)}" if isinstance(values, Tensor) else "no tensor under this name"
        raise EditError("the original does not fit the positional embedding", where=site.parameter, evidence=seen, fix="(1, L, D)")
    now = as_rows(model.get_parameter(site.parameter).detach(), site)
    before = as_rows(values.detach(), site)
    prefix = len(now) - len(rows)
    if math.isqrt(len(before)) ** 2 != len(before) or math.isqrt(max(len(before) - prefix, 0)) ** 2 == len(before) - prefix:
        before = before[prefix:]
    return Resampling(patch_variance(before), patch_variance(now[rows]), None, site.grid, in_forward=False)


def _site(model: nn.Module, example_inputs: Any) -> PositionalSite:
    if example_inputs is not None:
        return trace_site(model, example_inputs)
    failure: Exception | None = None
    for inputs in _guessed_inputs(model):
        try:
            return trace_site(model, inputs)
        except (TraceError, NothingMatchedError) as error:
            failure = error
    raise NothingMatchedError(
        "no example inputs, and no image size that fits a positional embedding",
        where=type(model).__name__,
        evidence=str(failure).splitlines()[0] if failure else "no patch projection with an embedding of its width",
        fix="pass example_inputs=(images,)",
    )


def _guessed_inputs(model: nn.Module) -> Iterator[tuple[Tensor]]:
    """Images whose patches fit an embedding of the patch projection's width: first without prefix tokens, then with more and more."""
    device = next((parameter.device for parameter in model.parameters()), None)
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.kernel_size != module.stride or module.kernel_size == (1, 1):
            continue
        lengths = {p.numel() // module.out_channels for p in model.parameters() if p.dim() > 1 and p.shape[-1] == module.out_channels}
        for prefix in range(8):
            for length in sorted(lengths):
                side = math.isqrt(max(length - prefix, 0))
                if side > 1 and side * side == length - prefix:
                    size = [side * kernel for kernel in module.kernel_size]
                    yield (torch.zeros(1, module.in_channels, *size, device=device),)
        return
