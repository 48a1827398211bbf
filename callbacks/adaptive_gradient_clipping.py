"""`AdaptiveGradientClipping`: gradients clipped by the size of the weights of each unit, before each optimizer step."""

from __future__ import annotations

__all__ = ["AdaptiveGradientClipping"]

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from pl_normkit.callbacks._network import Callback, fit_of, is_sharded, networks_to_read
from pl_normkit.errors import ConfigError, NormkitWarning, TraceError
from pl_normkit.methods.norm_training.clipping import AdaptiveClipping, check_options

if TYPE_CHECKING:
    import lightning.pytorch as pl

_HEAD = "AdaptiveGradientClipping clips the head too: it is not known; pass example_inputs, or skip=[...]"


class AdaptiveGradientClipping(Callback):
    """Clips each unit's gradient to a share of its weights' length after unscaling, by timm's function; the head is left out by role.

    In automatic and manual optimization alike. The head is read from `example_inputs`, the module's `example_input_array` or, for every
    network that a training step calls, from two training samples; without any of them one warning says that the head is clipped.

    Args:
        clip_factor, eps, skip: as for `AdaptiveClipping`; paths of `skip` are those of the LightningModule. With `skip` no head is
            looked for.
        example_inputs: what the module's forward, or its only network, is called with.

    Attributes:
        clipping: the `AdaptiveClipping` of the fit, None before; its `skipped` names what is not clipped.

    Raises:
        ConfigError: for numbers and paths that `AdaptiveClipping` refuses, and at the start of a fit for a Trainer with
            `gradient_clip_val`, strategies that shard parameters or hold the gradients themselves, and fused optimizers under a float16
            scaler, whose gradients are unscaled in the step only.
        ModelSpecError: when timm is not installed.
    """

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3, skip: Sequence[str] = (), example_inputs: Any = None) -> None:
        check_options(clip_factor, eps)
        self.clip_factor = clip_factor
        self.eps = eps
        self.skip = tuple(skip)
        self.example_inputs = example_inputs
        self.clipping: AdaptiveClipping | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit = fit_of(self, trainer, pl_module)
        if stage != "fit":
            return
        if trainer.gradient_clip_val is not None:
            raise ConfigError("gradients would be clipped twice", where="AdaptiveGradientClipping", fix="leave gradient_clip_val out")
        if is_sharded(trainer) or trainer.strategy.handles_gradient_accumulation:
            what = "the strategy shards parameters or holds the gradients itself"
            raise ConfigError(what, where="AdaptiveGradientClipping", fix="use DDP or one device")
        fit.read(lambda: self._read(trainer, pl_module))

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clipping = AdaptiveClipping(pl_module, clip_factor=self.clip_factor, eps=self.eps, skip=self.skip)
        if self.skip:
            return
        failures = ""
        for call in networks_to_read(trainer, pl_module, self.example_inputs):
            try:
                self.clipping.skip_head(*call)
            except TraceError as error:
                failures = f". {error}"
        if not self.clipping.skipped:
            warnings.warn(f"{_HEAD}{failures}", NormkitWarning, stacklevel=2)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        assert self.clipping is not None  # `setup` made it
        if getattr(trainer.precision_plugin, "scaler", None) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            what = f"{type(optimizer).__name__} unscales float16 gradients in its step, so that lengths are not known before"
            raise ConfigError(what, where="AdaptiveGradientClipping", fix="pass fused=False to the optimizer, or train in bf16-mixed")
        self.clipping.clip(parameter for group in optimizer.param_groups for parameter in group["params"])
