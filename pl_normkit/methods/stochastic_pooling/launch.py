"""Block sizes, tables and launches of the Triton kernels."""

from __future__ import annotations

__all__ = ["block_sizes", "pool", "pool_backward"]

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pl_normkit.methods.stochastic_pooling import kernels
from pl_normkit.methods.stochastic_pooling.geometry import Windows, covering

TILE = 4096
PROGRAMS_WANTED = 512
SECTOR_BYTES = 64


@lru_cache(maxsize=256)
def _tables(windows: Windows, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels know of the windows: (windows, 8) int32, their weights, and for each row, then column, the windows over it."""
    fields = torch.tensor([window[: kernels.FIELDS] for window in windows.all], dtype=torch.int32)
    weights = torch.tensor([window.weight for window in windows.all], dtype=dtype)
    covers = [*covering(windows.vertical, windows.map_size[0]), *covering(windows.horizontal, windows.map_size[1])]
    cover = torch.tensor(covers, dtype=torch.int32)
    return fields.to(device), weights.to(device), cover.to(device)


def block_sizes(places: int, channels: int, repeats: int, itemsize: int, channels_last: bool) -> list[tuple[int, int, int]]:
    """Candidate (places, channels, warps) of a program, the likeliest first.

    Args:
        places: cells or windows along the map that a program can take.
        channels: channels of the map.
        repeats: samples (times windows) that get programs of their own.
        itemsize: bytes of an element.
        channels_last: whether channels lie next to each other; their block then spans at least two memory sectors.
    """
    least = SECTOR_BYTES // itemsize if channels_last else 4
    widest = 256 if channels_last else 64
    block_c = min(widest, triton.next_power_of_2(channels))
    while block_c > least and repeats * triton.cdiv(channels, block_c) < PROGRAMS_WANTED:
        block_c //= 2
    found = []
    for c in (block_c, max(min(least, block_c), block_c // 2), min(triton.next_power_of_2(channels), block_c * 2)):
        for tile in (TILE, TILE // 2):
            p = min(triton.next_power_of_2(places), max(1, tile // c))
            candidate = (p, c, 8 if p * c >= TILE else 4)
            if candidate not in found:
                found.append(candidate)
    return found


def _launch(
    kernel: Any, programs: Any, arguments: tuple[Any, ...], constants: dict[str, Any], candidates: list[tuple[int, int, int]]
) -> None:
    """Run `kernel` with the fastest candidate; the interpreter takes the first."""
    if not isinstance(kernel, triton.runtime.JITFunction) or len(candidates) == 1:
        p, c, warps = candidates[0]
        kernel[(programs(p, c),)](*arguments, **constants, BLOCK_P=p, BLOCK_C=c, num_warps=warps)
        return
    tuned = _tuned(kernel, tuple(candidates))
    tuned[lambda meta: (programs(meta["BLOCK_P"], meta["BLOCK_C"]),)](*arguments, **constants)


@lru_cache(maxsize=512)
def _tuned(kernel: Any, candidates: tuple[tuple[int, int, int], ...]) -> Any:
    configs = [triton.Config({"BLOCK_P": p, "BLOCK_C": c}, num_warps=warps) for p, c, warps in candidates]
    keys = ["channels", "area", "windows", "CHANNELS_LAST"]
    return triton.autotune(configs=configs, key=keys, cache_results=True)(kernel)


def _accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def _waste(windows: Windows) -> int:
    return max(window.waste for window in windows.all)


def pool(x: Tensor, windows: Windows, seed: Tensor, rank: int) -> Tensor:
    """`reference.pool` on a GPU.

    Args:
        x: (N, C, H, W), contiguous or channels-last.
        windows: the pooling call.
        seed: int64 scalar on the same device; the kernel reads it, so a replayed CUDA graph draws anew.
        rank: rank of this process.
    """
    batch, channels, height, width = x.shape
    channels_last = not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((batch, channels, *windows.out_size), dtype=x.dtype, device=x.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    weight_dtype, accumulator = _accumulator(x.dtype)
    table, weights, _ = _tables(windows, x.device, weight_dtype)
    count = len(windows.all)
    arguments = (x, out, seed, table, weights, rank, channels, height * width, width, count)
    constants = {"CHANNELS_LAST": channels_last, "ACC": accumulator}
    if windows.is_small:
        constants |= {
            "TALLEST": max(windows.vertical.length),
            "WIDEST": max(windows.horizontal.length),
            "MOST": windows.largest,
        }
        candidates = block_sizes(count, channels, batch, x.element_size(), channels_last)
        with _on(x.device):
            _launch(
                kernels._pool_small,
                lambda p, c: batch * triton.cdiv(count, p) * triton.cdiv(channels, c),
                arguments,
                constants,
                candidates,
            )
        return out
    constants |= {"WASTE": _waste(windows), "WHOLE": count == 1 and windows.largest == height * width}
    candidates = block_sizes(windows.largest, channels, batch * count, x.element_size(), channels_last)
    with _on(x.device):
        _launch(kernels._pool_large, lambda p, c: batch * count * triton.cdiv(channels, c), arguments, constants, candidates)
    return out


def pool_backward(grad: Tensor, windows: Windows, seed: Tensor, rank: int, channels_last: bool) -> Tensor:
    """`reference.pool_backward` on a GPU.

    Args:
        grad: (N, C, out height, out width).
        windows: the pooling call.
        seed: the seed of the forward pass.
        rank: the rank of the forward pass.
        channels_last: memory format of the result.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad = grad.contiguous(memory_format=memory_format)
    batch, channels = grad.shape[:2]
    height, width = windows.map_size
    out = torch.empty((batch, channels, height, width), dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    weight_dtype, accumulator = _accumulator(grad.dtype)
    table, weights, cover = _tables(windows, grad.device, weight_dtype)
    count, cells = len(windows.all), height * width
    arguments = (grad, out, seed, table, weights, cover, rank, channels, cells, height, width, windows.out_size[1], count)
    constants = {
        "CHANNELS_LAST": channels_last,
        "SINGLE": count == 1,
        "MOST": windows.largest if windows.is_small else 0,
        "WASTE": _waste(windows),
        "OVER_V": windows.overlap[0],
        "OVER_H": windows.overlap[1],
        "ACC": accumulator,
    }
    candidates = block_sizes(cells, channels, batch * triton.cdiv(cells, 64), grad.element_size(), channels_last)
    with _on(grad.device):
        _launch(kernels._spread, lambda p, c: batch * triton.cdiv(cells, p) * triton.cdiv(channels, c), arguments, constants, candidates)
    return out


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
