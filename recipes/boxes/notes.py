"""What rules NK311 to NK314 say of pool and loss as they were in training."""

from __future__ import annotations

__all__ = ["BoxNotes"]

import lightning as L
from lightning.pytorch.callbacks import Callback

from pl_normkit.auditing import audit
from pl_normkit.report import Report


class BoxNotes(Callback):
    """Judges pool and loss by their last call, when the training is over.

    Attributes:
        report: of the last training; None before.
    """

    def __init__(self) -> None:
        self.report: Report | None = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report = audit(pl_module, select=["NK31"], measure=False)
