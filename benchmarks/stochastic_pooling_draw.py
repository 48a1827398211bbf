"""Drawing the subsets on the CPU: in numpy, as it is done, and through torch, eager and compiled by inductor's C++ backend.

    python benchmarks/stochastic_pooling_draw.py     # needs a C++ compiler; writes benchmarks/results/stochastic_pooling_draw.csv

One thread, processor time, median of 60 calls; all three give the very same subsets.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec, windows_of
from pl_normkit.methods.stochastic_pooling.subset import GOLDEN, MIX_1, MIX_2, WORD, draw

RESULTS = Path(__file__).parent / "results" / "stochastic_pooling_draw.csv"
CASES = [
    ("2x2", PoolSpec(0, (2, 2), (2, 2)), (7, 7), 32),
    ("2x2", PoolSpec(0, (2, 2), (2, 2)), (56, 56), 8),
    ("3x3 stride 2", PoolSpec(0, (3, 3), (2, 2), (1, 1)), (56, 56), 8),
]
SEED = 2**62 + 12345


def mix(word: Tensor) -> Tensor:
    word = ((word ^ (word >> 16)) * MIX_1) & WORD
    word = ((word ^ (word >> 15)) * MIX_2) & WORD
    return word ^ (word >> 16)


def through_torch(key: Tensor, samples: Tensor, windows: Tensor, left: Tensor, kept: Tensor) -> Tensor:
    of_samples = mix(((samples ^ key) + GOLDEN) & WORD)
    keys = mix(((of_samples[:, None] ^ windows) + GOLDEN) & WORD)
    missing, word, taken = (kept << 32).repeat(len(samples), 1), keys, []
    for cell in range(len(left)):
        if cell % 4 == 0:
            word = mix((keys + (cell // 4 + 1) * GOLDEN) & WORD)
        product = word * left[cell]
        taken.append(product < missing)
        missing = missing - (taken[-1].long() << 32)
        word = product & WORD
    return torch.stack(taken, -1)


def milliseconds(step: Callable[[], object]) -> float:
    times = []
    for _ in range(65):
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    return statistics.median(times[5:]) * 1e3


def measure(name: str, spec: PoolSpec, size: tuple[int, int], batch: int) -> dict[str, object]:
    windows = windows_of(spec, size, 0.5)
    numbers = tuple(range(len(windows.all)))
    ours = partial(draw, windows, numbers, SEED, 3, batch)
    cells = torch.tensor([window.cells for window in windows.all])
    left = (cells - torch.arange(windows.largest)[:, None]).clamp_min(0)
    arguments = (key_of(SEED, 3), torch.arange(batch), torch.arange(len(numbers)), left, torch.tensor([w.kept for w in windows.all]))
    compiled = torch.compile(through_torch, dynamic=False)
    start = time.perf_counter()
    assert torch.equal(compiled(*arguments), ours())
    seconds = time.perf_counter() - start
    assert torch.equal(through_torch(*arguments), ours())
    return {
        "pool": name,
        "map": f"{batch} samples of {size[0]}x{size[1]}",
        "numpy ms": round(milliseconds(ours), 3),
        "torch ms": round(milliseconds(partial(through_torch, *arguments)), 3),
        "compiled ms": round(milliseconds(partial(compiled, *arguments)), 3),
        "seconds to compile": round(seconds, 1),
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
    }


def key_of(seed: int, rank: int) -> Tensor:
    """What the draw makes of seed and rank before it takes samples and windows in."""
    word = mix(torch.tensor((seed & WORD) + GOLDEN & WORD))
    word = mix(word ^ (seed >> 32 & WORD))
    return mix(((word ^ rank) + GOLDEN) & WORD)


def main() -> None:
    torch.set_num_threads(1)
    rows = [measure(*case) for case in CASES]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
