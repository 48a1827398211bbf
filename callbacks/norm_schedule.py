"""`NormSchedule`: progressive norms turn into what they are exported as while the network trains."""

from __future__ import annotations

__all__ = ["NormSchedule"]

import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._lightning import Callback
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.methods.norm_operators.schedule import Turning, turning_norms

if TYPE_CHECKING:
    import lightning.pytorch as pl


class NormSchedule(Callback):
    """Takes the share of the old norm from 1 to 0 over optimizer steps, in the norms of `SwapNorms('prepbn')` and `('fixed_std')`, and in
    the layers of `SwapNorms('sigma_reparam', gain='one')`.

    Steps are those of optimizers (`trainer.global_step`), so that gradient accumulation and gradient checkpointing do not hasten it, and
    a resumed run goes on where it was. `prepbn` norms and layers turn together on a line, `fixed_std` norms one after another. Validation
    runs with every norm turned: in the mode in which the model is exported. A run that ends before the schedule gets one warning.

    Args:
        steps: optimizer steps from the first share below 1 to 0.
        start: optimizer step at which it begins.

    Attributes: `share`, the mean share of the old norms now; 1.0 before training.

    Raises: ConfigError for numbers out of range.
    """

    _of_a_run = ("_norms",)

    def __init__(self, steps: int, start: int = 0) -> None:
        if type(steps) is not int or steps < 1 or type(start) is not int or start < 0:
            raise ConfigError("steps must be a positive whole number and start none below 0", evidence=f"{steps!r}, {start!r}")
        self.steps = steps
        self.start = start
        self.share = 1.0
        self._norms: Turning | None = None
        self._evaluating = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        norms = turning_norms(pl_module)
        self._norms = norms if norms.progressive or norms.switching else None
        if self._norms is None:
            fix = "put SwapNorms('prepbn') or SwapNorms('fixed_std') before it"
            warnings.warn(f"NormSchedule changes nothing: the network has no norm that turns; {fix}", NormkitWarning, stacklevel=2)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._turn(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._turn(trainer)

    def _turn(self, trainer: pl.Trainer) -> None:
        if self._norms is not None:
            self._norms.turn(trainer.global_step, self.start, self.steps)
            self.share = self._norms.share

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._norms is not None:
            self._evaluating.enter_context(self._norms.finished())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluating.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._evaluating.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._norms is not None and self.share > 0:
            what = f"training ended with a share of {self.share:.2g} of the old norms, so that evaluation computes another function"
            warnings.warn(f"NormSchedule: {what}; choose steps within the run", NormkitWarning, stacklevel=2)
