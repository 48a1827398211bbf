"""Overhead per training step of groups by role, and of the GammaDecay callback: ratios from interleaved steps of one process.

    python benchmarks/weight_decay_overhead.py

Writes benchmarks/results/weight_decay_overhead.csv.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
import torchvision
from torch import Tensor, nn

from pl_normkit.callbacks import GammaDecay
from pl_normkit.methods.weight_decay import param_groups, read_model

REPEATS = 40
IMAGES = (8, 3, 32, 32)


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def stepper(groups: Callable[[nn.Module], list[dict[str, object]]]) -> tuple[Callable[[], None], Callable[[], object]]:
    """A whole training step of resnet18 and the optimizer step alone."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    images, labels = torch.randn(IMAGES), torch.randint(10, IMAGES[:1])

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    return step, optimizer.step


def interleaved(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float, float]:
    """Median milliseconds of both and the median of the paired ratios second / first."""
    pairs = [(timed(first), timed(second)) if turn % 2 else (timed(second), timed(first))[::-1] for turn in range(REPEATS)]
    return (
        1e3 * statistics.median(a for a, _ in pairs),
        1e3 * statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def hook_microseconds() -> float:
    """One call of the callback's hook between two records."""

    class Tiny(pl.LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            return x

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 1
    callback, module = GammaDecay(record_every=100), Tiny()
    return 1e6 * statistics.median(timed(lambda: callback.on_train_batch_end(trainer, module, None, None, 0)) for _ in range(2000))


def main() -> None:
    torch.set_num_threads(1)
    one_group = stepper(lambda model: [{"params": list(model.parameters()), "weight_decay": 0.05}])
    by_role = stepper(lambda model: param_groups(model, 0.05, torch.zeros(IMAGES)))
    rows = [
        ("training step, resnet18, AdamW", *interleaved(one_group[0], by_role[0])),
        ("optimizer step alone", *interleaved(one_group[1], by_role[1])),
    ]
    with torch.device("meta"):
        large = torchvision.models.vit_l_16()
    reading = 1e3 * timed(lambda: read_model(large, torch.zeros(1, 3, 224, 224)))
    path = Path(__file__).parent / "results" / "weight_decay_overhead.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "one_group_ms", "by_role_ms", "ratio", "machine", "torch"])
        where = (f"{platform.machine()} CPU, 1 thread", torch.__version__)
        writer.writerows([what, f"{a:.3f}", f"{b:.3f}", f"{ratio:.4f}", *where] for what, a, b, ratio in rows)
        writer.writerow(["GammaDecay hook between records", "", f"{hook_microseconds() / 1e3:.5f}", "", *where])
        writer.writerow(["reading the roles of vit_l_16, once", "", f"{reading:.0f}", "", *where])
    print(path.read_text())


if __name__ == "__main__":
    main()
