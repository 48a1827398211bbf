"""Proof of value: one small residual network under three weight-decay policies, five seeds, on scikit-learn's digits.

    python benchmarks/weight_decay_value.py

Writes benchmarks/results/weight_decay_value.csv (one row per run) and prints mean and 95 % confidence interval of the test accuracy.
"""

from __future__ import annotations

import csv
import platform
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from pl_normkit.methods.weight_decay import param_groups

POLICIES = ("gamma_roles", "no_norm", "all")
SEEDS = range(5)
EPOCHS = 20
BATCH = 128
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-3
T_95 = 2.776
"""97.5 % quantile of Student's t with 4 degrees of freedom."""


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        if inputs == outputs:
            self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(branch + self.shortcut(x))


def network() -> nn.Module:
    stem = (nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """600 training images, so that regularization matters; the other 1197 are the test."""
    digits = load_digits()
    split = train_test_split(digits.images / 16, digits.target, train_size=600, random_state=seed, stratify=digits.target)
    train_x, test_x = (torch.tensor(images, dtype=torch.float32)[:, None] for images in split[:2])
    train_y, test_y = (torch.tensor(labels) for labels in split[2:])
    return train_x, test_x, train_y, test_y


def accuracy(policy: str, seed: int) -> float:
    torch.manual_seed(seed)
    train_x, test_x, train_y, test_y = data(seed)
    model = network()
    groups = param_groups(model, WEIGHT_DECAY, train_x[:2], policy=policy)
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9)
    steps = EPOCHS * (len(train_x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train_x))[: BATCH * (len(train_x) // BATCH)].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).float().mean().item()


def main() -> None:
    torch.set_num_threads(1)
    runs = [(policy, seed, accuracy(policy, seed)) for seed in SEEDS for policy in POLICIES]
    path = Path(__file__).parent / "results" / "weight_decay_value.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "seed", "test_accuracy", "epochs", "weight_decay", "machine", "torch"])
        machine = f"{platform.machine()} CPU, 1 thread"
        writer.writerows([policy, seed, f"{value:.5f}", EPOCHS, WEIGHT_DECAY, machine, torch.__version__] for policy, seed, value in runs)
    for policy in POLICIES:
        values = [value for name, _, value in runs if name == policy]
        half = T_95 * statistics.stdev(values) / len(values) ** 0.5
        print(f"{policy:<12} test accuracy {statistics.mean(values):.4f} +- {half:.4f} (95 %, {len(values)} seeds)")
    for other in POLICIES[1:]:
        gains = [runs_of(runs, "gamma_roles", seed) - runs_of(runs, other, seed) for seed in SEEDS]
        half = T_95 * statistics.stdev(gains) / len(gains) ** 0.5
        print(f"gamma_roles - {other:<8} {statistics.mean(gains):+.4f} +- {half:.4f} (paired by seed)")


def runs_of(runs: list[tuple[str, int, float]], policy: str, seed: int) -> float:
    return next(value for name, found, value in runs if (name, found) == (policy, seed))


if __name__ == "__main__":
    main()
