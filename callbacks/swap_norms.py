"""`SwapNorms`: another kind of norm in the network, from the start of training."""

from __future__ import annotations

__all__ = ["SwapNorms"]

from typing import TYPE_CHECKING, Any

from torch import nn

from pl_normkit.callbacks._fit import fit_of, in_first_network
from pl_normkit.callbacks._lightning import Callback
from pl_normkit.callbacks._network_calls import NetworkCall
from pl_normkit.methods.norm_operators.swap import find_operator, swap_norms
from pl_normkit.surgery import Changes, Filter

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SwapNorms(Callback):
    """Calls `swap_norms` on the LightningModule in `setup`, so that optimizers, wrappers and checkpoints find the new norms.

    A network without a norm that the operator replaces gets one warning, and trains as it is.

    Args:
        to: name of the operator, as for `swap_norms`.
        example_inputs: for operators that are placed by the traced model; by default what a training step calls the network with.
        where: as for `swap_norms`; paths are those of the LightningModule, or of its network for those operators.
        options: of the operator, such as `alpha=1.0`.

    Attributes:
        changes: what was replaced; its `undo()` gives the model back. Empty before `setup`.

    Raises:
        ConfigError: for an operator or an option that does not exist.
    """

    def __init__(self, to: str, *, example_inputs: Any = None, where: Filter | None = None, **options: Any) -> None:
        self._reads_graph = find_operator(to, options).reads_graph
        self.to = to
        self.example_inputs = example_inputs
        self.where = where
        self.options = options
        self.changes = Changes()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit = fit_of(self, trainer, pl_module)
        if self.changes:  # of an earlier stage
            return
        if self._reads_graph:
            fit.edit(self, lambda: self._swap_in(fit.calls(self.example_inputs)), "places by the traced model", reads_inputs=True)
        else:
            fit.edit(self, lambda: self._swap_in([NetworkCall(pl_module, None)]), "norms", before_sharding=True)

    def _swap_in(self, calls: list[NetworkCall]) -> None:
        in_first_network(calls, lambda call: self._swap(call.network, call.inputs))

    def _swap(self, network: nn.Module, inputs: Any) -> Changes:
        self.changes = swap_norms(network, self.to, example_inputs=inputs, where=self.where, **self.options)
        return self.changes
