"""`TimestepEmbedding`: remedies for a time that norms take away, made before training."""

from __future__ import annotations

__all__ = ["TimestepEmbedding"]

from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from pl_normkit.callbacks._fit import fit_of
from pl_normkit.callbacks._network import traced_network
from pl_normkit.errors import ConfigError, nearest
from pl_normkit.methods.timestep_embedding import apply_fewer_groups, apply_positional_time, apply_time_bias
from pl_normkit.surgery import Changes, Filter

Remedy = Literal["positional", "bias", "groups"]
_REMEDIES = {"positional": apply_positional_time, "bias": apply_time_bias, "groups": apply_fewer_groups}


class TimestepEmbedding(Callback):
    """Applies one remedy to the network in `setup`, once, so that optimizers, wrappers and checkpoints find what it adds.

    A network with nothing to remedy gets one warning, and trains as it is.

    Args:
        remedy: "positional" (`apply_positional_time`), "bias" (`apply_time_bias`) or "groups" (`apply_fewer_groups`).
        example_inputs: what the network is called with, the time as a tensor among them; None takes the module's `example_input_array`.
            The network is the LightningModule where it has a forward, else its only child with parameters.
        filter_fn: as for the functions.

    Attributes:
        changes: what was done; its `undo()` gives the model back. Empty before `setup`.

    Raises:
        ConfigError: for another remedy and, in `setup`, where inputs or network are not known, or where another callback has copied the
            network already (EMA).
    """

    def __init__(self, remedy: Remedy = "positional", example_inputs: Any = None, filter_fn: Filter | None = None) -> None:
        if remedy not in _REMEDIES:
            raise ConfigError(
                f"there is no remedy {remedy!r}",
                fix=nearest(str(remedy), _REMEDIES)
                or f"choose one of {', '.join(get_args(Remedy))}; other ways are modules of pl_normkit.nn",
            )
        self.remedy: Remedy = remedy
        self.example_inputs = example_inputs
        self.filter_fn = filter_fn
        self.changes = Changes()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.changes:
            fit_of(self, trainer, pl_module).edit(self, lambda: self._apply(pl_module), "times that a norm takes something of")

    def _apply(self, pl_module: pl.LightningModule) -> None:
        network = traced_network(pl_module)
        inputs = self.example_inputs if self.example_inputs is not None else pl_module.example_input_array
        if network is None or inputs is None:
            raise ConfigError(
                "the network of this LightningModule is not known"
                if network is None
                else "it is not known what the network is called with",
                where="TimestepEmbedding",
                fix="give the module a forward" if network is None else "pass example_inputs=, or set example_input_array",
            )
        self.changes = _REMEDIES[self.remedy](network, inputs, filter_fn=self.filter_fn)
