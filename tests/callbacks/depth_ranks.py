"""What one process of a two-process run does; started by test_depth_processes.py with torchrun's environment variables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import DepthProfile, NormPlacement
from tests.callbacks.test_depth_profile import Blocks
from tests.callbacks.test_depth_profile import Module as Profiled
from tests.callbacks.test_norm_placement import Module as Placed

RANK = int(os.environ["RANK"])


class Kept(Logger):
    """Keeps what it is given, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    name, version = "kept", "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append({name: value for name, value in metrics.items() if name.startswith("depth/")})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        return


def fit(module: pl.LightningModule, callback: pl.Callback, logger: Logger) -> None:
    samples = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(RANK)) * (1 + RANK)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=logger, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[callback],
    ).fit(module, DataLoader(TensorDataset(samples), batch_size=2))  # fmt: skip


def profile() -> dict[str, Any]:
    torch.manual_seed(0)
    callback, logger = DepthProfile(every_n_steps=3, gradient_every=1), Kept()
    fit(Profiled(Blocks()), callback, logger)
    assert callback.profile is not None
    return {"logged": [found for found in logger.logged if found], "own": callback.profile.scalars()}


def place() -> dict[str, Any]:
    callback, module = NormPlacement("peri"), Placed(inputs=False)
    fit(module, callback, Kept())
    names = [name for name, part in module.named_modules() if "norm" in type(part).__name__.lower()]
    weights = {name: value.flatten().tolist() for name, value in module.state_dict().items()}
    return {"made": len(callback.changes.made), "norms": names, "weights": weights}


if __name__ == "__main__":
    (Path(sys.argv[1]) / f"rank{RANK}.json").write_text(json.dumps({"profile": profile(), "placement": place()}))
