"""Runs in which chosen batches are bad, and the state that a run ends with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Batches(Dataset[dict[str, Tensor]]):
    """`count` batches of (8, 4) inputs; `bad` maps a batch index to what is wrong with it."""

    def __init__(self, count: int, bad: dict[int, str], drop: bool = False) -> None:
        self.indices = [index for index in range(count) if not (drop and index in bad)]
        self.bad = bad

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        index = self.indices[position]
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(8, 4, generator=generator)
        y = x.sum(1, keepdim=True).tanh()
        kind = self.bad.get(index, "")
        if kind == "input":
            x[2, 1] = math.nan
        return {"x": x, "y": y, "kind": torch.tensor(KINDS.index(kind))}


KINDS = ["", "input", "activation", "loss", "gradient", "statistics", "overflow", "huge"]


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient.view(-1)[0] = ctx.value
        return gradient, None


class Module(pl.LightningModule):
    """Linear, batch norm, linear; its step does the harm that the batch asks for."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 1)
        self.make = optimizer or (lambda p: torch.optim.AdamW(p, lr=0.01))
        self.losses: list[float] = []

    def forward(self, x: Tensor, kind: str = "") -> Tensor:
        hidden = self.first(x)
        if kind == "activation":
            hidden = hidden / torch.zeros(())
        if kind == "overflow":
            hidden = hidden + 1e25 * torch.arange(8.0)[:, None]
        return self.last(self.norm(hidden).relu())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        kind = KINDS[int(batch["kind"])]
        out = self(batch["x"], kind)
        if kind == "gradient":
            out = _BadGradient.apply(out, -math.inf)
        loss = F.mse_loss(out, batch["y"])
        if kind == "loss":
            loss = loss + torch.zeros(()).log()
        if kind == "huge":
            loss = loss * 1e21
        if kind == "statistics":
            self.norm(torch.full((4, 8), math.nan))
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def fit(
    module: pl.LightningModule,
    data: Dataset[Any],
    folder: Path,
    *callbacks: pl.Callback,
    epochs: int = 1,
    **kwargs: Any,
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=kwargs.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **kwargs,
    )
    trainer.fit(module, DataLoader(data, batch_size=None, shuffle=False))
    return trainer


def state_of(module: pl.LightningModule, trainer: pl.Trainer) -> list[Tensor]:
    tensors = [tensor.detach().clone() for tensor in module.state_dict().values()]
    for optimizer in trainer.optimizers:
        for entry in optimizer.state.values():
            tensors += [value.detach().clone() for value in entry.values() if isinstance(value, Tensor)]
    return tensors


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def make(optimizer: Any = None, cls: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return cls(optimizer)


BAD = {3: "input", 7: "activation", 11: "loss", 12: "gradient", 17: "statistics", 21: "overflow", 25: "huge"}
