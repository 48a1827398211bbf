"""FDKN against DKN, forward and training step, and the memory of the sampling core against unfolded patches; CSV in results/.

    python benchmarks/guided_upsampling.py [--size 480,640] [--train-size 240,320] [--device cuda]

Times are medians of CPU seconds on one thread (wall time on CUDA); read their ratios. Memory is what the process grew by at its peak
(CPU), or torch's own count (CUDA).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from pl_normkit.nn import DeformableKernelNetwork, JointFilter

RESULTS = Path(__file__).with_name("results") / "guided_upsampling.csv"


def unfolded(weights: torch.Tensor, offsets: torch.Tensor, target: torch.Tensor, window: int = 15) -> torch.Tensor:
    """What `JointFilter` computes (residual form), from 225 copies of the target: a patch around every pixel, sampled one by one."""
    count, taps, _, height, width = offsets.shape
    patches = F.unfold(target, window, padding=window // 2).transpose(1, 2).reshape(-1, 1, window, window)
    half = int(taps**0.5) // 2
    base = torch.tensor([(x, y) for y in range(-half, half + 1) for x in range(-half, half + 1)], dtype=target.dtype)
    places = offsets.permute(0, 3, 4, 1, 2).reshape(-1, taps, 1, 2) + base.to(target.device)[:, None]
    sampled = F.grid_sample(patches, places * 2 / window, align_corners=False).view(count, height, width, taps)
    shifted = (weights - weights.mean(1, keepdim=True)).permute(0, 2, 3, 1)
    return target + (shifted * sampled).sum(-1)[:, None]


def core_inputs(size: tuple[int, int], device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 9, *size), (1, 9, 2, *size), (1, 1, *size))
    return tuple(torch.rand(shape, generator=generator).to(device) for shape in shapes)


def grown_mib(which: str, size: tuple[int, int], device: str) -> float:
    """Peak growth over one call, in a process of its own."""
    run = JointFilter().to(device) if which == "direct" else unfolded
    with torch.no_grad():
        run(*core_inputs((16, 16), device))
        inputs = core_inputs(size, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(*inputs)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of what came before
        before = resident_mib("VmRSS")
        run(*inputs)
        return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """Memory of this process now (VmRSS) or at its peak (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 2**10


def seconds(fast: bool, size: tuple[int, int], device: str, *, train: bool, repeats: int) -> float:
    network = DeformableKernelNetwork(fast).to(device).train(train)
    guidance, target = (torch.rand(1, channels, *size, device=device) for channels in (3, 1))
    clock = time.perf_counter if device == "cuda" else time.process_time  # CPU time: other processes do not count
    found = []
    for _ in range(repeats):
        started = clock()
        with torch.set_grad_enabled(train):
            out = network(guidance, target)
            if train:
                out.mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - started)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="480,640")
    parser.add_argument("--train-size", help="size of the training step, where the whole one takes too long")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", choices=["direct", "unfold"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    height, width = (int(side) for side in options.size.split(","))
    if options.core:
        print(grown_mib(options.core, (height, width), options.device))
        return
    inputs = core_inputs((24, 32), options.device)
    assert torch.allclose(JointFilter()(*inputs), unfolded(*inputs), atol=1e-5) or options.device != "cpu"
    rows: list[tuple[str, str, str, float, str]] = []
    for what, train, text in (("forward", False, options.size), ("training step", True, options.train_size or options.size)):
        size = (int(text.split(",")[0]), int(text.split(",")[1]))
        for name, fast in (("FDKN", True), ("DKN", False)):
            rows.append((what, name, "s", seconds(fast, size, options.device, train=train, repeats=options.repeats), text))
            print(*rows[-1], flush=True)
    for which in ("direct", "unfold"):
        words = [sys.executable, __file__, "--core", which, "--size", options.size, "--device", options.device]
        grown = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        rows.append(("memory of the sampling core", which, "MiB", grown, options.size))
        print(*rows[-1], flush=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "which", "unit", "value", "size", "device", "threads", "torch"])
        writer.writerows(
            [*row[:3], f"{row[3]:.4g}", options.size, options.device, torch.get_num_threads(), torch.__version__] for row in rows
        )


if __name__ == "__main__":
    main()
