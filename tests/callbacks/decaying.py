"""A residual network under Lightning, and the decay that its parameters have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DECAYED = {f"net.{layer}.weight" for layer in ("stem", "conv1", "conv2", "down", "head")}
SPARED = {f"net.{norm}.{leaf}" for norm in ("bn", "bn1", "bn2", "bn_down") for leaf in ("weight", "bias")} | {"net.head.bias"}


class Residual(nn.Module):
    """Stem, one post-activation block with a projection shortcut, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(4, 6, 1, bias=False)
        self.bn_down = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        x = torch.relu(branch + self.bn_down(self.down(x)))
        return self.head(x.mean((2, 3)))


def adamw(module: pl.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


class Module(pl.LightningModule):
    """`configure` is what the user wrote as configure_optimizers."""

    def __init__(self, configure: Callable[[pl.LightningModule], Any] = adamw, *, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Residual()
        self.configure = configure
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator))
    return DataLoader(data, batch_size=4)


def trainer_with(*callbacks: pl.Callback | None, steps: int = 2, **options: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lasting = {"max_steps": steps, "max_epochs": -1, "log_every_n_steps": 1, "enable_model_summary": False}
    return pl.Trainer(**{**quiet, **lasting, **options}, callbacks=[callback for callback in callbacks if callback is not None])


def fit(module: pl.LightningModule, *callbacks: pl.Callback | None, ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
    trainer = trainer_with(*callbacks, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def decays_of(trainer: pl.Trainer, module: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


EXPECTED = {**dict.fromkeys(DECAYED, 0.1), **dict.fromkeys(SPARED, 0.0)}
