"""`ScaleEqualization`: calibrates scale equalizers on the training data before the first step, once."""

from __future__ import annotations

__all__ = ["ScaleEqualization"]

from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._first_batch import first_samples
from pl_normkit.callbacks._fit import Fit, current_fit, fit_of, in_first_network
from pl_normkit.callbacks._lightning import Callback
from pl_normkit.callbacks._network_calls import NetworkCall
from pl_normkit.callbacks._training_batches import shown_passes, training_batches
from pl_normkit.errors import ConfigError
from pl_normkit.methods.fusion_scale.calibrate import Granularity
from pl_normkit.methods.fusion_scale.fix import Mode, check_options
from pl_normkit.methods.fusion_scale.fold import Border
from pl_normkit.methods.fusion_scale.running import InputsOf
from pl_normkit.methods.fusion_scale.stages import StagedEqualization
from pl_normkit.surgery import Changes

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ScaleEqualization(Callback):
    """`equalize_scales` in a training run: the modules go in when any stage is set up, so that checkpoints find their keys; their
    statistics are taken before the first training step, on batches of the training loader.

    The loader is read through a copy, without moving its sampler's or anyone's RNG, so the run sees the batches it would have seen.
    Statistics are those of all ranks together. A resumed run takes them from the checkpoint. A network without such fusions, or one of
    which it is not known what it is called with, gets one warning, and trains as it is.

    Args:
        mode: "explicit" or "init", see `equalize_scales`.
        max_batches: batches of each pass on each rank; None for the whole epoch. Nested fusions take one pass for each level.
        granularity: one mean and std per "branch" or per "channel".
        example_inputs: what the network is traced with: a tensor, a tuple of positional or a dict of keyword arguments. None takes the
            module's `example_input_array`, or two training samples.
        inputs: from a batch, on its device, to the network's inputs; by default what the training step calls the network with.
        sums: also equalize the operands of sums.
        border: for "init", see `fold`.
        allow_trained: calibrate although batch norms behind the fusions have been trained.

    Attributes:
        changes: what was inserted, calibrated and folded in this run; its `undo()` gives the model back.

    Raises:
        ConfigError: for an unknown option.
        EditError: where the fusions are trained already, unless `allow_trained` says so.
        DataError: as `equalize_scales`.
    """

    _of_a_run = ("_staged",)

    def __init__(
        self,
        mode: Mode = "explicit",
        max_batches: int | None = 32,
        granularity: Granularity = "branch",
        example_inputs: Any = None,
        inputs: InputsOf | None = None,
        sums: bool = False,
        border: Border = "keep",
        allow_trained: bool = False,
    ) -> None:
        check_options(mode, granularity, border)
        if max_batches is not None and max_batches < 1:
            raise ConfigError("max_batches is a positive number of batches, or None for all", evidence=repr(max_batches))
        self.mode: Mode = mode
        self.max_batches = max_batches
        self.granularity: Granularity = granularity
        self.example_inputs = example_inputs
        self.inputs = inputs
        self.sums = sums
        self.border: Border = border
        self.allow_trained = allow_trained
        self.changes = Changes()
        self._staged: StagedEqualization | None = None
        self._is_calibrated = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit = fit_of(self, trainer, pl_module)
        if self._staged is None:
            fit.edit(self, lambda: self._insert(fit), "fusions of levels whose branches can be scaled", reads_inputs=True)

    def _insert(self, fit: Fit) -> None:
        """The structure, whose keys a checkpoint may hold."""
        options: dict[str, Any] = {"mode": self.mode, "granularity": self.granularity, "sums": self.sums, "border": self.border}

        def insert(call: NetworkCall) -> Changes:
            staged = StagedEqualization(*call, **options, allow_trained=self.allow_trained)
            changes = staged.insert()
            self._staged = staged
            return changes

        self.changes.add(in_first_network(fit.calls(self._example_inputs(fit)), insert)[1])

    def _example_inputs(self, fit: Fit) -> Any:
        if self.example_inputs is not None or self.inputs is None or fit.pl_module.example_input_array is not None:
            return self.example_inputs
        samples = first_samples(fit.trainer, fit.pl_module)
        return None if samples is None else self.inputs(samples)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_calibrated or self._staged is None:
            return
        inputs = self.inputs or current_fit(trainer, pl_module).inputs_for(self._staged.network)
        with shown_passes(trainer, "Scale statistics", self.max_batches) as progress, training_batches(trainer, pl_module) as batches:
            self.changes.add(self._staged.calibrate(batches, max_batches=self.max_batches, inputs=inputs, progress=progress))
        self._is_calibrated = True

    def state_dict(self) -> dict[str, Any]:
        return {"is_calibrated": self._is_calibrated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._is_calibrated = state_dict["is_calibrated"]
