"""`fold`: equalizers into the convolutions that read them, for deployment and for the initialization form."""

from __future__ import annotations

__all__ = ["BORDERS", "Border", "fold", "is_folded", "why_not_foldable"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pl_normkit.errors import ConfigError, EditError, NothingMatchedError
from pl_normkit.methods.fusion_scale.absorbing_layers import border_of, resolve_path
from pl_normkit.methods.fusion_scale.calibrate import equalizers_of
from pl_normkit.methods.fusion_scale.modules import NAME, PADDING_NAME, MeanPadding, ScaleEqualizer
from pl_normkit.surgery import Change, Changes, Edit, Insert, Remove, SetAttributes, Undo, apply_edits, get_module
from pl_normkit.wrappers import unwrapped

Border = Literal["keep", "pad", "ignore"]
BORDERS = ("keep", "pad", "ignore")

_MARK = "_has_folded_equalizer"


def is_folded(module: nn.Module) -> bool:
    """Whether an equalizer was folded into this layer's weight."""
    return getattr(module, _MARK, False)


def fold(model: nn.Module, *, border: Border = "keep") -> Changes:
    """Put the statistics of every calibrated equalizer into the convolution that reads it, and take the equalizer out.

    `W_i <- W_i / sigma_i`, and what the means add goes into the convolution's bias, or into the running mean of the batch norm that
    follows, through a convolution in between where there is one. In evaluation mode the function is the same up to rounding. Where
    it would not be, the equalizer stays and `skipped` says why: other layers than a plain convolution read the features, or
    their weight is shared, or computed, or sharded, or nothing after the convolution can hold a constant.

    Args:
        model: edited in place; weights keep their Parameter objects, the equalizers' buffers leave the state_dict.
        border: what to do with convolutions that pad with zeros. A zero stands for the mean before folding and for zero after it, so
            their outermost outputs change. `"keep"` keeps the equalizer there; `"pad"` pads with the means instead, exact, by a module
            that costs about as much as the equalizer; `"ignore"` folds and accepts the border, which `skipped` then names.

    Raises:
        NothingMatchedError: when the model holds no equalizer and none was folded before.
        ConfigError: for another `border`.

    Source: derived here; arXiv 2402.01149 calls its equalizer a cost-free initialization of the fusion weights (public review).

    >>> import segmentation_models_pytorch as smp
    >>> from pl_normkit import equalize_scales
    >>> model = smp.FPN("resnet18", encoder_weights=None, decoder_merge_policy="cat")
    >>> changes = equalize_scales(model, [torch.rand(2, 3, 64, 64)])
    >>> folded = fold(model, border="ignore")
    >>> [name for name, module in model.named_modules() if isinstance(module, ScaleEqualizer)]
    []
    """
    if border not in BORDERS:
        raise ConfigError(f"unknown border {border!r}", fix=f"one of {', '.join(BORDERS)}")
    model = unwrapped(model)
    equalizers = equalizers_of(model)
    if not equalizers and not any(is_folded(module) for module in model.modules()):
        raise NothingMatchedError("the model holds no scale equalizer to fold", fix="equalize_scales inserts them")
    edits: list[Edit] = []
    skipped: list[Change] = []
    for path, equalizer in equalizers.items():
        host = path.removesuffix(f".{NAME}")
        reason = _obstacle(model, host, equalizer, border)
        if reason:
            skipped.append(Change(host, f"its equalizer stays: {reason}"))
        else:
            edits += _edits(model, host, equalizer, border, skipped)
    return apply_edits(model, edits, skipped)


def _obstacle(model: nn.Module, host: str, equalizer: ScaleEqualizer, border: Border) -> str:
    if not equalizer.obstacle and not equalizer.is_calibrated:
        return "it was never calibrated"
    return why_not_foldable(model, host, equalizer.folds_into, equalizer.obstacle, border)


def why_not_foldable(model: nn.Module, host: str, folds_into: Sequence[str], obstacle: str, border: Border) -> str:
    """Why an equalizer at `host` would stay, "" where `fold` would take it; `folds_into` and `obstacle` as in `ScaleEqualizer`."""
    if obstacle:
        return obstacle
    layers = _layers(model, host, folds_into)
    if any(isinstance(parameter, DTensor) for layer in layers for parameter in layer.parameters()):
        return "the weights are sharded"
    if any(layer._parameters.get("weight") is None for layer in layers if isinstance(layer, _ConvNd)):
        return "the weight is computed from others"
    padded = _padded_layers(layers)
    if not padded or border == "ignore":
        return ""
    if border == "keep":
        return 'the convolution pads with zeros, so folding is inexact at the border (border="ignore" folds it anyway)'
    return "" if padded == [0] and _can_pad(layers[0]) else "a padding that cannot be replaced"


def _layers(model: nn.Module, host: str, folds_into: Sequence[str]) -> list[nn.Module]:
    return [get_module(model, resolve_path(host, relative)) for relative in folds_into]


def _padded_layers(layers: Sequence[nn.Module]) -> list[int]:
    """Positions of the convolutions that pad a shifted input with zeros."""
    return [position for position, layer in enumerate(layers) if isinstance(layer, _ConvNd) and border_of(layer)]


def _can_pad(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and not isinstance(layer.padding, str) and PADDING_NAME not in layer._modules


def _edits(model: nn.Module, host: str, equalizer: ScaleEqualizer, border: Border, skipped: list[Change]) -> list[Edit]:
    paths = tuple(resolve_path(host, relative) for relative in equalizer.folds_into)
    edits: list[Edit] = [_FoldIntoWeights(paths, host), Remove(host, NAME, f"equalizer folded into {', '.join(paths)}")]
    layers = _layers(model, host, equalizer.folds_into)
    if _padded_layers(layers):
        layer = layers[0]
        assert isinstance(layer, _ConvNd)
        if border == "ignore":
            skipped.append(Change(paths[0], "folded, but its zero padding no longer stands for the means: outputs at the border differ"))
        else:
            assert not isinstance(layer.padding, str)
            padding = MeanPadding(equalizer.mean.to(layer.weight.dtype), layer.padding)
            edits.append(Insert(paths[0], PADDING_NAME, padding, "pads with the means of the folded branches"))
            edits.append(SetAttributes(paths[0], {"padding": (0,) * len(layer.padding)}, "no zero padding of its own"))
    return edits


@dataclass(frozen=True)
class _FoldIntoWeights:
    """Multiply the weight of the first layer, and hand the constant on to the last."""

    paths: tuple[str, ...]
    host: str

    def check(self, model: nn.Module) -> None:
        for path in self.paths:
            get_module(model, path)

    def is_done(self, model: nn.Module) -> bool:
        return NAME not in get_module(model, self.host)._modules

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        equalizer = get_module(model, f"{self.host}.{NAME}")
        if not isinstance(equalizer, ScaleEqualizer):
            raise EditError("there is no equalizer to fold", where=self.host)
        layers = [get_module(model, path) for path in self.paths]
        changed = _targets(layers)
        saved = [tensor.detach().clone() for tensor in changed]
        first = layers[0]
        was_marked = is_folded(first)

        def undo() -> None:
            _write(changed, saved)
            if not was_marked:
                delattr(first, _MARK)

        _write(changed, _folded(layers, equalizer.scale.double(), equalizer.shift.double()))
        setattr(first, _MARK, True)
        return Change(self.paths[0], f"weight divided by the std of its {len(equalizer.widths)} branches"), undo


def _targets(layers: Sequence[nn.Module]) -> list[Tensor]:
    """What folding writes to: the first weight, and the last layer's bias or running mean."""
    first, last = layers[0], layers[-1]
    assert isinstance(first, _ConvNd)
    held = last.running_mean if isinstance(last, _BatchNorm) else last.bias
    assert isinstance(held, Tensor)
    return [first.weight, held]


@torch.no_grad()
def _folded(layers: Sequence[nn.Module], scale: Tensor, shift: Tensor) -> list[Tensor]:
    """New values of `_targets`, computed in float64."""
    first, last = layers[0], layers[-1]
    weight, held = _targets(layers)
    assert isinstance(first, _ConvNd)
    constant = shift
    for layer in layers:
        if isinstance(layer, _ConvNd):
            constant = (layer.weight.double() * _per_weight(layer, constant)).flatten(1).sum(1)
    sign = -1 if isinstance(last, _BatchNorm) else 1
    return [weight.double() * _per_weight(first, scale), held.double() + sign * constant]


def _per_weight(layer: _ConvNd, values: Tensor) -> Tensor:
    """Values per input channel, shape (C_in,), in the layout of the weight: (C_out, C_in / groups, 1, ...)."""
    per_group = values.to(layer.weight.device).view(layer.groups, 1, layer.in_channels // layer.groups)
    spread = per_group.expand(-1, layer.out_channels // layer.groups, -1).reshape(layer.out_channels, -1)
    return spread.view(*spread.shape, *(1,) * len(layer.kernel_size))


@torch.no_grad()
def _write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
