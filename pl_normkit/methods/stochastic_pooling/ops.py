"""The operators `pl_normkit::stochastic_pool` and its backward: CPU, CUDA, shapes for tracing, and gradients of any order."""

from __future__ import annotations

__all__ = ["stochastic_pool", "stochastic_pool_backward"]

from typing import Any

import torch
from torch import Tensor

from pl_normkit.methods.stochastic_pooling import reference
from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec, Windows, output_size, windows_of


def _windows(spec: list[int], height: int, width: int, keep: float, scale: float, sqrt_scale: bool) -> Windows:
    return windows_of(PoolSpec.decode(spec), (height, width), keep, scale, sqrt_scale)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    """`x` itself where it is contiguous or channels-last, otherwise a copy that is."""
    return x if _is_channels_last(x) else x.contiguous()


@torch.library.custom_op("pl_normkit::stochastic_pool", mutates_args=(), device_types="cpu")
def stochastic_pool(x: Tensor, seed: Tensor, rank: int, spec: list[int], keep: float, scale: float, sqrt_scale: bool) -> Tensor:
    """Average of a random subset of each window, see `functional`.

    Args:
        x: (N, C, H, W) floating point.
        seed: int64 scalar on the device of `x`.
        rank: rank of this process.
        spec: `PoolSpec.encode()`.
        keep: keep probability in (0, 1].
        scale: factor on the output.
        sqrt_scale: whether sqrt(kept / cells) multiplies each output too.

    Returns:
        (N, C, out height, out width), dtype and memory format of `x`.
    """
    return reference.pool(_dense(x), _windows(spec, x.shape[2], x.shape[3], keep, scale, sqrt_scale), seed, rank)


@torch.library.custom_op("pl_normkit::stochastic_pool_backward", mutates_args=(), device_types="cpu")
def stochastic_pool_backward(
    grad: Tensor,
    seed: Tensor,
    rank: int,
    height: int,
    width: int,
    channels_last: bool,
    spec: list[int],
    keep: float,
    scale: float,
    sqrt_scale: bool,
) -> Tensor:
    """Gradient of `stochastic_pool` with respect to `x`: (N, C, height, width)."""
    return reference.pool_backward(grad, _windows(spec, height, width, keep, scale, sqrt_scale), seed, rank, channels_last)


@stochastic_pool.register_kernel("cuda")
def _(x: Tensor, seed: Tensor, rank: int, spec: list[int], keep: float, scale: float, sqrt_scale: bool) -> Tensor:
    from pl_normkit.methods.stochastic_pooling import launch

    return launch.pool(_dense(x), _windows(spec, x.shape[2], x.shape[3], keep, scale, sqrt_scale), seed, rank)


@stochastic_pool_backward.register_kernel("cuda")
def _(
    grad: Tensor,
    seed: Tensor,
    rank: int,
    height: int,
    width: int,
    channels_last: bool,
    spec: list[int],
    keep: float,
    scale: float,
    sqrt_scale: bool,
) -> Tensor:
    from pl_normkit.methods.stochastic_pooling import launch

    return launch.pool_backward(grad, _windows(spec, height, width, keep, scale, sqrt_scale), seed, rank, channels_last)


@stochastic_pool.register_fake
def _(x: Tensor, seed: Tensor, rank: int, spec: list[int], keep: float, scale: float, sqrt_scale: bool) -> Tensor:
    pool = PoolSpec.decode(spec)
    size = (*x.shape[:2], output_size(pool, x.shape[2], 0), output_size(pool, x.shape[3], 1))
    memory_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return x.new_empty(size).contiguous(memory_format=memory_format)


@stochastic_pool_backward.register_fake
def _(
    grad: Tensor,
    seed: Tensor,
    rank: int,
    height: int,
    width: int,
    channels_last: bool,
    spec: list[int],
    keep: float,
    scale: float,
    sqrt_scale: bool,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return grad.new_empty((*grad.shape[:2], height, width)).contiguous(memory_format=memory_format)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, seed, *ctx.arguments = inputs
    ctx.save_for_backward(seed)
    ctx.map_size = x.shape[2:]
    ctx.channels_last = _is_channels_last(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    rank, *arguments = ctx.arguments
    return stochastic_pool_backward(grad, seed, rank, *ctx.map_size, ctx.channels_last, *arguments), *(None,) * 6


def _keep_for_second_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, rank, _, _, _, *arguments = inputs
    ctx.save_for_backward(seed)
    ctx.arguments = (rank, *arguments)


def _second_order(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return stochastic_pool(grad, seed, *ctx.arguments), *(None,) * 9


stochastic_pool.register_autograd(_backward, setup_context=_keep_for_backward)
stochastic_pool_backward.register_autograd(_second_order, setup_context=_keep_for_second_order)
