"""`GaussianBias`: a learnable Gaussian of the patch distance on the attention logits of a vision transformer."""

from __future__ import annotations

__all__ = ["GaussianBias"]

from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor

from pl_normkit.callbacks._fit import fit_of
from pl_normkit.callbacks._lightning import Callback
from pl_normkit.errors import EditError
from pl_normkit.methods.gaussian_bias.fix import add_gaussian_bias
from pl_normkit.methods.gaussian_bias.modules import GaussianAttentionBias, check_amplitude, check_sigma
from pl_normkit.surgery import Changes, Filter

if TYPE_CHECKING:
    import lightning.pytorch as pl


class GaussianBias(Callback):
    """Calls `add_gaussian_bias` on the LightningModule in `setup`, so that optimizers and wrappers find the new parameters.

    A checkpoint of a run with it loads in every stage, since the parameters are there before weights are restored. Where the
    network is built in `__init__` it is edited before `configure_model` shards it; where `configure_model` builds it, afterwards. A
    network without an attention that takes the bias gets one warning, and trains as it is.

    Args:
        per_head: one amplitude and sigma for each head, instead of one pair for each layer.
        amplitude: start value, not 0.
        sigma: start value in patches, positive.
        example_inputs: as for `add_gaussian_bias`; what the LightningModule itself is called with.
        filter_fn: as for `add_gaussian_bias`; paths are those of the LightningModule.

    Attributes:
        changes: what was added; its `undo()` gives the model back. Empty before `setup`.

    Raises:
        ConfigError: for a start value out of range.
        EditError: when `configure_model` both builds and shards the network; call `add_gaussian_bias` in it, between the two.
    """

    def __init__(
        self,
        per_head: bool = False,
        amplitude: float = 1.0,
        sigma: float = 5.0,
        example_inputs: Any = None,
        filter_fn: Filter | None = None,
    ) -> None:
        self.per_head = per_head
        self.amplitude = check_amplitude(amplitude)
        self.sigma = check_sigma(sigma)
        self.example_inputs = example_inputs
        self.filter_fn = filter_fn
        self.changes = Changes()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit = fit_of(self, trainer, pl_module)
        fit.edit(self, lambda: self._add(pl_module), "self-attention over a grid of patches", before_sharding=True)

    def _add(self, pl_module: pl.LightningModule) -> None:
        if self._is_unedited(pl_module) and any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            raise EditError(
                "configure_model both builds and shards the network, so the parameters of the bias would not be synchronized",
                where="GaussianBias",
                fix="call add_gaussian_bias in configure_model, before fully_shard",
            )
        changes = add_gaussian_bias(
            pl_module,
            per_head=self.per_head,
            amplitude=self.amplitude,
            sigma=self.sigma,
            example_inputs=self.example_inputs,
            filter_fn=self.filter_fn,
        )
        if changes or not self.changes:
            self.changes = changes

    @staticmethod
    def _is_unedited(pl_module: pl.LightningModule) -> bool:
        return not any(isinstance(module, GaussianAttentionBias) for module in pl_module.modules())
