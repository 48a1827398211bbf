"""What one process of a two-process run with an unused layer does; started by test_audit_of_the_step.py with torchrun's environment."""

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

from pl_normkit.callbacks import ModelAudit


class Heads(pl.LightningModule):
    """Its second head has its turn in another step."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"now": nn.Linear(4, 2), "later": nn.Linear(4, 2)})

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.heads["now" if self.global_step < 100 else "later"](batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(strategy: str) -> dict[str, Any]:
    """What NK001 names, after how many steps the run ended, and the error that ended it."""
    audit = ModelAudit(config=False, select=["NK001"])
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[audit],
    )  # fmt: skip
    error = ""
    try:
        trainer.fit(Heads(), DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=2))
    except RuntimeError as raised:
        error = str(raised)
    findings = audit.report.findings if audit.report is not None else []
    told = [(finding.message, finding.advice, [place.module for place in finding.places]) for finding in findings]
    return {"told": told, "steps": trainer.global_step, "error": error}


if __name__ == "__main__":
    found = {strategy: run(strategy) for strategy in ("ddp", "ddp_find_unused_parameters_true")}
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
