"""Learn y = cos(2 pi t) x, which a network that cannot see the time solves with a loss of .5 at best: by norm and by injection.

    python benchmarks/timestep_toy.py             # benchmarks/results/timestep_toy.csv, about three minutes of one (busy) core
    python benchmarks/timestep_toy.py --seeds 1   # a minute, without intervals

A row a run, with the mean loss of its last 100 of 500 steps; printed are means over seeds with Student's 95 % interval. Padding is
circular, so that nothing leaks; the time comes in as (sin 2 pi t, cos 2 pi t) through one linear layer.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
from scipy.stats import t as student
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
AROUND = ("batch", "instance")
"""Norms that can take a whole constant offset away: the ways behind the norm are trained for these alone."""


class Network(nn.Module):
    """Convolution, norm, ReLU, two convolutions more; the time enters around the norm."""

    def __init__(self, norm: nn.Module, injection: str) -> None:
        super().__init__()
        self.injection = injection
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1, padding_mode="circular")
        self.norm = norm
        self.time = nn.Linear(2, 2 * CHANNELS)
        self.last = nn.Sequential(
            nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(CHANNELS, 1, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t[:, None]
        one, two = self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None].chunk(2, 1)
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
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    for seed in range(options.seeds):
        for time in ("shared", "per sample"):
            for norm in NORMS:
                for injection in INJECTIONS if norm in AROUND else INJECTIONS[:2]:
                    began = process_time()
                    loss = loss_of(norm, injection, time == "shared", seed)
                    run = {"time": time, "norm": norm, "injection": injection, "seed": str(seed)}
                    rows.append({**run, "loss": f"{loss:.4f}", "seconds": f"{process_time() - began:.1f}"})
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    settings = {(row["time"], row["norm"], row["injection"]): None for row in rows}
    for setting in settings:
        losses = [float(row["loss"]) for row in rows if (row["time"], row["norm"], row["injection"]) == setting]
        print(*setting, *interval(losses))


def interval(losses: list[float]) -> tuple[str, str, str]:
    """Mean and 95 % interval, which one seed does not have."""
    mean, count = statistics.mean(losses), len(losses)
    half = student.ppf(0.975, count - 1) * statistics.stdev(losses) / math.sqrt(count) if count > 1 else math.nan
    return f"{mean:.4f}", f"{mean - half:.4f}", f"{mean + half:.4f}"


if __name__ == "__main__":
    main()
