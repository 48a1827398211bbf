"""PowerNorm: a running second moment a channel, of all tokens, with an approximate backward pass."""

from __future__ import annotations

__all__ = ["OPERATOR", "PowerNorm"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError
from pl_normkit.methods.norm_operators.operators import OldNorm, Operator
from pl_normkit.methods.norm_operators.places import row_norms
from pl_normkit.methods.norm_operators.rows import RowNorm, mean_over_tokens

FORGET = 0.1
"""Weight of the newest step in both averages."""


class PowerNorm(RowNorm):
    """gamma * x / sqrt(moment + eps) + beta on rows that are first divided by the root mean square of each group of their channels.

    The moment is that of the batch in the first `warmup` training forwards, then the running one; evaluation takes the running one. The
    gradient treats the moment as a constant and subtracts a running mean of gradient times output instead. Each training forward moves
    the buffers, so a recomputed one (gradient checkpointing) moves them twice.
    """

    takes = ("mask",)

    def __init__(self, old: OldNorm, warmup: int, groups: int) -> None:
        super().__init__(old)
        if groups < 1 or old.width % groups:
            raise ConfigError("groups must divide the number of channels", evidence=f"{groups}, {old.width}")
        self.warmup, self.groups = warmup, groups
        self.second_moment: Tensor
        self.gradient_mean: Tensor
        self.steps: Tensor
        self.register_buffer("second_moment", old.ones())
        self.register_buffer("gradient_mean", torch.zeros_like(old.ones()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=old.device))

    def normalized(self, rows: Tensor) -> Tensor:
        parts = rows.reshape(*rows.shape[:-1], self.groups, -1)
        rows = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return self._train(rows) if self.training else rows * torch.rsqrt(self.second_moment + self.eps)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _train(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            moment = mean_over_tokens(rows.square(), self.mask)[0].to(self.second_moment.dtype)
            used = torch.where(self.steps < self.warmup, moment, self.second_moment)
            self.steps += 1
            averaged = self.second_moment + (moment - self.second_moment) / self.steps
            self.second_moment.copy_(torch.where(self.steps < self.warmup, averaged, self.second_moment))
            self.second_moment.lerp_(moment, FORGET)
        z: Tensor = _Normalize.apply(rows, used + self.eps, moment + self.eps, self.gradient_mean, self.mask)
        return z


class _Normalize(torch.autograd.Function):
    """rows / sqrt(used); the gradient is h / sqrt(moment), h = g - FORGET * mean * z, and moves `mean` by the mean of h * z."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, used: Tensor, moment: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
        z = rows * torch.rsqrt(used)
        ctx.save_for_backward(z, moment)
        ctx.mean, ctx.mask = mean, mask  # a buffer that each backward pass moves
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, moment = ctx.saved_tensors
        inner = gradients[0] - FORGET * ctx.mean * z
        ctx.mean.add_(mean_over_tokens(inner * z, ctx.mask)[0].to(ctx.mean.dtype))
        return (inner * torch.rsqrt(moment)).to(z.dtype), None, None, None, None


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    return PowerNorm(old, options["warmup"], options["groups"])


OPERATOR = Operator(
    name="powernorm",
    formula="gamma u / sqrt(phi + eps) + beta, u = x / rms of its group of channels, phi the running mean of u^2 over tokens",
    source="PowerNorm: Rethinking Batch Normalization in Transformers, arXiv 2003.07845 (code)",
    replaces="layer norms and RMS norms",
    places=row_norms,
    make=_make,
    kept="no",
    when="encoders of translation models; its recipe keeps layer norm in the decoder",
    options={"warmup": 10000, "groups": 1},
    needs="padding mask by `norm_inputs`; statistics are those of all ranks",
)
