"""A small residual network on scikit-learn's digits: stochastic pooling, dropout after the pool, neither; five seeds.

python benchmarks/stochastic_pooling_digits.py
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.methods.stochastic_pooling import stochastic_pooling

RESULTS = Path(__file__).parent / "results" / "stochastic_pooling_digits.csv"
VARIANTS = {
    "neither": (0.0, None),
    "dropout 0.5 after the pool": (0.5, None),
    "SAP keep 0.5, sqrt": (0.0, "sqrt"),
    "SAP keep 0.5, none": (0.0, "none"),
    "SAP keep 0.5, match": (0.0, "match"),
}
SEEDS = range(5)
EPOCHS, BATCH, TRAIN_IMAGES = 25, 32, 400


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def build(p: float) -> nn.Sequential:
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), *blocks, *head)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    net.eval()
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean()) * 100


def train(seed: int, p: float, scale: str | None) -> tuple[float, float]:
    """Accuracy in percent on the training and the held-out images."""
    torch.manual_seed(seed)
    digits = load_digits()
    split = train_test_split(digits.images / 16, digits.target, train_size=TRAIN_IMAGES, stratify=digits.target, random_state=seed)
    x, held_x = (torch.tensor(part, dtype=torch.float32)[:, None] for part in split[:2])
    y, held_y = (torch.tensor(part) for part in split[2:])
    net = build(p)
    if scale is not None:
        stochastic_pooling(net, keep=0.5, scale=scale)
    steps = EPOCHS * (len(x) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        net.train()
        order = torch.randperm(len(x))
        for first in range(0, len(x) - BATCH + 1, BATCH):
            some = order[first : first + BATCH]
            optimizer.zero_grad()
            F.cross_entropy(net(x[some]), y[some]).backward()
            optimizer.step()
            scheduler.step()
    return accuracy(net, x, y), accuracy(net, held_x, held_y)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (p, scale) in VARIANTS.items():
        results = [train(seed, p, scale) for seed in SEEDS]
        held = [result[1] for result in results]
        rows.append({"variant": name, "train %": statistics.mean(result[0] for result in results), "held-out %": statistics.mean(held)})
        rows[-1] |= {"held-out std": statistics.stdev(held), **{f"seed {seed}": value for seed, value in zip(SEEDS, held, strict=True)}}
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows([{key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
