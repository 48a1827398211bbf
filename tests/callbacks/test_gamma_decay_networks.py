"""GammaDecay in modules of several networks: each is read by what a training step calls it with."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from pl_normkit.callbacks import GammaDecay
from pl_normkit.methods.weight_decay import read_model
from pl_normkit.methods.weight_decay.roles import GAMMAS
from tests.callbacks.decaying import Residual, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*", "ignore:.*does not have many workers.*")


class Two(pl.LightningModule):
    """Two networks with an optimizer each, as in adversarial training."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = Residual(), Residual()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for network, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(network(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1) for network in (self.first, self.second)]


class Unreadable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if x.mean().item() > 0 else x + 0)


def test_every_network_of_a_step_is_read() -> None:
    module, decay = Two(), GammaDecay(policy="gamma_roles")
    fit(module, decay)
    expected = {str(name): role for name, role in read_model(Residual(), torch.zeros(2, 3, 8, 8)).roles.items()}
    assert decay.known is not None
    assert decay.known.roles == {f"{part}.{name}": role for part in ("first", "second") for name, role in expected.items()}
    assert decay.known.is_traced
    assert {role for role in expected.values() if role in GAMMAS}


def test_a_network_that_cannot_be_read_leaves_the_other_read() -> None:
    module, decay = Two(), GammaDecay(policy="gamma_roles")
    module.second = Unreadable()  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(module, decay)
    assert any(str(found.message).startswith("GammaDecay reads module types alone: Unreadable") for found in seen)
    assert decay.known is not None
    assert str(decay.known.roles["first.bn1.weight"]) == "gamma_branch"
    assert str(decay.known.roles["second.body.bn1.weight"]) == "unknown"
