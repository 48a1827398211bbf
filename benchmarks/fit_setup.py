"""What four callbacks add to the start of a fit, over one `torch.export` of the network.

    python benchmarks/fit_setup.py [--repeats 5]     writes benchmarks/results/fit_setup.csv

A fit of one step on two images, with ModelAudit, GammaDecay, NaNGuard and ScaleEqualization less the same fit without, over one export of
the network in training mode on the same images; all three in turn in one process, in processor time, after a warm-up of each. `setup` ends
where the first training step begins, `fit` is the whole of it, with the audit of that step. Ratios are medians over the rounds; `traces`
counts the exports in a fit. ScaleEqualization finds nothing to do in these networks. Target: a setup of at most 1.2 on resnet50, one trace.
"""

from __future__ import annotations

import argparse
import csv
import gc
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.callbacks import GammaDecay, ModelAudit, NaNGuard, ScaleEqualization
from pl_normkit.specs import build_model

RESULTS = Path(__file__).parent / "results" / "fit_setup.csv"
MODELS = ("timm:resnet50", "timm:resnet18", "timm:densenet121", "timm:vit_small_patch16_224")
SIDES = {"timm:vit_small_patch16_224": 224}


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started


class Clock(pl.Callback):
    """When the first training step begins."""

    def on_train_batch_start(self, *_: object) -> None:
        self.begun = time.process_time()


def fit(module: pl.LightningModule, images: Tensor, callbacks: list[pl.Callback]) -> tuple[float, float]:
    """Seconds until the first step begins, and of all."""
    gc.collect()
    clock = Clock()
    data = torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.long))
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[*callbacks, clock],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    started = time.process_time()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=len(images)))
    return clock.begun - started, time.process_time() - started


def counted_traces(work: Callable[[], object]) -> int:
    export, count = torch.export.export, 0

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        return export(*args, **kwargs)

    torch.export.export = counting  # type: ignore[assignment]
    try:
        work()
    finally:
        torch.export.export = export
    return count


def measure(spec: str, repeats: int) -> dict[str, object]:
    module = Module(build_model(spec, device="cpu").train())
    images = torch.randn(2, 3, SIDES.get(spec, 64), SIDES.get(spec, 64))

    def export() -> object:
        return torch.export.export(module.net, (images,), strict=False)

    def watched() -> tuple[float, float]:
        return fit(module, images, [ModelAudit(config=False), GammaDecay(), NaNGuard(), ScaleEqualization()])

    traces = counted_traces(watched)
    export()
    fit(module, images, [])
    rounds = [(seconds(export), fit(module, images, []), watched()) for _ in range(repeats)]
    added = [[(after[part] - before[part]) / exported for exported, before, after in rounds] for part in (0, 1)]
    return {
        "model": spec,
        "pixels": images.shape[-1],
        "traces": traces,
        "export_s": round(statistics.median(row[0] for row in rounds), 3),
        "setup": round(statistics.median(added[0]), 3),
        "setup_min": round(min(added[0]), 3),
        "setup_max": round(max(added[0]), 3),
        "fit": round(statistics.median(added[1]), 3),
        "rounds": repeats,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def main() -> None:
    """Measure every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for spec in MODELS:
        if options.only in spec:
            rows.append(measure(spec, options.repeats))
            print(rows[-1], flush=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
