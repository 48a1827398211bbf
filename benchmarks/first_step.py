"""What watching the first training step and measuring the health of blocks cost.

    python benchmarks/first_step.py [--repeats 9] [--batch 32] [--side 128]

`first_step` is one whole training step of a loop with a `StepRecorder` over the same step without, `health` one with a `HealthMeter`
measuring it; steps are timed alternately in one process after a warm-up, and a ratio is the median over its pairs. A run pays the first
once, and the second every n steps: at n = 50 a fiftieth of what is above 1. Targets: first_step <= 1.10, health / 50 <= 0.01.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.block_health import HealthMeter
from pl_normkit.first_step import StepRecorder
from pl_normkit.specs import build_model

RESULTS = Path(__file__).parent / "results" / "first_step.csv"
MODELS = ("torchvision:resnet18", "timm:convnext_atto", "timm:mobilenetv3_small_100")
Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def recorded(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    recorder = StepRecorder(model, [optimizer])
    with recorder.forward():
        loss = F.cross_entropy(model(x), y)
    recorder.before_backward(loss)
    loss.backward()
    recorder.after_backward()
    optimizer.step()
    optimizer.zero_grad()
    recorder.close()


def metered(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    meter = HealthMeter(model)
    loss = F.cross_entropy(model(x), y)
    meter.before_backward(loss)
    loss.backward()
    meter.before_step()
    optimizer.step()
    meter.after_step()
    optimizer.zero_grad()


def seconds(step: Step, *arguments: object) -> float:
    started = time.perf_counter()
    step(*arguments)  # type: ignore[arg-type]
    return time.perf_counter() - started


def main() -> None:
    """Print and write one row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = []
    for name in MODELS:
        torch.manual_seed(0)
        model = build_model(name, device="cpu").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        arguments = (model, optimizer, torch.randn(options.batch, 3, options.side, options.side), torch.randint(0, 10, (options.batch,)))
        for step in (plain, recorded, metered):
            step(*arguments)
        pairs = [[seconds(step, *arguments) for step in (plain, recorded, metered)] for _ in range(options.repeats)]
        row = {
            "model": name,
            "batch": options.batch,
            "plain_ms": round(1000 * statistics.median(pair[0] for pair in pairs), 1),
            "first_step": round(statistics.median(pair[1] / pair[0] for pair in pairs), 3),
            "health": round(statistics.median(pair[2] / pair[0] for pair in pairs), 3),
        }
        rows.append(row)
        print(row)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
