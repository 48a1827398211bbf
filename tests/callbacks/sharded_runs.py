"""What one process of a two-process run does; started by test_gamma_decay_processes.py with torchrun's environment variables."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import GammaDecay
from pl_normkit.methods.weight_decay.fix import parameter_names


class Residual(nn.Module):
    """One post-activation block with a projection shortcut; every norm scale has its own role."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.shortcut = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.branch(x) + self.shortcut(x)).mean((2, 3)))


class Module(pl.LightningModule):
    """`style`: "plain"; "sharded" shards in configure_model, as FSDP2 wants it; "late" builds and shards there."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        if style != "late":
            self.net = Residual()

    def configure_model(self) -> None:
        if self.style == "plain":
            return
        if self.style == "late":
            self.net = Residual()
        fully_shard(self.net.branch, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20), "interval": "step"}]


def strategy_for(kind: str) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(process_group_backend="gloo", data_parallel_size=2, tensor_parallel_size=1)


def run(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    module = Module({"fsdp2": "sharded", "fsdp2_late": "late"}.get(kind, "plain"))
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator))
    callback = GammaDecay(policy="gamma_roles", record_every=1)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy_for(kind), max_steps=2, callbacks=[callback], **quiet)
    seen: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module.on_train_start = lambda: seen.update(decays=_decays(trainer, module))  # type: ignore[method-assign]
            trainer.fit(module, DataLoader(data, batch_size=4))
        except Exception as error:
            seen["error"] = f"{type(error).__name__}: {error}"
    told = [str(warning.message) for warning in caught if "NormkitWarning" in warning.category.__name__]
    return {**seen, "history": callback.history, "warnings": told}


def _decays(trainer: pl.Trainer, module: nn.Module) -> dict[str, float]:
    names = parameter_names(module)
    return {
        names.get(id(parameter), "?"): group["weight_decay"]
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


if __name__ == "__main__":
    folder, *kinds = sys.argv[1:]
    found = {kind: run(kind) for kind in kinds}
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
