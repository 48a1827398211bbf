"""Learn y = cos(2 pi t) x, which a network that cannot see the time solves with a loss of .5 at best: by norm and by injection.

    python benchmarks/timestep_toy.py          # benchmarks/results/timestep_toy.csv, about a minute on one core

Each number is the mean loss of the last 100 of 500 steps; with `--seeds` the mean over seeds and their range.
Padding is circular, so that nothing leaks.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pl_normkit.methods.timestep_embedding.modules import position_pattern

RESULTS = Path(__file__).parent / "results" / "timestep_toy.csv"
CHANNELS, SIZE, BATCH = 32, 8, 16
NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(CHANNELS),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "group, 2 channels": lambda: nn.GroupNorm(CHANNELS // 2, CHANNELS),
    "group, 4 channels": lambda: nn.GroupNorm(CHANNELS // 4, CHANNELS),
    "layer": lambda: nn.GroupNorm(1, CHANNELS),
}
INJECTIONS = ("scalar", "positional", "after norm", "scale and shift")


class Network(nn.Module):
    """Convolution, norm, ReLU, two convolutions more; the time, as sines and cosines, enters around the norm."""

    def __init__(self, norm: nn.Module, injection: str) -> None:
        super().__init__()
        self.injection = injection
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1, padding_mode="circular")
        self.norm = norm
        self.time = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 2 * CHANNELS))
        self.last = nn.Sequential(
            nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(CHANNELS, 1, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = 2 * math.pi * t[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
        one, two = self.time(torch.cat([waves.sin(), waves.cos()], 1))[:, :, None, None].chunk(2, 1)
        h = self.first(x)
        if self.injection == "scalar":
            h = self.norm(h + one)
        elif self.injection == "positional":
            h = self.norm(h + one + two * position_pattern(h.shape[2:], h))
        elif self.injection == "after norm":
            h = self.norm(h) + one
        else:
            h = self.norm(h) * (1 + one) + two
        out: Tensor = self.last(h)
        return out


def loss_of(norm: str, injection: str, is_shared: bool, seed: int, steps: int = 500) -> float:
    torch.manual_seed(seed)
    model = Network(NORMS[norm](), injection)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, 1, SIZE, SIZE)
        t = torch.rand(1).expand(BATCH) if is_shared else torch.rand(BATCH)
        loss = (model(x, t) - torch.cos(2 * math.pi * t)[:, None, None, None] * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.mean(losses[-100:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    seeds = range(parser.parse_args().seeds)
    rows = []
    for time in ("shared", "per sample"):
        for norm in NORMS:
            for injection in INJECTIONS:
                losses = [loss_of(norm, injection, time == "shared", seed) for seed in seeds]
                row = {"time": time, "norm": norm, "injection": injection, "loss": f"{statistics.mean(losses):.4f}"}
                row |= {"lowest": f"{min(losses):.4f}", "highest": f"{max(losses):.4f}", "seeds": str(len(losses))}
                rows.append(row)
                print(*row.values(), flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
