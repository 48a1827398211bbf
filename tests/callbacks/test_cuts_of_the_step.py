"""Cuts of the gradient that stand in `training_step` itself, outside every module's forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import ModelAudit


class Parts(pl.LightningModule):
    """Clean: an encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head, self.probe = nn.Sequential(nn.Linear(6, 12), nn.ReLU()), nn.Linear(12, 3), nn.Linear(12, 3)

    def training_step(self, batch: Any, index: int) -> Tensor:
        features = self.encoder(batch[0])
        return F.cross_entropy(self.head(features), batch[1]) + F.cross_entropy(self.probe(features), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.0)


class DetachedFeatures(Parts):
    def training_step(self, batch: Any, index: int) -> Tensor:
        features = self.encoder(batch[0])
        features = features.detach()  # cut
        return F.cross_entropy(self.head(features), batch[1]) + F.cross_entropy(self.probe(features), batch[1])


class DataOfTheFeatures(Parts):
    def training_step(self, batch: Any, index: int) -> Tensor:
        features = self.encoder(batch[0]).data  # cut
        return F.cross_entropy(self.head(features) + self.probe(features), batch[1])


class LossOfANumber(Parts):
    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return torch.tensor(loss.item(), requires_grad=True)  # cut


class AuxiliaryLossAsANumber(Parts):
    def training_step(self, batch: Any, index: int) -> Tensor:
        features = self.encoder(batch[0])
        auxiliary = F.cross_entropy(self.probe(features), batch[1])
        return F.cross_entropy(self.head(features), batch[1]) + auxiliary.item()  # cut


class DetachedForAProbe(Parts):
    """The head trains the encoder; the probe only reads it."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        features = self.encoder(batch[0])
        return F.cross_entropy(self.head(features), batch[1]) + F.cross_entropy(self.probe(features.detach()), batch[1])


class ProbeLater(Parts):
    """The probe's loss is told from the start and joins later."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        features = self.encoder(batch[0])
        loss = F.cross_entropy(self.head(features), batch[1])
        auxiliary = F.cross_entropy(self.probe(features), batch[1])
        self.log("auxiliary", auxiliary.detach())
        if self.current_epoch > 3:
            loss = loss + auxiliary
        return loss


class LoggedNumbers(Parts):
    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.log("loss", loss.item())
        return loss


class Teacher(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.encoder)

    def training_step(self, batch: Any, index: int) -> Tensor:
        wanted = self.teacher(batch[0]).detach()
        return super().training_step(batch, index) + F.mse_loss(self.encoder(batch[0]), wanted)


def findings_of(module: pl.LightningModule, folder: Path) -> list[Any]:
    data = DataLoader(TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,))), batch_size=16)
    audit = ModelAudit(select=["NK0"])
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[audit], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data)
    assert audit.report is not None
    return list(audit.report.findings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "how", "parts"),
    [
        (DetachedFeatures, "detach() in training_step", {"encoder"}),
        (DataOfTheFeatures, ".data in training_step", {"encoder"}),
        (AuxiliaryLossAsANumber, "item() in training_step", {"probe"}),
        (LossOfANumber, "the loss is a new tensor", {"encoder", "head", "probe"}),
    ],
)
def test_a_cut_in_the_step_is_named_with_its_line(kind: type[Parts], how: str, parts: set[str], tmp_path: Path) -> None:
    (finding,) = findings_of(kind(), tmp_path)
    assert (finding.code, how.lower() in finding.message.lower()) == ("NK001", True)
    assert {place.module.split(".")[0] for place in finding.places} == parts
    line = int(finding.message.split(".py:")[1].split(":")[0])
    assert "# cut" in Path(__file__).read_text().splitlines()[line - 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Parts, DetachedForAProbe, ProbeLater, LoggedNumbers, Teacher])
def test_cuts_that_are_meant_are_left_alone(kind: type[Parts], tmp_path: Path) -> None:
    assert [str(finding) for finding in findings_of(kind(), tmp_path)] == []
