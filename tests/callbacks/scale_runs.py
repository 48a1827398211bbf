"""A small segmentation run, and the same in each of two processes: `python -m tests.callbacks.scale_runs FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pl_normkit.callbacks import ScaleEqualization
from pl_normkit.errors import DataError
from tests.methods.fusion_scale.models import OwnDecoder


class Images(Dataset[dict[str, Any]]):
    """Sixteen images, each with its number; `bad` holds NaN."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)) + index / 8
        return {"image": image * torch.nan if index == self.bad else image, "index": index}


class Segmenter(pl.LightningModule):
    """Notes which images each training step got."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.net = OwnDecoder(kernel)
        self.seen: list[list[int]] = []

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.net(image)
        return out

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(batch["index"].tolist())
        return self(batch["image"]).square().mean()

    def test_step(self, batch: dict[str, Tensor], index: int) -> None:
        self(batch["image"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **options, "callbacks": list(callbacks)})


def run(folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    module = Segmenter()
    distributed = {"strategy": "ddp", "devices": 2}
    trainer(ScaleEqualization(), **distributed).fit(module, DataLoader(Images(), batch_size=4, shuffle=True))
    std = module.net.get_submodule("fuse.scale_equalizer").std.tolist()
    try:
        trainer(ScaleEqualization(), **distributed).fit(Segmenter(), DataLoader(Images(bad=15), batch_size=4))
        error = ""
    except DataError as caught:
        error = str(caught)
    return {"std": std, "seen": module.seen, "error": error}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    (path / f"rank{os.environ['RANK']}.json").write_text(json.dumps(run(path)))
