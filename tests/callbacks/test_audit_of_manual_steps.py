"""What `ModelAudit` hears of steps that optimize by hand, and the numbers of a step in its report and logs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import ModelAudit
from pl_normkit.report import Report
from tests.methods.wiring.setups import mlp


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)).detach())


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Module):
    """One network by hand; `clears` says whether gradients are cleared between steps."""

    def __init__(self, net: nn.Module, *, clears: bool) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.clears = clears

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        if self.clears:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Alternating(Manual):
    """A critic first, on features that are cut for it, then the network that it judges."""

    def __init__(self, *, clears: bool) -> None:
        super().__init__(mlp(), clears=clears)
        self.critic = mlp(10, 16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        second.zero_grad()
        self.manual_backward(F.softplus(self.critic(self.net(batch[0]).detach())).mean())
        second.step()
        if self.clears:
            first.zero_grad()
        self.manual_backward(F.softplus(-self.critic(self.net(batch[0]))).mean())
        first.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.SGD(self.critic.parameters(), 0.1)]


class SeveralBackwards(Manual):
    """Two losses of two heads make one step: after the first backward one head has no gradient yet."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"body": mlp(), "a": nn.Linear(10, 10), "b": nn.Linear(10, 10)}), clears=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for head in ("a", "b"):
            self.manual_backward(F.cross_entropy(self.net[head](self.net["body"](batch[0])), batch[1]))
        optimizer.step()


def fit(module: pl.LightningModule, logger: Any = False) -> Report:
    data = TensorDataset(torch.randn(32, 32), torch.randint(0, 10, (32,)))
    audit = ModelAudit(select=["NK0"])
    trainer = pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        callbacks=[audit],
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=8))
    assert not torch_module._global_forward_hooks
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    assert audit.report is not None
    assert audit.report.failures == []
    return audit.report


NAMES = [f"net.{name}" for name, _ in mlp().named_parameters()]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (lambda: Manual(mlp(), clears=True), []),
        (lambda: Manual(mlp(), clears=False), [("NK004", NAMES)]),
        (lambda: Alternating(clears=True), []),
        (lambda: Alternating(clears=False), [("NK004", NAMES)]),
        (SeveralBackwards, []),
        (lambda: Manual(Detached(), clears=True), [("NK001", ["net.first.weight", "net.first.bias"])]),
    ],
    ids=["cleared", "not cleared", "alternating, cleared", "alternating, not cleared", "several backwards", "cut"],
)
def test_steps_by_hand(module: Any, expected: list[tuple[str, list[str]]]) -> None:
    found = [(finding.code, [place.module for place in finding.places]) for finding in fit(module()).findings]
    assert found == expected


def test_the_numbers_of_the_step_reach_the_report_and_the_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    report = fit(Module(Detached()), logger)
    assert (report.numbers["unused_parameters"], report.summary()["NK001"]) == (2.0, 1.0)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["normkit/unused_parameters"], row["normkit/NK001"], row["normkit/warnings"]) == ("2.0", "1.0", "1.0")
