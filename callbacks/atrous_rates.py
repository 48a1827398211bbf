"""`AtrousRates`: ASPP rates that fit the training crop."""

from __future__ import annotations

__all__ = ["AtrousRates"]

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from pl_normkit.callbacks._fit import Fit, current_fit, fit_of, how_to_load, in_first_network
from pl_normkit.callbacks._lightning import Callback, say
from pl_normkit.callbacks._network_calls import NetworkCall
from pl_normkit.errors import NormkitWarning, NothingMatchedError
from pl_normkit.methods.atrous_rates import set_atrous_rates
from pl_normkit.methods.atrous_rates.fix import check_rates, edits_for, image_size
from pl_normkit.methods.atrous_rates.rates import CENTRE, check_size
from pl_normkit.restoring import KEY, attribute_records
from pl_normkit.surgery import Changes, apply_edits, path_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

_LOOKED_FOR = "ASPPs, parallel atrous convolutions of one feature map that are joined"


class AtrousRates(Callback):
    """Calls `set_atrous_rates` before the first training step; weights, keys and optimizers stay as they are.

    With "auto" the crop is measured on two training samples when the fit is set up, else on `example_input_array`, else on the
    first batch. Rank zero's measure counts on every rank. The rates that were set are stored in checkpoints, and a resumed or
    evaluated checkpoint gets its own rates back: they belong to its weights. Without a Trainer `restore_edits` does that. A network
    without an ASPP whose rates can be set gets one warning.

    Args:
        input_size: height and width of the training crop in pixels, or its side; "auto" measures it.
        c: as for `atrous_rates`.
        rates: rising rates to set instead.
        example_inputs: what the LightningModule's forward is called with, of any size; needed where nothing else tells.

    Attributes:
        changes: what was set; its `undo()` gives the former rates back. Empty before.
        rates_set: path in the LightningModule -> rate.
        summary: what was set, in one line.

    Raises:
        ConfigError: for a bad size, c or rates, and where the feature map is too small for three live rates.
    """

    def __init__(
        self,
        input_size: Literal["auto"] | int | tuple[int, int] = "auto",
        *,
        c: float = CENTRE,
        rates: Sequence[int] | None = None,
        example_inputs: Any = None,
    ) -> None:
        self.input_size = None if input_size == "auto" else check_size(tuple(input_size) if isinstance(input_size, list) else input_size)
        self.c = c
        self.rates = None if rates is None else check_rates(rates)
        self.example_inputs = example_inputs
        self.changes = Changes()
        self.rates_set: dict[str, int] = {}
        self.summary = ""
        self._is_done = True  # until a fit is set up
        self._has_said = False
        self._records: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._is_done = stage != "fit"
        if stage == "fit":
            fit = fit_of(self, trainer, pl_module)
            fit.edit(self, lambda: self._set_early(fit), _LOOKED_FOR, reads_inputs=True)

    def _set_early(self, fit: Fit) -> None:
        calls = fit.calls(self.example_inputs)
        size = self.input_size or self._crop(fit.rehearsed()) or self._crop(calls)
        size = fit.trainer.strategy.broadcast(size)
        if calls and size is not None:
            self._set(fit, calls, size)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._is_done:
            fit = current_fit(trainer, pl_module)
            fit.edit_now(self, lambda: self._set_late(fit, batch), _LOOKED_FOR)

    def _set_late(self, fit: Fit, batch: Any) -> None:
        self._is_done = True
        calls = fit.calls_with(batch, self.example_inputs)
        size = fit.trainer.strategy.broadcast(self.input_size or self._crop(calls))
        if size is None:
            raise NothingMatchedError("it is not known how large the images are", fix="pass input_size=")
        self._set(fit, calls, size)

    @staticmethod
    def _crop(calls: Sequence[NetworkCall]) -> tuple[int, int] | None:
        return image_size([call.inputs for call in calls])

    def _set(self, fit: Fit, calls: Sequence[NetworkCall], size: tuple[int, int]) -> None:
        self._is_done = True
        before = _rates(fit.pl_module.modules())

        def set_in(call: NetworkCall) -> Changes:
            return set_atrous_rates(call.network, size, rates=self.rates, c=self.c, example_inputs=call.inputs)

        call, changes = in_first_network(calls, set_in)
        if changes or not self.changes:
            self.changes = changes
        prefix = path_of(fit.pl_module, call.network)
        paths = [".".join(part for part in (prefix, change.module) if part) for change in changes.made]
        convolutions = {path: fit.pl_module.get_submodule(path) for path in paths}
        after = _rates(convolutions.values())
        self._keep(fit.pl_module, self.rates_set | {path: after[conv] for path, conv in convolutions.items()})
        was, now = (", ".join(str(rates[conv]) for conv in convolutions.values()) for rates in (before, after))
        self.summary = f"ASPP {was} -> {now}. {how_to_load(self)}"

    def _keep(self, pl_module: pl.LightningModule, rates: dict[str, int]) -> None:
        self.rates_set = rates
        self._records = attribute_records(edits_for(pl_module, rates))

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self.rates_set), KEY: self._records}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._records and not self._has_said:
            self._has_said = True
            say(f"The weights of this checkpoint belong to an edited network. {how_to_load(self)}")

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rates are in no state_dict of the model: the weights of a checkpoint need those they were trained with."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("rates", {})
        if not saved:
            return
        if self._is_done and self.rates_set and saved != self.rates_set:
            asked = ", ".join(f"{path} {rate}" for path, rate in self.rates_set.items())
            kept = ", ".join(f"{path} {rate}" for path, rate in saved.items())
            warnings.warn(f"AtrousRates keeps the rates of the checkpoint ({kept}), not ({asked})", NormkitWarning, stacklevel=2)
        self.changes.add(apply_edits(pl_module, edits_for(pl_module, saved)))
        self._keep(pl_module, dict(saved))
        self._is_done = True


def _rates(modules: Iterable[nn.Module]) -> dict[nn.Module, int]:
    return {module: max(module.dilation) for module in modules if isinstance(module, nn.Conv2d)}
