"""What a norm costs: a training step after `swap_norms` against the same step before, in turns. Writes results/norm_step.csv.

    python benchmarks/norm_step.py [--rounds 20] [--device cuda]

Row norms in a ViT, norms of images in a ResNet, with random weights; the ratio of a round is free of what the machine does in the long run.
Time and memory are those of forward, backward and an SGD step.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pl_normkit import swap_norms
from pl_normkit.methods.norm_operators.operators import operators

RESULTS = Path(__file__).parent / "results" / "norm_step.csv"
ROWS = ("layer norms and RMS norms", "linear layers")


def vit(device: str) -> tuple[nn.Module, Tensor]:
    depth, batch = (2, 4) if device == "cpu" else (12, 64)
    return timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=10), torch.randn(batch, 3, 224, 224)


def resnet(device: str) -> tuple[nn.Module, Tensor]:
    return timm.create_model("resnet26t", num_classes=10), torch.randn(4 if device == "cpu" else 64, 3, 128, 128)


def made(to: str, device: str) -> tuple[nn.Module, Tensor]:
    """The model for an operator, swapped; as it is for ""."""
    torch.manual_seed(0)
    model, x = (vit if to in ("vit", *_names(rows=True)) else resnet)(device)
    if to in operators():
        swap_norms(model, to, example_inputs=x)
    return model.to(device).train(), x.to(device)


def _names(*, rows: bool) -> list[str]:
    return [name for name, operator in operators().items() if (operator.replaces in ROWS) is rows and name != "tdln"]  # it needs a time


class Step:
    def __init__(self, to: str, device: str) -> None:
        self.device = device
        self.model, self.x = made(to, device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)

    def __call__(self) -> tuple[float, float]:
        """Seconds, and peak memory in MiB (0 on a CPU)."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - before if self.device == "cuda" else 0
        return seconds, peak / 2**20


def rows_of(base: str, names: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    steps = {name: Step(name, device) for name in (base, *names)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(-3, rounds):  # the first rounds warm up
        taken = {name: steps[name]() for name in random.sample(sorted(steps), k=len(steps))}
        if number >= 0:
            for name in names:
                memory = taken[name][1] / taken[base][1] if taken[base][1] else 0.0
                found[name].append((taken[name][0] / taken[base][0], memory))
    return [_row(name, base, device, ratios) for name, ratios in found.items()]


def _row(name: str, base: str, device: str, ratios: list[tuple[float, float]]) -> dict[str, Any]:
    low, median, high = statistics.quantiles([ratio for ratio, _ in ratios], n=4)
    memory = statistics.median(ratio for _, ratio in ratios)
    row = {"norm": name, "model": base, "device": device, "time": f"{median:.2f}", "low": f"{low:.2f}", "high": f"{high:.2f}"}
    row["memory"] = f"{memory:.2f}" if memory else ""
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of("vit", _names(rows=True), options.rounds, options.device)
    rows += rows_of("resnet", _names(rows=False), options.rounds, options.device)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
