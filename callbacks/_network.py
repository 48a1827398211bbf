"""What `GammaDecay` and `NaNGuard` ask of the shared mechanism."""

from __future__ import annotations

__all__ = ["Callback", "after_configure_model", "current_fit", "fit_of", "is_sharded", "networks_to_read", "traced_network"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._fit import after, current_fit, fit_of, traced_network
from pl_normkit.callbacks._lightning import Callback, is_sharded, overrides
from pl_normkit.callbacks._network_calls import NetworkCall

if TYPE_CHECKING:
    import lightning.pytorch as pl


def after_configure_model(pl_module: pl.LightningModule, act: Callable[[], None]) -> None:
    """Call `act` once the module tree is complete: now, or when the `configure_model` of the module has run."""
    if overrides(pl_module, "configure_model"):
        after(pl_module, "configure_model", lambda *_, **__: act())
    else:
        act()


def networks_to_read(trainer: pl.Trainer, pl_module: pl.LightningModule, example_inputs: Any = None) -> list[NetworkCall]:
    """Networks with what they are called with: one by `example_inputs` or `example_input_array`, else all that a training step calls.

    Empty where two training samples cannot be had yet.
    """
    inputs = example_inputs if example_inputs is not None else pl_module.example_input_array
    if inputs is not None:
        return [NetworkCall(traced_network(pl_module) or pl_module, inputs)]
    return current_fit(trainer, pl_module).rehearsed()
