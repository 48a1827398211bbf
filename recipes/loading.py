"""What the DataModules of all recipes share."""

from __future__ import annotations

__all__ = ["RecipeData", "require_option"]

from typing import Any

import lightning as L
import torch
from torch import Tensor

from pl_normkit.errors import DataError


class RecipeData(L.LightningDataModule):
    """A DataModule whose datasets hand over a DataError as their item, and whose `collate_fn` passes it on as the batch.

    Raised inside a loader worker, the text of the error would carry the worker's traceback.
    """

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Raise here, in the main process, the DataError that a loader worker handed over as its batch."""
        if isinstance(batch, DataError):
            raise batch
        return batch

    def sample_images(self, count: int) -> Tensor:
        """The first validation images, (count, channels, H, W) or fewer, as the network gets them. Raises DataError."""
        taken: list[Tensor] = []
        for batch in self.val_dataloader():
            taken += self.on_before_batch_transfer(batch, 0)[0]
            if len(taken) >= count:
                break
        return torch.stack(taken[:count])


def require_option(holds: bool, option: str, value: object, mend: str) -> None:
    """Raise DataError naming the data option unless `holds`."""
    if not holds:
        raise DataError(f"the data option {option} cannot be used", where=f"--data.{option}", evidence=repr(value), mend=mend)
