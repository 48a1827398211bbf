"""What one process of a two-process run does; started by test_group_count.py with torchrun's environment variables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import GroupCount, TimestepEmbedding
from tests.methods.timestep_embedding.networks import ResBlock, res_block

GROUPS, TIME = GroupCount(), TimestepEmbedding()


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.block = res_block("instance")
        self.example_input_array = ResBlock.inputs()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.block(self.stem(x), time)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(*batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 8, 8, generator=generator) * torch.arange(1.0, 9.0).view(-1, 1, 1, 1)
    samples = TensorDataset(images, torch.randn(8, 16, generator=generator))
    module = Module()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[GROUPS, TIME],
    )  # fmt: skip
    trainer.fit(module, DataLoader(samples, batch_size=2))
    found = {
        "norms": [type(module.stem[1]).__name__, type(module.block.block2[0]).__name__],
        "changed": len(GROUPS.changes.made) + len(TIME.changes.made),
        "weights": {name: value.flatten()[:4].tolist() for name, value in module.state_dict().items()},
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
