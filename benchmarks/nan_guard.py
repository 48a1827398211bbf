"""Step time of resnet18 under NaNGuard, detect_anomaly and Lightning's own checks, over the step time without any of them.

    OMP_NUM_THREADS=1 python benchmarks/nan_guard.py [--rounds 9] [--batch 32] [--size 128] [--only bare nan_guard ...]

Each round runs every configuration once, in a new order, for a few steps; its ratio is the median step time over that of the bare run
of the same round. Times are CPU times of the process on one thread, which other work on the machine disturbs less than wall time; waits
would not show, but on a CPU nothing waits. The CSV holds the median of these ratios, its quartiles, and the milliseconds per step spent
inside the guard's hooks (far less noisy than a ratio of two step times). The GPU part of the claim (fused optimizers, no host
synchronisation) is not measured here.
"""

from __future__ import annotations

import argparse
import csv
import logging
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.spike import SpikeDetection
from torch import Tensor
from torch.utils.data import DataLoader

from pl_normkit.callbacks.nan_guard import NaNGuard

RESULTS = Path(__file__).parent / "results" / "nan_guard.csv"
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


class TimedGuard(NaNGuard):
    """NaNGuard that sums the time spent in its own hooks."""

    inside = 0.0


def _timed(name: str) -> Callable[..., None]:
    original = getattr(NaNGuard, name)

    def hook(self: TimedGuard, *args: Any, **kwargs: Any) -> None:
        start = time.process_time()
        try:
            original(self, *args, **kwargs)
        finally:
            TimedGuard.inside += time.process_time() - start

    return hook


for _name in HOOKS:
    setattr(TimedGuard, _name, _timed(_name))


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = timm.create_model("resnet18", num_classes=100)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(pl.Callback):
    """Stands before and after the other callbacks, so that their hooks are inside the step."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.starts.append(time.process_time())

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.process_time())


def run(batches: Any, callbacks: list[pl.Callback], **options: Any) -> float:
    """Median step time in seconds, the first step left out."""
    first, last = Clock(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, callbacks=[first, *callbacks, last], **options,
        )  # fmt: skip
        trainer.fit(Classifier(), DataLoader(batches, batch_size=None))
    durations = [end - start for start, end in zip(first.starts, last.ends, strict=True)]
    return statistics.median(durations[1:])


CONFIGURATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bare": lambda: {"callbacks": []},
    "nan_guard": lambda: {"callbacks": [TimedGuard()]},
    "detect_anomaly": lambda: {"callbacks": [], "detect_anomaly": True},
    "early_stopping_check_finite": lambda: {"callbacks": [EarlyStopping("loss", check_finite=True, check_on_train_epoch_end=True)]},
    "spike_detection": lambda: {"callbacks": [SpikeDetection(rtol=1e9)]},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    batch = (torch.randn(options.batch, 3, options.size, options.size), torch.randint(100, (options.batch,)))
    batches = [batch] * options.steps
    times: dict[str, list[float]] = {name: [] for name in options.only}
    inside: list[float] = []
    for _ in range(options.rounds):
        for name in random.sample(options.only, len(options.only)):
            TimedGuard.inside = 0.0
            times[name].append(run(batches, **CONFIGURATIONS[name]()))
            if name == "nan_guard":
                inside.append(TimedGuard.inside / options.steps)
    write(options, times, statistics.median(inside))


def write(options: argparse.Namespace, times: dict[str, list[float]], inside: float) -> None:
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), other work on the machine"
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["configuration", "ratio_median", "ratio_q1", "ratio_q3", "step_ms_median", "hooks_ms", "hooks_share", "setting", "machine"]
        )
        for name, values in times.items():
            ratios = [value / bare for value, bare in zip(values, times["bare"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            step = statistics.median(values)
            hooks = (f"{inside * 1e3:.2f}", f"{inside / step:.4f}") if name == "nan_guard" else ("", "")
            setting = f"resnet18, batch {options.batch}, {options.size} px, {options.rounds} rounds of {options.steps} steps"
            rows.writerow([name, f"{middle:.4f}", f"{low:.4f}", f"{high:.4f}", f"{step * 1e3:.1f}", *hooks, setting, machine])
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
