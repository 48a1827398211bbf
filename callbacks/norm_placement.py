"""`NormPlacement`: norms and gains at another place of the residual blocks, before training."""

from __future__ import annotations

__all__ = ["NormPlacement"]

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._fit import Fit, after, fit_of, how_to_load, in_first_network
from pl_normkit.callbacks._lightning import Callback, say
from pl_normkit.callbacks._network_calls import NetworkCall
from pl_normkit.errors import EditError
from pl_normkit.methods.norm_placement import place_norms
from pl_normkit.methods.norm_placement.fix import check_kind, placement_records
from pl_normkit.restoring import KEY, restore_records
from pl_normkit.surgery import Changes, Filter, path_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

_LOOKED_FOR = "residual blocks in which norms can be placed"


class NormPlacement(Callback):
    """Calls `place_norms` in `setup`, so that optimizers, wrappers and checkpoints find what it adds.

    What was placed is stored in checkpoints, and a resumed or evaluated checkpoint gets its own placement: without a Trainer
    `restore_edits` does that, before `load_state_dict`. A network without residual blocks gets one warning; one whose blocks cannot be
    reached, or that is trained already, is an error, since the run would not be the one that was asked for.

    Args:
        kind: "depth_init", "deepnorm", "lns", "mix", "post", "peri", "normformer", "head_scale" or "res_scale", see `place_norms`.
        example_inputs: what the network is called with; None takes the module's `example_input_array`, or two training samples.
        retrain: also edit a trained network.
        filter_fn: as for `place_norms`; paths are those of the network.
        options: of the kind.

    Attributes:
        changes: what was done; its `undo()` gives the model back. Empty before `setup`.

    Raises:
        ConfigError: for a kind or an option that does not exist.
        EditError: in `setup`, as `place_norms`.
    """

    _of_a_run = ("_stop_waiting",)

    def __init__(
        self, kind: str, example_inputs: Any = None, *, retrain: bool = False, filter_fn: Filter | None = None, **options: Any
    ) -> None:
        check_kind(kind, options)
        self.kind = kind
        self.example_inputs = example_inputs
        self.retrain = retrain
        self.filter_fn = filter_fn
        self.options = options
        self.changes = Changes()
        self._records: list[dict[str, Any]] = []
        self._has_said = False
        self._stop_waiting: Callable[[], None] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit = fit_of(self, trainer, pl_module)
        self._stop()
        self._stop_waiting = after(pl_module, "on_load_checkpoint", lambda checkpoint: self._restore(pl_module, checkpoint))
        if stage == "fit":
            fit.edit(self, lambda: self._place(fit, fit.calls(self.example_inputs)), _LOOKED_FOR, reads_inputs=True)
        elif not self.changes and (calls := fit.known_calls(self.example_inputs)):
            with suppress(EditError):  # a checkpoint's own placement comes with it
                self._place(fit, calls)

    def _place(self, fit: Fit, calls: list[NetworkCall]) -> None:
        def place(call: NetworkCall) -> Changes:
            return place_norms(call.network, self.kind, call.inputs, retrain=self.retrain, filter_fn=self.filter_fn, **self.options)

        call, changes = in_first_network(calls, place)
        if changes or not self.changes:
            self.changes = changes
        self._records = placement_records(path_of(fit.pl_module, call.network), call.network)

    def _restore(self, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """The placement that a checkpoint's weights were trained with counts."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        records = list(state.get(KEY, ()))
        if records and records != self._records:
            self.changes.undo()
            self.changes, self._records = restore_records(pl_module, records), records

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._stop_waiting is not None:
            self._stop_waiting()

    @property
    def summary(self) -> str:
        """What was placed, in one line."""
        return f"{self.changes.made[-1].what}. {how_to_load(self)}" if self.changes else ""

    def state_dict(self) -> dict[str, Any]:
        return {KEY: self._records} if self._records else {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._records and not self._has_said:
            self._has_said = True
            say(f"The weights of this checkpoint belong to an edited network. {how_to_load(self)}")
