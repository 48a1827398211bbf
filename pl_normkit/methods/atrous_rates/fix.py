"""The fix: dilation and padding of the ASPP branches, and nothing else."""

from __future__ import annotations

__all__ = ["check_rates", "edits_for", "fit_atrous_rates", "image_size", "set_atrous_rates"]

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import ConfigError, EditError, NormkitWarning, NothingMatchedError
from pl_normkit.methods.atrous_rates.find import Aspp, AsppBranch, find_aspps
from pl_normkit.methods.atrous_rates.rates import CENTRE, check_size, fitted_rates
from pl_normkit.surgery import Change, Changes, Filter, SetAttributes, apply_edits, get_module
from pl_normkit.wrappers import unwrapped


def set_atrous_rates(
    model: nn.Module,
    input_size: int | tuple[int, int],
    *,
    rates: Sequence[int] | None = None,
    c: float = CENTRE,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
) -> Changes:
    """Give every ASPP of `model` the rates that fit the training crop: dilation and padding change, weights and keys stay.

    ASPP is found by structure (parallel dilated convolutions of one value, joined by a concatenation or a sum), so dilated
    convolutions of the encoder are left alone; its output stride is read from the traced sizes. Separable and grouped branches
    and the padding modes of `nn.Conv2d` are served. The smallest rate goes to the branch whose rate is smallest now.

    Rates are attributes and no part of a state_dict: build the model and set them before weights trained with them are loaded.

    Args:
        model: edited in place.
        input_size: height and width of the training crop in pixels, or its side.
        rates: rising rates to set instead of those of `atrous_rates`; one that is dead on this crop gives a NormkitWarning.
        c: as for `atrous_rates`.
        example_inputs: what `model` is called with, of any size; needed where it takes more than one image tensor.
        filter_fn: called with (dilated convolution, path); an ASPP stays as it is when one of its branches is not chosen.

    Returns:
        the edits; empty when every rate already fits. `skipped` lists branches that could not be edited, and why.

    Raises:
        NothingMatchedError: when the model has no ASPP that can be edited.
        ConfigError: for a bad size, c or rates, and where no three live rates exist (3 cells or fewer).
        TraceError: when the model cannot be read. The model is untouched in each case.

    Source: the rule for the rates is derived here (see `atrous_rates`).

    >>> import segmentation_models_pytorch as smp
    >>> model = smp.DeepLabV3Plus("resnet18", encoder_weights=None)
    >>> changes = set_atrous_rates(model, 512)
    >>> model.decoder.aspp[0].convs[1][0][0].dilation
    (5, 5)
    """
    model = unwrapped(model)
    size = check_size(input_size)
    wanted = None if rates is None else check_rates(rates)
    inputs = _images(model, size) if example_inputs is None else example_inputs
    found = find_aspps(model, inputs)
    if not found:
        raise NothingMatchedError(
            "the model has no ASPP",
            evidence="no parallel dilated convolutions of one feature map are joined by a concatenation or a sum",
            fix="set dilation and padding of other convolutions by hand",
        )
    plan = {aspp: _rates_for(aspp, size, wanted, c) if _is_chosen(model, aspp, filter_fn) else "not chosen by the filter" for aspp in found}
    return _set(model, inputs, plan)


def fit_atrous_rates(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """`set_atrous_rates` for the size of the image in `example_inputs`."""
    size = image_size(example_inputs)
    if size is None:
        raise NothingMatchedError("the example inputs hold no image (N, C, H, W), whose size would give the rates")
    return set_atrous_rates(model, size, example_inputs=example_inputs, filter_fn=filter_fn)


def image_size(inputs: Any) -> tuple[int, int] | None:
    """(height, width) of the largest tensor (N, C, H, W) among the inputs, None without any."""
    images = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() == 4]
    largest = max(images, key=Tensor.numel, default=None)
    return None if largest is None else (int(largest.shape[-2]), int(largest.shape[-1]))


def _is_chosen(model: nn.Module, aspp: Aspp, filter_fn: Filter | None) -> bool:
    return filter_fn is None or all(filter_fn(model.get_submodule(branch.module), branch.module) for branch in aspp.branches)


def check_rates(rates: Sequence[int]) -> tuple[int, ...]:
    """Rising whole rates. Raises ConfigError."""
    given = tuple(rates) if isinstance(rates, (tuple, list)) else ()
    if not given or not all(type(rate) is int and rate > 0 for rate in given) or list(given) != sorted(set(given)):
        raise ConfigError("atrous rates must be rising positive whole numbers", evidence=repr(rates), fix="write (6, 12, 18)")
    return given


def edits_for(model: nn.Module, rates: Mapping[str, int]) -> list[SetAttributes]:
    """The edits that give the convolutions at these paths these dilations, with the padding that keeps their map's size."""
    return [SetAttributes(path, _attributes(_convolution(model, path), rate), f"atrous rate {rate}") for path, rate in rates.items()]


def _images(model: nn.Module, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Two images of the size on the meta device, in the channels of the model's first convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    dtype = first.weight.dtype if first is not None else torch.float32
    return (torch.zeros(2, first.in_channels if first is not None else 3, *size, dtype=dtype, device="meta"),)


def _rates_for(aspp: Aspp, size: tuple[int, int], wanted: tuple[int, ...] | None, c: float) -> tuple[int, ...] | str:
    """Rates for the branches, by rising rate; why there are none otherwise."""
    side = math.ceil(min(size) / aspp.output_stride)
    count = len(aspp.branches)
    if wanted is None:
        return fitted_rates(side, c) if count == 3 else f"it has {count} dilated branches, and the rule is for three: give rates="
    if len(wanted) != count:
        return f"it has {count} dilated branches, not {len(wanted)}"
    for branch, rate in zip(aspp.branches, wanted, strict=True):
        if branch.pads_zeros and rate >= side:
            warnings.warn(
                f"atrous rate {rate} of {branch.module} is dead: the feature map has {side} cells, and 8 of 9 taps always read padding",
                NormkitWarning,
                stacklevel=4,
            )
    return wanted


def _set(model: nn.Module, inputs: Any, plan: Mapping[Aspp, tuple[int, ...] | str]) -> Changes:
    skipped: list[Change] = []
    rates: dict[str, int] = {}
    for aspp, wanted in plan.items():
        if isinstance(wanted, str):
            skipped.append(Change(aspp.node.module, f"this ASPP stays: {wanted}"))
            continue
        reasons = [(branch, why) for branch in aspp.branches if (why := _why_not(model, branch))]
        skipped += [Change(branch.module, f"this ASPP stays: {why}") for branch, why in reasons]
        if not reasons:
            for branch, rate in zip(aspp.branches, wanted, strict=True):
                rates[branch.module] = min(rate, rates.get(branch.module, rate))
    if not rates:
        raise NothingMatchedError("no ASPP of the model can be given rates", evidence="; ".join(map(str, skipped)))
    changes = apply_edits(model, edits_for(model, rates), skipped)
    if not all(_reaches_by_padding(_convolution(model, path)) for path in rates):
        _check_sizes(model, inputs, plan, changes)
    return changes


def _why_not(model: nn.Module, branch: AsppBranch) -> str:
    """Why the rate of this branch cannot be set, "" where it can."""
    module = model.get_submodule(branch.module)
    if not isinstance(module, nn.Conv2d):
        return "its convolution is a function call; change the rate in the code"
    source = branch.node.inputs[0]
    if source.op in ("pad", "constant_pad_nd") and source.module != branch.module:
        return f"it is padded by {source.module or 'a function call'}; change padding and rate in the code"
    return ""


def _check_sizes(model: nn.Module, inputs: Any, plan: Mapping[Aspp, Any], changes: Changes) -> None:
    """Convolutions of other classes pad as they please: see in a second trace that every map kept its size."""
    before = {aspp.node.module: aspp.node.shape for aspp in plan}
    try:
        after = {aspp.node.module: aspp.node.shape for aspp in find_aspps(model, inputs)}
    except BaseException:
        changes.undo()
        raise
    if before != after:
        changes.undo()
        raise EditError("new rates change the size of a feature map", evidence=f"{before} became {after}", fix="set them in the code")


def _attributes(conv: nn.Conv2d, rate: int) -> dict[str, Any]:
    """Dilation on the axes along which the kernel is longer than 1, and the padding that goes with it."""
    dilation = tuple(rate if k > 1 else d for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    values: dict[str, Any] = {"dilation": dilation}
    if not _reaches_by_padding(conv):
        return values
    padding = _reach(conv.kernel_size, dilation)
    if not isinstance(conv.padding, str):
        values["padding"] = padding
    values["_reversed_padding_repeated_twice"] = type(conv._reversed_padding_repeated_twice)(p for p in reversed(padding) for _ in range(2))
    return values


def _reaches_by_padding(conv: nn.Conv2d) -> bool:
    """Whether its own padding is what keeps the size of its map."""
    return conv.padding == "same" or conv.padding == _reach(conv.kernel_size, conv.dilation)


def _reach(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))


def _convolution(model: nn.Module, path: str) -> nn.Conv2d:
    module = get_module(model, path)
    if not isinstance(module, nn.Conv2d):
        raise EditError(f"{path!r} is a {type(module).__name__}, no Conv2d with a rate")
    return module
