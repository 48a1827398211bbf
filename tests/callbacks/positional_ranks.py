"""What one process of a two-process run does; started by test_positional_variance_processes.py with torchrun's environment variables."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import PositionalVariance
from pl_normkit.errors import NormkitWarning
from tests.callbacks.test_positional_variance import Module

RANK = int(os.environ["RANK"])
CONTRAST = (0.5, 1.0)[RANK]
"""What training does to the images of this rank: a quarter of the variance on one, none of it lost on the other."""


def loader() -> Any:
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(RANK))
    return DataLoader(TensorDataset(images, torch.zeros(64, dtype=torch.long)), batch_size=8)


def run() -> dict[str, Any]:
    callback, module = PositionalVariance(batches=4), Module(contrast=CONTRAST)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[callback],
        ).fit(module, loader(), loader())  # fmt: skip
    return {"rho": callback.rho, "warnings": sum(issubclass(item.category, NormkitWarning) for item in seen)}


if __name__ == "__main__":
    (Path(sys.argv[1]) / f"rank{RANK}.json").write_text(json.dumps(run()))
