"""What a joint filter does on given inputs: whether its taps sum as they should, where they read, whether flat stays flat."""

from __future__ import annotations

__all__ = ["FilterCheck", "measure_filter"]

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.graph.trace import call_arguments
from pl_normkit.methods.guided_upsampling.modules import JointFilter
from pl_normkit.preserve import preserved
from pl_normkit.wrappers import unwrapped


@dataclass(frozen=True)
class FilterCheck:
    """One joint filter on one batch.

    Attributes:
        module: its path.
        tap_sum_error: largest distance of a pixel's sum of taps from 0 (residual form) or 1.
        outside: share of offsets that would leave the window, and are clamped.
        flat_error: largest change of a target of ones away from the border, by the taps and offsets of this batch.
        size: (height, width) of the map.
    """

    module: str
    tap_sum_error: float
    outside: float
    flat_error: float
    size: tuple[int, int]


def measure_filter(model: nn.Module, example_inputs: Any) -> list[FilterCheck]:
    """Run the inputs once and check every `JointFilter` that is called; the model, its buffers, mode and every RNG stay as they are.

    Args:
        model: a model that holds one, such as a `DeformableKernelNetwork`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        NothingMatchedError: when no joint filter is called.

    >>> from pl_normkit.methods.guided_upsampling import DeformableKernelNetwork
    >>> network = DeformableKernelNetwork(fast=True)
    >>> (check,) = measure_filter(network, (torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32)))
    >>> check.tap_sum_error < 1e-5, check.flat_error < 1e-5, check.size
    (True, True, (32, 32))
    """
    model = unwrapped(model)
    found: list[FilterCheck] = []

    def check(path: str) -> Any:
        def hook(module: JointFilter, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            found.append(_check(path, module, *arguments))

        return hook

    arguments, keywords = call_arguments(example_inputs)
    with ExitStack() as stack:
        stack.enter_context(preserved(model, buffers=True))
        stack.enter_context(torch.no_grad())
        for path, module in model.named_modules():
            if isinstance(module, JointFilter):
                stack.enter_context(module.register_forward_pre_hook(check(path)))
        model(*arguments, **keywords)
    if not found:
        raise NothingMatchedError("no JointFilter was called", fix="give a model that holds a DeformableKernelNetwork, and its inputs")
    return found


def _check(path: str, module: JointFilter, weights: Tensor, offsets: Tensor, target: Tensor) -> FilterCheck:
    sums = module.taps(weights).sum(1)
    flat = type(module).forward(module, weights, offsets, torch.ones_like(target))
    margin = module.filter_size // 2 + 1
    inner = flat[..., margin:-margin, margin:-margin]
    return FilterCheck(
        path,
        float((sums - (0.0 if module.residual else 1.0)).abs().max()),
        float((offsets.abs() > module.reach).float().mean()),
        float((inner - 1).abs().max()) if inner.numel() else 0.0,
        (target.shape[-2], target.shape[-1]),
    )
