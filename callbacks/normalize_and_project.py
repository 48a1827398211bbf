"""`NormalizeAndProject`: weights in front of norms keep their length while they train."""

from __future__ import annotations

__all__ = ["NormalizeAndProject"]

import warnings
from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._fit import fit_of, warn_of_nothing
from pl_normkit.callbacks._lightning import Callback, is_sharded
from pl_normkit.callbacks._network import networks_to_read
from pl_normkit.errors import ConfigError, NormkitWarning, NothingMatchedError, TraceError
from pl_normkit.methods.norm_training.projection import WeightProjection
from pl_normkit.surgery import path_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

WATCHED_EVERY = 100
"""Optimizer steps between two looks where nothing is projected."""


class NormalizeAndProject(Callback):
    """Projects the weights whose length a norm takes away back to the length they had at the start, after every `every` optimizer steps.

    What the network computes stays, up to the norms' eps; how far a step turns a weight no longer falls as the weight grows. Lower the
    learning rate by a schedule instead. With `every=0` nothing is projected: it looks every 100 steps and warns once when a
    weight has grown to more than twice its length, which is a quarter of the effective learning rate under SGD and half of it under Adam.

    Args:
        every: optimizer steps between two projections; 0 to watch alone. The paper's interval is not known to us.
        example_inputs: what the network is called with; by default `example_input_array`, or two training samples.

    Attributes:
        projections: the `WeightProjection` of each network by its path, empty before the fit.

    Raises:
        ConfigError: for a number below 0, and at the start of a fit for strategies that shard parameters.
    """

    def __init__(self, every: int = 1, example_inputs: Any = None) -> None:
        if type(every) is not int or every < 0:
            raise ConfigError("every must be a whole number that is not below 0", evidence=repr(every))
        self.every = every
        self.example_inputs = example_inputs
        self.projections: dict[str, WeightProjection] = {}
        self._loaded: dict[str, dict[str, float]] = {}
        self._done_at = 0
        self._has_warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit = fit_of(self, trainer, pl_module)
        if stage != "fit":
            return
        if is_sharded(trainer):
            raise ConfigError("the strategy shards parameters", where="NormalizeAndProject", fix="use DDP or one device")
        self.projections, self._has_warned = {}, False
        fit.read(lambda: self._read(trainer, pl_module))

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        failure: NothingMatchedError | TraceError | None = None
        for network, inputs in networks_to_read(trainer, pl_module, self.example_inputs):
            try:
                self.projections[path_of(pl_module, network)] = WeightProjection(network, inputs)
            except (NothingMatchedError, TraceError) as error:
                failure = error
        if not self.projections:
            warn_of_nothing(trainer, self, "weights in front of norms", failure or NothingMatchedError("no network is known"))
        self._load()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done_at = trainer.global_step
        self._load()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.every and trainer.global_step - self._done_at >= self.every:
            self._done_at = trainer.global_step
            for projection in self.projections.values():
                projection.project()
        elif not self.every and not self._has_warned and trainer.global_step - self._done_at >= WATCHED_EVERY:
            self._done_at = trainer.global_step
            self._watch()

    def _watch(self) -> None:
        each = ((path, name, value) for path, projection in self.projections.items() for name, value in projection.growth().items())
        growth = {f"{path}.{name}".lstrip("."): value for path, name, value in each}
        name = max(growth, key=lambda each: growth[each], default="")
        if name and growth[name] > 2:
            self._has_warned = True
            what = f"{name} is {growth[name]:.1f} times as long as at the start, and a norm takes its length away"
            warnings.warn(f"{what}: its effective learning rate has fallen; use NormalizeAndProject(every=1)", NormkitWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return {"lengths": {path: projection.state_dict() for path, projection in self.projections.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["lengths"]

    def _load(self) -> None:
        for path in self._loaded.keys() & self.projections.keys():
            self.projections[path].load_state_dict(self._loaded.pop(path))
