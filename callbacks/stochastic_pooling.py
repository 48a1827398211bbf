"""`StochasticPooling`: average pools that average a random subset of each window while training."""

from __future__ import annotations

__all__ = ["StochasticPooling"]

from typing import TYPE_CHECKING

from pl_normkit.callbacks._fit import fit_of
from pl_normkit.callbacks._lightning import Callback
from pl_normkit.methods.stochastic_pooling.fix import stochastic_pooling
from pl_normkit.methods.stochastic_pooling.functional import Scale, check_keep, check_scale
from pl_normkit.surgery import Changes, Filter

if TYPE_CHECKING:
    import lightning.pytorch as pl


class StochasticPooling(Callback):
    """Calls `stochastic_pooling` on the LightningModule in `setup`; evaluation stays as it was.

    A network without a pool that is chosen gets one warning, and trains as it is.

    Args:
        keep: share of each window that stays, in (0, 1]; near 0.1 where a network overfits, while 0.5 showed nothing in our runs.
        filter_fn: as for `stochastic_pooling`; paths are those of the LightningModule.
        scale: "sqrt", "none", "match" or a number.

    Attributes:
        changes: what was swapped; its `undo()` gives the model back. Empty before `setup`.

    Raises:
        ConfigError: for keep or scale out of range.
    """

    def __init__(self, keep: float = 0.5, filter_fn: Filter | None = None, scale: Scale = "sqrt") -> None:
        self.keep = check_keep(keep)
        self.filter_fn = filter_fn
        self.scale = check_scale(scale)
        self.changes = Changes()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit_of(self, trainer, pl_module).edit(self, lambda: self._swap(pl_module), "average pools")

    def _swap(self, pl_module: pl.LightningModule) -> None:
        changes = stochastic_pooling(pl_module, self.keep, self.filter_fn, scale=self.scale)
        if changes or not self.changes:
            self.changes = changes
