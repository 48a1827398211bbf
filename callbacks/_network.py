"""What `GammaDecay` and `NaNGuard` ask of the shared mechanism."""

from __future__ import annotations

__all__ = ["Callback", "after_configure_model", "current_fit", "fit_of", "guess_inputs", "is_sharded", "traced_network"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pl_normkit.callbacks._fit import after, current_fit, fit_of, traced_network
from pl_normkit.callbacks._lightning import Callback, is_sharded, overrides

if TYPE_CHECKING:
    import lightning.pytorch as pl


def after_configure_model(pl_module: pl.LightningModule, act: Callable[[], None]) -> None:
    """Call `act` once the module tree is complete: now, or when the `configure_model` of the module has run."""
    if overrides(pl_module, "configure_model"):
        after(pl_module, "configure_model", lambda *_, **__: act())
    else:
        act()


def guess_inputs(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Inputs of the module's `forward`, or of its only network, from two training samples; None where they cannot be had."""
    network = traced_network(pl_module)
    return next((call.inputs for call in current_fit(trainer, pl_module).rehearsed() if call.network is network), None)
