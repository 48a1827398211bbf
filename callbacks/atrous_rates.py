"""`AtrousRates`: ASPP rates that fit the training crop."""

from __future__ import annotations

__all__ = ["AtrousRates"]

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_normkit.callbacks._first_batch import guess_inputs, inputs_in
from pl_normkit.callbacks._network import FirstCall, after_configure_model, traced_network
from pl_normkit.errors import NormkitWarning
from pl_normkit.methods.atrous_rates import set_atrous_rates
from pl_normkit.methods.atrous_rates.fix import check_rates, edits_for
from pl_normkit.methods.atrous_rates.rates import CENTRE, check_size
from pl_normkit.surgery import Changes, apply_edits


class AtrousRates(Callback):
    """Calls `set_atrous_rates` before the first training step; weights, keys and optimizers stay as they are.

    With "auto" the crop is measured on two training samples when the fit is set up, else on `example_input_array`, else on the
    first batch on its way into the network. Rank zero's measure counts on every rank. The rates that were set are stored in
    checkpoints, and a resumed or evaluated checkpoint gets its own rates back: they belong to its weights.

    Args:
        input_size: height and width of the training crop in pixels, or its side; "auto" measures it.
        c: as for `atrous_rates`.
        rates: rising rates to set instead.
        example_inputs: what the LightningModule's forward is called with, of any size; needed where nothing else tells.

    Attributes:
        changes: what was set; its `undo()` gives the former rates back. Empty before.
        rates_set: path in the LightningModule -> rate.

    Raises:
        ConfigError: for a bad size, c or rates, and where the feature map is too small for three live rates.
        NothingMatchedError: when the network has no ASPP that can be edited.
        TraceError: when the network cannot be read.
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
        self._is_done = False
        self._first_call: FirstCall | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._is_done = False
            after_configure_model(pl_module, lambda: self._set_early(trainer, pl_module))

    def _set_early(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = next((inputs for inputs in (self.example_inputs, pl_module.example_input_array) if inputs is not None), None)
        samples = guess_inputs(trainer, pl_module) if known is None or self.input_size is None else None
        sizes = [self.input_size, _image_size(samples), _image_size(known)]
        size = trainer.strategy.broadcast(next((size for size in sizes if size is not None), None))
        network = traced_network(pl_module)
        if size is not None and network is not None:
            self._set(pl_module, network, size, known if known is not None else samples)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._is_done or self._first_call is not None:
            return
        network, inputs = traced_network(pl_module), inputs_in(batch, pl_module)
        if network is not None and _image_size(inputs) is not None:
            self._set_late(trainer, pl_module, network, inputs)
        else:
            is_wrapped = trainer.strategy.model is not pl_module
            self._first_call = FirstCall(pl_module, lambda *call: self._set_late(trainer, pl_module, *call), is_wrapped=is_wrapped)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_watching()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._first_call is not None:
            self._first_call.remove()
            self._first_call = None

    def _set_late(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, inputs: Any) -> None:
        size = trainer.strategy.broadcast(self.input_size or _image_size(inputs))
        if size is not None:
            self._set(pl_module, network, size, inputs)

    def _set(self, pl_module: pl.LightningModule, network: nn.Module, size: tuple[int, int], inputs: Any) -> None:
        changes = set_atrous_rates(network, size, rates=self.rates, c=self.c, example_inputs=inputs)
        self._is_done = True
        if changes or not self.changes:
            self.changes = changes
        prefix = next(name for name, module in pl_module.named_modules() if module is network)
        for change in changes.made:
            path = ".".join(part for part in (prefix, change.module) if part)
            dilation: tuple[int, ...] = pl_module.get_submodule(path).dilation  # type: ignore[assignment]
            self.rates_set[path] = max(dilation)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self.rates_set)}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rates are in no state_dict of the model: the weights of a checkpoint need those they were trained with."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("rates", {})
        if not saved:
            return
        if self._is_done and saved != self.rates_set:
            asked = ", ".join(f"{path} {rate}" for path, rate in self.rates_set.items())
            kept = ", ".join(f"{path} {rate}" for path, rate in saved.items())
            warnings.warn(f"AtrousRates keeps the rates of the checkpoint ({kept}), not ({asked})", NormkitWarning, stacklevel=2)
        self.changes.add(apply_edits(pl_module, edits_for(pl_module, saved)))
        self.rates_set, self._is_done = dict(saved), True


def _image_size(inputs: Any) -> tuple[int, int] | None:
    """(height, width) of the largest tensor (N, C, H, W) among the inputs."""
    images = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() == 4]
    largest = max(images, key=Tensor.numel, default=None)
    return None if largest is None else (int(largest.shape[-2]), int(largest.shape[-1]))
