"""What one process of a two-process run does; started by test_atrous_rates_processes.py with torchrun's environment variables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pl_normkit.callbacks import AtrousRates
from tests.callbacks.test_atrous_rates import ForwardModule, Module, Network

SIDE = 48 if os.environ["RANK"] == "0" else 96
"""The ranks see crops of different sizes, as random resizing may give them."""


class Stream(IterableDataset[tuple[Tensor]]):
    def __iter__(self) -> Any:
        return iter([(torch.randn(1, SIDE, SIDE),)] * 4)


def run(style: str) -> list[int]:
    module = ForwardModule() if style == "samples" else Module()
    images = TensorDataset(torch.randn(4, 1, SIDE, SIDE)) if style == "samples" else Stream()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[AtrousRates()],
    )  # fmt: skip
    trainer.fit(module, DataLoader(images, batch_size=2))
    assert isinstance(module.net, Network)
    return [branch.dilation[0] for branch in module.net.branches]  # type: ignore[union-attr,index,misc]


if __name__ == "__main__":
    found = {style: run(style) for style in ("samples", "first call")}
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
