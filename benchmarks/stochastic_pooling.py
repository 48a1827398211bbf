"""Time of stochastic average pooling over torch's average pooling: prints a table and writes benchmarks/results/*.csv.

    python benchmarks/stochastic_pooling.py            # CPU, and the GPU where there is one
    python benchmarks/stochastic_pooling.py --cpu      # CPU only

Both sides of a ratio are timed in turn within one run; a ratio is a median of paired ratios, a time a median. On the CPU the clock is
processor time, so that neighbours on a shared machine disturb less; on a GPU it is events around repeated calls.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.nn import StochasticAdaptiveAvgPool2d, StochasticAvgPool2d

RESULTS = Path(__file__).parent / "results"
CPU_SHAPES = [(32, 512, 7, 7), (8, 256, 56, 56), (32, 2048, 7, 7)]
GPU_SHAPES = [
    (32, 2048, 7, 7),
    (256, 2048, 7, 7),
    (256, 1024, 14, 14),
    (64, 512, 28, 28),
    (256, 512, 28, 28),
    (256, 256, 56, 56),
    (64, 64, 128, 128),
]
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
Row = dict[str, object]


def composition(x: Tensor, keep: float = 0.5) -> Tensor:
    """Global pooling over a random subset, written with rand, argsort and gather."""
    flat = x.flatten(2)
    kept = max(1, round(keep * flat.shape[2]))
    chosen = torch.rand(x.shape[0], 1, flat.shape[2], device=x.device).argsort(-1)[..., :kept]
    return flat.gather(2, chosen.expand(-1, flat.shape[1], -1)).mean(2)[..., None, None] * (kept / flat.shape[2]) ** 0.5


def pools(scope: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Stochastic pool and torch's, for a scope: global, 2x2, 3x3 or bins."""
    if scope == "global":
        return StochasticAdaptiveAvgPool2d(1, keep=0.5), lambda x: F.adaptive_avg_pool2d(x, 1)
    if scope == "bins 6":
        return StochasticAdaptiveAvgPool2d(6, keep=0.5), lambda x: F.adaptive_avg_pool2d(x, 6)
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


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start


def gpu_seconds(step: Callable[[], None], repeats: int = 10) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def paired(steps: list[Callable[[], None]], clock: Callable[[Callable[[], None]], float], rounds: int) -> list[list[float]]:
    """Times of each step, all steps in turn in every round, after two rounds of warm-up."""
    times = [[clock(step) for step in steps] for _ in range(rounds + 2)][2:]
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


def run_cpu(rounds: int) -> None:
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
                if scope == "global":
                    steps.append(both_ways(composition, x, grad))
                times = paired(steps, cpu_seconds, rounds)
                rows.append(
                    {
                        "shape": "x".join(map(str, shape)),
                        "format": name,
                        "pool": scope,
                        "ours ms": statistics.median(times[0]) * 1e3,
                        "torch ms": statistics.median(times[1]) * 1e3,
                        "forward + backward ratio": ratio(times[0], times[1]),
                        "forward ratio": ratio(times[2], times[3]),
                        "rand-argsort-gather ratio": ratio(times[4], times[1]) if len(times) > 4 else "",
                        "machine": machine,
                    }
                )
    write("stochastic_pooling_cpu.csv", rows)


def copy_rate() -> float:
    """Bytes per second that a large device copy reads and writes."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(gpu_seconds(lambda: target.copy_(source)) for _ in range(5))


def run_gpu(rounds: int) -> None:
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    ceiling = copy_rate()
    compiled = torch.compile(composition)
    rows: list[Row] = []
    for shape in GPU_SHAPES:
        for name, memory_format in FORMATS.items():
            for dtype in (torch.bfloat16, torch.float32):
                for scope in ("global", "2x2", "bins 6"):
                    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
                    stochastic, plain = pools(scope)
                    grad = torch.randn_like(plain(x))
                    functions = [stochastic, plain, *((composition, compiled) if scope == "global" else ())]
                    forward = paired([forward_only(function, x) for function in functions], gpu_seconds, rounds)
                    whole = paired([both_ways(function, x, grad) for function in functions], gpu_seconds, rounds)
                    read = x.numel() * x.element_size() * (0.5 if name == "channels-last" else 1.0)
                    rows.append(
                        {
                            "shape": "x".join(map(str, shape)),
                            "format": name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "pool": scope,
                            "forward us": statistics.median(forward[0]) * 1e6,
                            "both us": statistics.median(whole[0]) * 1e6,
                            "forward ratio": ratio(forward[0], forward[1]),
                            "both ratio": ratio(whole[0], whole[1]),
                            "both over eager composition": ratio(whole[0], whole[2]) if len(whole) > 2 else "",
                            "both over compiled composition": ratio(whole[0], whole[3]) if len(whole) > 2 else "",
                            "forward share of copy rate": (read + grad.numel() * grad.element_size())
                            / statistics.median(forward[0])
                            / ceiling,
                            "copy TB/s": ceiling / 1e12,
                            "machine": machine,
                        }
                    )
    write("stochastic_pooling_gpu.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="leave the GPU out")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    run_cpu(arguments.rounds)
    if torch.cuda.is_available() and not arguments.cpu:
        run_gpu(arguments.rounds)


if __name__ == "__main__":
    main()
