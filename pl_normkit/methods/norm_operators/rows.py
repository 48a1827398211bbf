"""Base of the norms over channels: both layouts, the old norm's scale and shift, and what a batch hands to them beside x."""

from __future__ import annotations

__all__ = ["RowNorm", "mean_over_tokens", "norm_inputs"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce as _sum_over_ranks

from pl_normkit.errors import DataError, NothingMatchedError
from pl_normkit.methods.norm_operators.operators import OldNorm
from pl_normkit.wrappers import unwrapped


class RowNorm(nn.Module):
    """A norm over channels, which are the last dimension or, with `axis` 1, the second. It takes over scale and shift of the old norm.

    A subclass defines `normalized` for rows with channels last. `mask` and `time` are None outside `norm_inputs`; `takes` says which of
    them the norm reads.
    """

    is_norm: ClassVar[bool] = True  # for `pl_normkit.norm_modules`
    takes: ClassVar[tuple[str, ...]] = ()
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, old: OldNorm) -> None:
        super().__init__()
        self.axis = old.axis
        self.width = old.width
        self.eps = old.eps
        self.mask: Tensor | None = None
        self.time: Tensor | None = None
        self.register_parameter("weight", old.weight)
        self.register_parameter("bias", old.bias)

    def normalized(self, rows: Tensor) -> Tensor:
        """`rows` of shape (..., width); the same shape, before scale and shift."""
        raise NotImplementedError

    def scaled(self, rows: Tensor) -> Tensor:
        """`normalized` with scale and shift."""
        y = self.normalized(rows)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the channels along `axis`; the same shape."""
        return self.scaled(x) if self.axis == -1 else self.scaled(x.movedim(1, -1)).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.width}, axis={self.axis}"


def mean_over_tokens(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of each channel over all tokens of all ranks that `mask` keeps, and their number; gradients cross ranks too.

    In float32 at least, so that a mean in half precision is none of rounding.

    Args:
        values: shape (..., channels).
        mask: True for tokens that count, of the shape of `values` without its last dimension; None for all.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    rows = values.reshape(-1, values.shape[-1])
    if mask is None:
        total, count = rows.sum(0), rows.new_full((1,), rows.shape[0])
    else:
        if mask.shape != values.shape[:-1]:
            raise DataError("the mask has another shape than the tokens", evidence=f"{tuple(mask.shape)}, {tuple(values.shape[:-1])}")
        kept = mask.reshape(-1, 1).bool()
        total, count = torch.where(kept, rows, 0).sum(0), kept.sum(0).to(rows.dtype)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        total, count = _sum_over_ranks(torch.cat([total, count])).split([total.numel(), 1])  # type: ignore[no-untyped-call]
    return total / count.clamp(min=1), count.detach()


@contextmanager
def norm_inputs(model: nn.Module, *, mask: Tensor | None = None, time: Tensor | None = None) -> Iterator[None]:
    """Hand norms of `swap_norms` what they need beside x: use it around the calls of the model.

    Args:
        model: the model with the norms.
        mask: for norms with batch statistics, True for tokens that count, of the shape of x without its channels.
        time: for time-dependent norms, one number a sample (the paper: a quarter of the log signal-to-noise ratio).

    Raises NothingMatchedError where no norm of the model takes what is given.

    >>> import torch
    >>> from torch import nn
    >>> from pl_normkit import norm_inputs, swap_norms
    >>> model = nn.Sequential(nn.LayerNorm(2))
    >>> changes = swap_norms(model, to="powernorm")
    >>> with norm_inputs(model, mask=torch.tensor([True, False])):
    ...     _ = model(torch.tensor([[1.0, 1.0], [50.0, -50.0]]))
    >>> [round(value, 3) for value in model[0].second_moment.tolist()]
    [1.0, 1.0]
    """
    given: dict[str, Any] = {name: value for name, value in (("mask", mask), ("time", time)) if value is not None}
    norms = [module for module in unwrapped(model).modules() if isinstance(module, RowNorm) and set(module.takes) & set(given)]
    if given and not norms:
        raise NothingMatchedError(f"no norm of the model takes {' or '.join(given)}")
    try:
        for norm in norms:
            for name in set(norm.takes) & set(given):
                setattr(norm, name, given[name])
        yield
    finally:
        for norm in norms:
            norm.mask = norm.time = None
