"""Time of stochastic average pooling over torch's on the CPU: prints a table, writes benchmarks/results/stochastic_pooling_cpu.csv.

    python benchmarks/stochastic_pooling.py

Both sides of a ratio are timed in turn within one run; a ratio is a median of paired ratios, a time a median. The clock is processor time,
so that neighbours on a shared machine disturb less. The memory's limit is the time of a copy of the map, in the same rounds, scaled to
the bytes that no implementation can avoid: the kept part of the map (all of it where contiguous), output, its gradient, the map's gradient.
The C library is told to keep freed memory, as the larger heap of a training run does: otherwise small maps time its page faults, which
depend on what else was allocated. benchmarks/gpu.py is the script for a GPU.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.nn import StochasticAdaptiveAvgPool2d, StochasticAvgPool2d

RESULTS = Path(__file__).parent / "results"
CPU_SHAPES = [(32, 512, 7, 7), (8, 256, 56, 56), (32, 2048, 7, 7)]
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
Row = dict[str, object]


def composition(x: Tensor, keep: float = 0.5) -> Tensor:
    """Global pooling over a random subset, written with rand, argsort and gather."""
    flat = x.flatten(2)
    kept = max(1, round(keep * flat.shape[2]))
    chosen = torch.rand(x.shape[0], 1, flat.shape[2], device=x.device).argsort(-1)[..., :kept]
    return flat.gather(2, chosen.expand(-1, flat.shape[1], -1)).mean(2)[..., None, None] * (kept / flat.shape[2]) ** 0.5


def pools(scope: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Stochastic pool and torch's, for a scope: global, 2x2 or 3x3."""
    if scope == "global":
        return StochasticAdaptiveAvgPool2d(1, keep=0.5), lambda x: F.adaptive_avg_pool2d(x, 1)
    kernel, stride, padding = (2, 2, 0) if scope == "2x2" else (3, 2, 1)
    return StochasticAvgPool2d(kernel, stride, padding, keep=0.5), lambda x: F.avg_pool2d(x, kernel, stride, padding)


def both_ways(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        function(x).backward(grad)

    return step


def forward_only(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            function(x)

    return step


def copying(source: Tensor, target: Tensor) -> Callable[[], None]:
    def step() -> None:
        target.copy_(source)

    return step


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start


def paired(steps: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Times of each step, all steps in turn in every round, after two rounds of warm-up."""
    times = [[cpu_seconds(step) for step in steps] for _ in range(rounds + 2)][2:]
    return [list(column) for column in zip(*times, strict=True)]


def ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def write(name: str, rows: list[Row]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


def keep_freed_memory() -> None:
    """glibc: give nothing back to the system, and take large blocks from the heap too."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold, most = -1, -3, 2**30
        library.mallopt(trim_threshold, most)
        library.mallopt(mmap_threshold, most)


def run_cpu(rounds: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, 1 thread, torch {torch.__version__}"
    rows: list[Row] = []
    for shape in CPU_SHAPES:
        for name, memory_format in FORMATS.items():
            for scope in ("global", "2x2", "3x3 stride 2"):
                x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
                stochastic, plain = pools(scope)
                grad = torch.randn_like(plain(x))
                steps = [both_ways(function, x, grad) for function in (stochastic, plain)]
                steps += [forward_only(function, x) for function in (stochastic, plain)]
                steps.append(copying(x.detach(), torch.empty_like(x)))
                if scope == "global":
                    steps.append(both_ways(composition, x, grad))
                times = paired(steps, rounds)
                read = 0.5 if name == "channels-last" and scope != "3x3 stride 2" else 1.0
                limit = (1 + read + 2 * grad.numel() / x.numel()) / 2
                rows.append(
                    {
                        "shape": "x".join(map(str, shape)),
                        "format": name,
                        "pool": scope,
                        "ours ms": statistics.median(times[0]) * 1e3,
                        "torch ms": statistics.median(times[1]) * 1e3,
                        "forward + backward ratio": ratio(times[0], times[1]),
                        "forward ratio": ratio(times[2], times[3]),
                        "over the memory's limit": ratio(times[0], times[4]) / limit,
                        "rand-argsort-gather ratio": ratio(times[5], times[1]) if len(times) > 5 else "",
                        "machine": machine,
                    }
                )
    write("stochastic_pooling_cpu.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    run_cpu(parser.parse_args().rounds)


if __name__ == "__main__":
    main()
