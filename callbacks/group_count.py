"""`GroupCount`: group norms in place of batch norms, before training."""

from __future__ import annotations

__all__ = ["GroupCount"]

from typing import TYPE_CHECKING

from pl_normkit.callbacks._fit import fit_of
from pl_normkit.callbacks._lightning import Callback
from pl_normkit.methods.group_count import convert_to_group_norm, num_groups
from pl_normkit.methods.group_count.counts import GroupTarget
from pl_normkit.surgery import Changes, Filter

if TYPE_CHECKING:
    import lightning.pytorch as pl


class GroupCount(Callback):
    """Calls `convert_to_group_norm` on the LightningModule in `setup`: the function changes, so train from there.

    A network without batch norms gets one warning, and trains as it is. A resumed run and tests of a checkpoint need the callback again.

    Args:
        groups: "32 groups", "16 channels per group" or a number, rounded to a divisor of each norm's channels.
        weight_standardization: also standardize the kernels of the convolutions.
        filter_fn: as for `convert_to_group_norm`; paths are those of the LightningModule.

    Attributes:
        changes: what was converted; its `undo()` gives the model back. Empty before `setup`.

    Raises:
        ConfigError: for another form of `groups`.
    """

    def __init__(self, groups: GroupTarget = "32 groups", weight_standardization: bool = False, filter_fn: Filter | None = None) -> None:
        num_groups(32, groups)  # refuses a bad target before a network is there
        self.groups = groups
        self.weight_standardization = weight_standardization
        self.filter_fn = filter_fn
        self.changes = Changes()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.changes:
            fit_of(self, trainer, pl_module).edit(self, lambda: self._convert(pl_module), "batch norms")

    def _convert(self, pl_module: pl.LightningModule) -> None:
        self.changes = convert_to_group_norm(
            pl_module, self.groups, weight_standardization=self.weight_standardization, filter_fn=self.filter_fn
        )
