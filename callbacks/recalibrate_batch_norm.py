"""`RecalibrateBatchNorm`: a test with the batch norm statistics of the test data."""

from __future__ import annotations

__all__ = ["RecalibrateBatchNorm"]

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from pl_normkit.callbacks._first_batch import inputs_in
from pl_normkit.callbacks._fit import traced_network
from pl_normkit.callbacks._lightning import Callback
from pl_normkit.errors import ConfigError, NormkitWarning, NothingMatchedError
from pl_normkit.methods.norm_operators.recalibrate import recalibrate_batch_norm
from pl_normkit.surgery import Changes

if TYPE_CHECKING:
    import lightning.pytorch as pl


class RecalibrateBatchNorm(Callback):
    """Calls `recalibrate_batch_norm` on the test data, without its labels, before a test, and takes it back afterwards.

    With `source_weight=0` this is AdaBN; values near 1 move the statistics a little, for small or skewed test sets. The network's inputs
    are taken from a batch: the first item of a sequence, the entries of a mapping that its `forward` names. A network without batch norm
    statistics gets one warning, and is tested as it is.

    Args:
        source_weight: weight in [0, 1] of the statistics that the model has.
        max_batches: how many batches of each test loader are read; None for all.

    Attributes: `changes`, what was recalibrated in the last test.

    Raises: ConfigError for a weight outside [0, 1] and, in a test, for several processes, which see parts of the data, or unknown inputs.
    """

    def __init__(self, source_weight: float = 0.0, max_batches: int | None = None) -> None:
        if not 0 <= source_weight <= 1:
            raise ConfigError("source_weight is outside [0, 1]", evidence=repr(source_weight))
        self.source_weight = source_weight
        self.max_batches = max_batches
        self.changes = Changes()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            raise ConfigError("each process sees a part of the test data", where="RecalibrateBatchNorm", fix="test with devices=1")
        network = traced_network(pl_module)
        if network is None:
            raise ConfigError("it is not known which network the test calls", where="RecalibrateBatchNorm", fix="give the module a forward")
        try:
            self.changes = recalibrate_batch_norm(
                network, self._inputs(trainer, network), source_weight=self.source_weight, inputs=lambda inputs: inputs
            )
        except NothingMatchedError as error:
            warnings.warn(f"RecalibrateBatchNorm changes nothing: {error}", NormkitWarning, stacklevel=2)

    def _inputs(self, trainer: pl.Trainer, network: nn.Module) -> Iterator[Any]:
        loaders = trainer.test_dataloaders
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            for number, batch in enumerate(loader):  # type: ignore[arg-type]
                if number == self.max_batches:
                    break
                inputs = inputs_in(trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)), network)
                if inputs is None:
                    raise ConfigError("a batch does not tell what the network is called with", where="RecalibrateBatchNorm")
                yield inputs

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.changes.undo()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.changes.undo()
