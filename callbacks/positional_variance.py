"""`PositionalVariance`: does the training data weigh positions as the validation data does?"""

from __future__ import annotations

__all__ = ["PositionalVariance"]

import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pl_normkit.callbacks._network import InputCapture, after_configure_model
from pl_normkit.errors import ConfigError, NormkitError, NormkitWarning, NothingMatchedError
from pl_normkit.methods.positional_variance.find import PositionalSite, trace_site
from pl_normkit.methods.positional_variance.measure import TOLERANCE, observe, watch
from pl_normkit.methods.positional_variance.moments import Estimate, MomentSums
from pl_normkit.preserve import preserved
from pl_normkit.wrappers import unwrapped


@dataclass
class _Phase:
    """Batches of one kind, counted also where nothing could be measured: ranks must agree on when they add up."""

    sums: MomentSums = field(default_factory=MomentSums)
    batches: int = 0


class PositionalVariance(Callback):
    """Measures the variance of patch tokens on a few training and validation batches, warns once where they differ, and logs rho.

    The tokens are read as they leave the patch embedding in the run's own passes, whatever made the batch. The training batches right
    after a validation pass (the sanity check counts) are compared with it, so that both meet the same weights; where there is no such
    pair by the end of the fit, the second moments of the images are, which do not depend on the weights. The model is traced once, in
    `setup` where it has an `example_input_array`, else on the inputs of the first batch, whose patch embedding then runs a second time.
    Ranks add up. A failure is one warning, never a broken run.

    Args:
        threshold: warn where |rho - 1| is larger, and larger than two standard errors.
        batches: batches measured of each kind.
        required: warn also of a network that adds no positions, which leaves nothing to measure.

    Attributes:
        rho: Var[X_train] / Var[X_validation], None until it is known.

    Raises:
        ConfigError: for a threshold that is not positive or fewer than one batch.
    """

    def __init__(self, threshold: float = TOLERANCE, batches: int = 8, required: bool = True) -> None:
        if threshold <= 0.0 or batches < 1:
            raise ConfigError("threshold is above 0 and batches at least 1", evidence=f"{threshold} and {batches}")
        self.threshold = threshold
        self.batches = batches
        self.required = required
        self.rho: float | None = None
        self._forget()
        self._is_done = True  # until a fit is set up

    def _forget(self) -> None:
        self._found: tuple[nn.Module, PositionalSite] | None = None
        self._capture: InputCapture | None = None
        self._watching = ExitStack()
        self._train, self._validation, self._unpaired = _Phase(), _Phase(), _Phase()
        self._is_paired = self._has_failed = self._is_done = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._watching.close()
            self._forget()
            self.rho = None
            after_configure_model(pl_module, lambda: self._read_early(trainer, pl_module))

    def _read_early(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.example_input_array is not None:
            self._find(trainer, [(pl_module, pl_module.example_input_array)])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_done:
            if self._is_paired and self._train.batches:  # an epoch shorter than `batches`
                self._conclude(trainer, pl_module)
            self._validation = _Phase()

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._open(trainer, pl_module, self._validation)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._close(trainer, self._validation)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_done and self._validation.batches:
            self._unpaired = self._train
            self._train, self._is_paired = _Phase(), True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._open(trainer, pl_module, self._train)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._close(trainer, self._train)
        if not self._is_done and self._is_paired and self._train.batches >= self.batches:
            self._conclude(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_done and self._validation.batches:
            by_images = not self._train.batches
            if by_images:
                self._train = self._unpaired
            self._conclude(trainer, pl_module, by_images=by_images)
        self._is_done = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._watching.close()

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule, phase: _Phase) -> None:
        """Watch one pass; the first one for its inputs, where nothing is known of the model."""
        if self._is_done or phase.batches >= self.batches or self._has_failed:
            return
        if self._found is None or _is_compiled(self._found[0]):
            self._capture = InputCapture(pl_module, is_wrapped=trainer.strategy.model is not pl_module)
        else:
            self._watching.enter_context(watch(*self._found, phase.sums))

    def _close(self, trainer: pl.Trainer, phase: _Phase) -> None:
        self._watching.close()
        if self._capture is not None:
            captured, self._capture = self._capture.finish(), None
            if self._found is None:
                self._find(trainer, captured)
            self._observe(trainer, captured, phase.sums)
        phase.batches += not self._is_done and phase.batches < self.batches

    def _find(self, trainer: pl.Trainer, networks: list[tuple[nn.Module, Any]]) -> None:
        """Trace the networks up to the first with such positions; where none has, or can be read, one warning says so."""
        failure: Exception = NormkitError("no network ran in the first batch")
        for network, inputs in networks:
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    self._found = (network, trace_site(network, tree_map_only(Tensor, torch.zeros_like, inputs)))
                return
            except Exception as error:
                failure = error
        self._fail(trainer, failure)

    def _observe(self, trainer: pl.Trainer, captured: list[tuple[nn.Module, Any]], sums: MomentSums) -> None:
        """Run the patch embedding on inputs that were caught."""
        if self._found is None:
            return
        network, site = self._found
        original = unwrapped(network)
        try:
            for found, inputs in captured:
                if found is network:
                    with preserved(original, buffers=True):
                        observe(original, site, inputs, sums)
        except Exception as error:
            self._fail(trainer, error)

    def _fail(self, trainer: pl.Trainer, error: Exception) -> None:
        self._has_failed = True
        if trainer.is_global_zero and (self.required or not isinstance(error, NothingMatchedError)):
            what = " ".join(str(error).split())
            warnings.warn(f"PositionalVariance measures nothing: {type(error).__name__}: {what}", NormkitWarning, stacklevel=2)

    def _conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, by_images: bool = False) -> None:
        """Add up over ranks (each of them comes here, whatever it has seen), then log and warn, once."""
        self._is_done = True
        local = torch.stack([self._train.sums.totals, self._validation.sums.totals]).float().to(pl_module.device)
        totals = trainer.strategy.reduce(local, reduce_op="sum")
        assert isinstance(totals, Tensor)
        train, evaluation = totals.double().cpu()
        ratio = Estimate.from_totals(train).over(Estimate.from_totals(evaluation))
        if by_images:
            ratio = Estimate(float(train[7] / train[6] / (evaluation[7] / evaluation[6])), ratio.error)
        if not math.isfinite(ratio.value):
            return
        self.rho = ratio.value
        for logger in trainer.loggers:
            logger.log_metrics({"normkit/positional_rho": self.rho}, step=trainer.global_step)
        if trainer.is_global_zero and ratio.is_off(self.threshold):
            self._warn(by_images)

    def _warn(self, by_images: bool) -> None:
        what = "image second moments" if by_images else "patch-token variance"
        place = f" (positions: {self._found[1].parameter})" if self._found is not None else ""
        warnings.warn(
            f"{what}, training over validation, is {self.rho:.3f} and should be 1 within {self.threshold:.0%}: augmentation changes how "
            f"much positions weigh{place}. audit(model, inputs, loaders=(train, val), select=['NK7']) names the cause. "
            "Silence: leave PositionalVariance out, or raise its threshold",
            NormkitWarning,
            stacklevel=2,
        )


def _is_compiled(network: nn.Module) -> bool:
    """Hooks that come after compilation may never run: the inputs are caught in front of the compiled module instead."""
    return any(type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None for module in network.modules())
