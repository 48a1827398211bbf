"""Does the scale keep the second moment of the pooled features, on this model and these inputs?"""

from __future__ import annotations

__all__ = ["ACCEPTED", "SecondMoments", "measure_second_moments"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.graph import call_arguments
from pl_normkit.methods.stochastic_pooling.fix import PLAIN, STOCHASTIC, is_default_pool
from pl_normkit.methods.stochastic_pooling.functional import check_keep, pool_spec, second_moments
from pl_normkit.methods.stochastic_pooling.geometry import windows_of
from pl_normkit.preserve import preserved
from pl_normkit.surgery import Filter

ACCEPTED = (0.8, 1.25)


@dataclass(frozen=True)
class SecondMoments:
    """Second moment of a pool's output in training over evaluation, expected over the subsets.

    Attributes:
        module: path of the pool.
        keep: keep probability it was measured for.
        sqrt: ratio with scale="sqrt".
        unscaled: ratio with scale="none".
        matching: the factor with which the ratio is 1 on these inputs.
    """

    module: str
    keep: float
    sqrt: float
    unscaled: float
    matching: float

    @property
    def advice(self) -> str:
        """The scale to use: "sqrt" where it keeps the second moment within [0.8, 1.25], else "none" where that does, else "match"."""
        low, high = ACCEPTED
        if low <= self.sqrt <= high:
            return "sqrt"
        return "none" if low <= self.unscaled <= high else "match"

    def __str__(self) -> str:
        ratios = f"second moment train/eval {self.sqrt:.2f} with sqrt, {self.unscaled:.2f} with none"
        return f'{self.module}: {ratios}; use scale="{self.advice}" (matching factor {self.matching:.3f})'


def measure_second_moments(
    model: nn.Module, example_inputs: Any, keep: float = 0.5, filter_fn: Filter | None = None
) -> list[SecondMoments]:
    """Measure at each pool how stochastic pooling would change the second moment of its output.

    The sqrt(kept / cells) scale keeps it for features of zero mean; features after a ReLU have a mean, and at keep 0.5 their second
    moment is about halved. One evaluation-mode pass, no subset is drawn: the expectation over subsets is exact. The model, its
    buffers, its mode and every RNG stay as they are.

    Args:
        model: with plain or stochastic pools; a stochastic pool is measured with its own keep.
        example_inputs: real inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        keep: keep probability for plain pools.
        filter_fn: as for `stochastic_pooling`.

    Raises:
        ConfigError: for keep out of range.
        NothingMatchedError: when no pool was chosen or none of the chosen ran.

    Source: derived here (second moment of a mean of n out of N without replacement).

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    >>> (moments,) = measure_second_moments(model, torch.rand(2, 3, 8, 8))
    >>> moments.module
    '1'
    """
    keep = check_keep(keep)
    wanted = filter_fn or is_default_pool(model)
    kinds = (*STOCHASTIC, *PLAIN)
    pools = {path: module for path, module in model.named_modules() if type(module) in kinds and wanted(module, path)}
    sums: dict[str, list[Tensor]] = {}
    handles = [module.register_forward_pre_hook(_adder(path, keep, sums)) for path, module in pools.items()]
    args, kwargs = call_arguments(example_inputs)
    try:
        with preserved(model, buffers=True), torch.no_grad():
            model.eval()
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise NothingMatchedError(
            "there is no average pool to measure", evidence=f"{len(pools)} chosen, none ran", fix="pass filter_fn or other inputs"
        )
    return [_ratios(path, float(getattr(pools[path], "keep", keep)), sums[path]) for path in pools if path in sums]


def _adder(path: str, keep: float, sums: dict[str, list[Tensor]]) -> Any:
    """Hook that adds (evaluation, training, training under sqrt) second moments of one call."""

    def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        spec, dims = pool_spec(module)
        maps = arguments[0].unsqueeze(-2) if dims == 1 else arguments[0]
        maps = maps if maps.dim() == 4 else maps.unsqueeze(0)
        size = (maps.shape[2], maps.shape[3])
        windows = windows_of(spec, size, float(getattr(module, "keep", keep)))
        evaluation, training, scaled = second_moments(maps, windows)
        found = sums.setdefault(path, [torch.zeros(())] * 3)
        sums[path] = [total + new.cpu() for total, new in zip(found, (evaluation, training, scaled), strict=True)]

    return add


def _ratios(path: str, keep: float, sums: list[Tensor]) -> SecondMoments:
    evaluation, training, scaled = (float(value) for value in sums)
    if evaluation == 0.0 or training == 0.0:
        return SecondMoments(path, keep, 1.0, 1.0, 1.0)
    return SecondMoments(path, keep, scaled / evaluation, training / evaluation, (evaluation / training) ** 0.5)
