"""Block sizes, tables and launches of the Triton kernels."""

from __future__ import annotations

__all__ = ["Launch", "block_sizes", "drawing", "pool", "pool_backward", "pooling", "spreading"]

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pl_normkit.methods.stochastic_pooling import kernels
from pl_normkit.methods.stochastic_pooling.geometry import Windows, covering

TILE = 2048
WARPS = 4
"""Twice as many hold half as much each, and repeat the arithmetic that a thread's elements share: slower by every count."""
PROGRAMS_WANTED = 512
SECTOR_BYTES = 64
LIMIT: dict[str, Any] = {} if torch.version.hip else {"maxnreg": 128}
"""Told the most registers a thread may take, the assembler spills none to get below them, as it otherwise does for more occupancy."""
NARROW = 64
"""Places of a map that leave the fewest threads idle in blocks of 16."""
UNROLLED = 9
"""Cells of the largest window that `_pool_small` takes without a loop in channels-last maps."""
DRAWN_WORDS = 8


@lru_cache(maxsize=256)
def _tables(windows: Windows, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels know of the windows: (windows, 8) int32, their weights, and for each row, then column, the windows over it."""
    fields = torch.tensor([window[: kernels.FIELDS] for window in windows.all], dtype=torch.int32)
    weights = torch.tensor([window.weight for window in windows.all], dtype=dtype)
    covers = [*covering(windows.vertical, windows.map_size[0]), *covering(windows.horizontal, windows.map_size[1])]
    cover = torch.tensor(covers, dtype=torch.int32)
    return fields.to(device), weights.to(device), cover.to(device)


def block_sizes(
    places: int, channels: int, repeats: int, itemsize: int, channels_last: bool, elements: int = 32, tile: int = TILE
) -> list[tuple[int, int, int]]:
    """Candidate (places, channels, warps) of a program, the likeliest first.

    Args:
        places: cells or windows along the map that a program can take.
        channels: channels of the map.
        repeats: samples (times windows) that get programs of their own.
        itemsize: bytes of an element.
        channels_last: whether channels lie next to each other; their block then spans at least two memory sectors.
        elements: of a contiguous map, what each thread holds at most.
        tile: of a channels-last map, what a program holds at most.
    """
    if not channels_last:
        return _plane_sizes(places, channels, repeats, elements if itemsize <= 4 else elements // 2)
    least = SECTOR_BYTES // itemsize
    block_c = min(256, triton.next_power_of_2(channels))
    while block_c > least and repeats * triton.cdiv(channels, block_c) < PROGRAMS_WANTED:
        block_c //= 2
    sizes = dict.fromkeys((block_c, max(min(least, block_c), block_c // 2)))
    return [(min(triton.next_power_of_2(places), max(1, tile // c)), c, WARPS) for c in sizes]


def _plane_sizes(places: int, channels: int, repeats: int, elements: int) -> list[tuple[int, int, int]]:
    """Candidates for contiguous maps, where neighbouring threads take neighbouring places.

    With fewer places than threads, and stores several places wide, threads would repeat each other's index arithmetic.
    """
    p = 16 if places <= NARROW else 128
    found = []
    for share in (elements, elements // 2):
        c = min(triton.next_power_of_2(channels), WARPS * 32 * share // p)
        while c > 4 and repeats * triton.cdiv(channels, c) < PROGRAMS_WANTED:
            c //= 2
        if (p, c, WARPS) not in found:
            found.append((p, c, WARPS))
    return found


class Launch(NamedTuple):
    """A kernel with all it is called with; nothing in it needs a GPU.

    Attributes:
        kernel: of `kernels`.
        arguments: in the order of its signature.
        constants: by name, without those of a candidate.
        candidates: constants of a program's block and `num_warps`, the likeliest first.
        programs: how many a candidate needs.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    candidates: list[dict[str, int]]
    programs: Callable[[dict[str, int]], int]

    def run(self) -> None:
        """Run with the fastest candidate; the interpreter takes the first."""
        if not isinstance(self.kernel, triton.runtime.JITFunction) or len(self.candidates) == 1:
            self.kernel[(self.programs(self.candidates[0]),)](*self.arguments, **self.constants, **self.candidates[0], **LIMIT)
            return
        tuned = _tuned(self.kernel, tuple((one["BLOCK_P"], one["BLOCK_C"], one["num_warps"]) for one in self.candidates))
        tuned[lambda meta: (self.programs(meta),)](*self.arguments, **self.constants)


@lru_cache(maxsize=512)
def _tuned(kernel: Any, candidates: tuple[tuple[int, int, int], ...]) -> Any:
    configs = [triton.Config({"BLOCK_P": p, "BLOCK_C": c}, num_warps=warps, **LIMIT) for p, c, warps in candidates]
    keys = ["channels", "area", "windows", "CHANNELS_LAST"]
    return triton.autotune(configs=configs, key=keys, cache_results=True)(kernel)


def _candidates(
    places: int, channels: int, repeats: int, itemsize: int, channels_last: bool, elements: int = 32, tile: int = TILE
) -> list[dict[str, int]]:
    sizes = block_sizes(places, channels, repeats, itemsize, channels_last, elements, tile)
    return [{"BLOCK_P": p, "BLOCK_C": c, "num_warps": warps} for p, c, warps in sizes]


def _small_candidates(windows: Windows, channels: int, batch: int, itemsize: int, channels_last: bool) -> list[dict[str, int]]:
    """Candidates for `_pool_small`: tiles that spill on no target, and one alone where the others are dominated or spill."""
    is_unrolled = windows.largest <= UNROLLED
    tile = TILE * 2 // max(2, itemsize) if is_unrolled else TILE * 4 // max(4, itemsize)
    found = _candidates(len(windows.all), channels, batch, itemsize, channels_last, 16, tile)
    has_one = itemsize > 4 or (channels_last and (is_unrolled or itemsize > 2))
    return found[:1] if has_one else found


def _accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def _aligned(channels: int, places: int, channels_last: bool) -> int:
    """The largest power of two up to 16 that divides what lies along memory: Triton itself only sees whether 16 does."""
    return math.gcd(channels if channels_last else places, 16)


def drawing(windows: Windows, batch: int, seed: Tensor, rank: int, table: Tensor) -> tuple[Tensor, Launch]:
    """The subsets as bits, (batch, windows, words) int32, once the launch has run."""
    count = len(windows.all)
    words = triton.cdiv(windows.largest, 32)
    bits = torch.empty((batch, count, words), dtype=torch.int32, device=seed.device)
    if windows.is_small:
        block = {"BLOCK": 128, "num_warps": 4}
        arguments = (bits, seed, table, rank, count)
        return bits, Launch(
            kernels._draw_small, arguments, {"MOST": windows.largest}, [block], lambda meta: batch * triton.cdiv(count, meta["BLOCK"])
        )
    block = {"BLOCK": DRAWN_WORDS, "num_warps": 4}
    constants = {"WASTE": max(window.waste for window in windows.all)}
    return bits, Launch(
        kernels._draw_large,
        (bits, seed, table, rank, count, words),
        constants,
        [block],
        lambda meta: batch * triton.cdiv(count * words, meta["BLOCK"]),
    )


def pooling(x: Tensor, windows: Windows, seed: Tensor, rank: int) -> tuple[Tensor, list[Launch]]:
    """The output of `pool` and the launches that fill it."""
    batch, channels, height, width = x.shape
    channels_last = not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((batch, channels, *windows.out_size), dtype=x.dtype, device=x.device, memory_format=memory_format)
    if out.numel() == 0:
        return out, []
    weight_dtype, accumulator = _accumulator(x.dtype)
    table, weights, _ = _tables(windows, x.device, weight_dtype)
    bits, draw = drawing(windows, batch, seed, rank, table)
    count, area = len(windows.all), height * width
    constants = {"CHANNELS_LAST": channels_last, "ACC": accumulator}
    if windows.is_small:
        constants |= {
            "TALLEST": max(windows.vertical.length),
            "WIDEST": max(windows.horizontal.length),
            "ALIGNED": _aligned(channels, count, channels_last),
        }
        arguments = (x, out, bits, table, weights, channels, area, width, count)
        candidates = _small_candidates(windows, channels, batch, x.element_size(), channels_last)

        def programs(meta: dict[str, int]) -> int:
            return int(batch * triton.cdiv(count, meta["BLOCK_P"]) * triton.cdiv(channels, meta["BLOCK_C"]))

        return out, [draw, Launch(kernels._pool_small, arguments, constants, candidates, programs)]
    constants |= {"WHOLE": count == 1 and windows.largest == area, "ALIGNED": _aligned(channels, area, channels_last)}
    words = bits.shape[2]
    elements = 16 if windows.largest <= NARROW else 32
    candidates = _candidates(windows.largest, channels, batch * count, x.element_size(), channels_last, elements)
    candidates = candidates[:1] if channels_last else candidates  # the second is dominated
    launch = Launch(
        kernels._pool_large,
        (x, out, bits, table, weights, channels, area, width, count, words),
        constants,
        candidates,
        lambda meta: batch * count * triton.cdiv(channels, meta["BLOCK_C"]),
    )
    return out, [draw, launch]


def spreading(grad: Tensor, windows: Windows, seed: Tensor, rank: int, channels_last: bool) -> tuple[Tensor, list[Launch]]:
    """The output of `pool_backward` and the launches that fill it."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad = grad.contiguous(memory_format=memory_format)
    batch, channels = grad.shape[:2]
    height, width = windows.map_size
    out = torch.empty((batch, channels, height, width), dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if out.numel() == 0:
        return out, []
    weight_dtype, accumulator = _accumulator(grad.dtype)
    table, weights, cover = _tables(windows, grad.device, weight_dtype)
    bits, draw = drawing(windows, batch, seed, rank, table)
    count, cells = len(windows.all), height * width
    constants = {
        "CHANNELS_LAST": channels_last,
        "SINGLE": count == 1,
        "ALIGNED": _aligned(channels, cells, channels_last),
        "OVER_V": windows.overlap[0],
        "OVER_H": windows.overlap[1],
        "ACC": accumulator,
    }
    launch = Launch(
        kernels._spread,
        (grad, out, bits, table, weights, cover, channels, cells, height, width, windows.out_size[1], count, bits.shape[2]),
        constants,
        _candidates(
            *(cells, channels, batch * triton.cdiv(cells, 64), grad.element_size(), channels_last),
            tile=TILE if grad.element_size() <= 4 else TILE // 2,
        ),
        lambda meta: batch * triton.cdiv(cells, meta["BLOCK_P"]) * triton.cdiv(channels, meta["BLOCK_C"]),
    )
    return out, [draw, launch]


def pool(x: Tensor, windows: Windows, seed: Tensor, rank: int) -> Tensor:
    """`reference.pool` on a GPU.

    Args:
        x: (N, C, H, W), contiguous or channels-last.
        windows: the pooling call.
        seed: int64 scalar on the same device; a kernel reads it, so a replayed CUDA graph draws anew.
        rank: rank of this process.
    """
    return _run(*pooling(x, windows, seed, rank))


def pool_backward(grad: Tensor, windows: Windows, seed: Tensor, rank: int, channels_last: bool) -> Tensor:
    """`reference.pool_backward` on a GPU.

    Args:
        grad: (N, C, out height, out width).
        windows: the pooling call.
        seed: the seed of the forward pass.
        rank: the rank of the forward pass.
        channels_last: memory format of the result.
    """
    return _run(*spreading(grad, windows, seed, rank, channels_last))


def _run(out: Tensor, launches: list[Launch]) -> Tensor:
    with _on(out.device):
        for launch in launches:
            launch.run()
    return out


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
