"""What one process of a two-process run does; started by test_norm_training_processes.py with torchrun's environment variables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import AdaptiveGradientClipping, NormalizeAndProject, SAMOnNorms

CALLBACKS = {
    "sam": lambda: SAMOnNorms(rho=0.4),
    "clipping": lambda: AdaptiveGradientClipping(clip_factor=0.02),
    "projection": NormalizeAndProject,
    "nothing": pl.Callback,
}


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.RMSNorm(6, eps=1e-5), nn.Linear(6, 1)
        ).double()
        self.example_input_array = torch.zeros(2, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trained(what: str, devices: int) -> dict[str, list[float]]:
    """The weights after four steps on batches of eight in all, of which each of two ranks gets the four that are its own."""
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if devices > 1:
        x = x.view(4, 2, 4, 3)[:, int(os.environ["RANK"])].flatten(0, 1)
    module = Module()
    options: dict[str, Any] = {"strategy": "ddp"} if devices > 1 else {}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[CALLBACKS[what]()], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8 // devices))
    return {name: value.flatten().tolist() for name, value in module.state_dict().items()}


def main(folder: Path) -> None:
    found = {what: trained(what, devices=2) for what in CALLBACKS}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
