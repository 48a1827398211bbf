"""`PositionalVariance`: does the training data weigh positions as the validation data does?"""

from __future__ import annotations

__all__ = ["PositionalVariance"]

import math
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from pl_normkit.callbacks._fit import current_fit, fit_of
from pl_normkit.callbacks._lightning import Callback, has_compiled_part
from pl_normkit.callbacks._network_calls import NetworkCall, NetworkCalls
from pl_normkit.errors import ConfigError, NormkitWarning, NothingMatchedError
from pl_normkit.graph.sharing import shared_traces
from pl_normkit.methods.positional_variance.find import PositionalSite
from pl_normkit.methods.positional_variance.measure import TOLERANCE, watch
from pl_normkit.methods.positional_variance.pairing import PairedPasses, PassSums, observe_calls, trace_first_site

if TYPE_CHECKING:
    import lightning.pytorch as pl


_ADVICE = "audit(model, inputs, loaders=(train, val), select=['NK7']) names the cause. Silence: raise the threshold of PositionalVariance"


class PositionalVariance(Callback):
    """Measures the variance of patch tokens on a few training and validation batches, warns once where they differ, and logs rho.

    Tokens are read as they leave the patch embedding in the run's own passes. Training batches right after a validation pass (the sanity
    check counts) are compared with it, so that both meet the same weights; without such a pair the second moments of the images are. The
    model is traced once, on known inputs or those of the first batch. Ranks add up. A failure is one warning, never a broken run.

    Args:
        threshold: warn where |rho - 1| is larger, and larger than two standard errors.
        batches: batches measured of each kind.
        required: warn also of a network that adds no positions, which leaves nothing to measure.

    Attributes:
        rho: Var[X_train] / Var[X_validation], None until it is known.

    Raises:
        ConfigError: for a threshold that is not positive, or no batch.
    """

    _of_a_run = ("_found", "_capture")

    def __init__(self, threshold: float = TOLERANCE, batches: int = 8, required: bool = True) -> None:
        if threshold <= 0.0 or batches < 1:
            raise ConfigError("threshold is above 0 and batches at least 1", evidence=f"{threshold} and {batches}")
        self.threshold, self.batches, self.required = threshold, batches, required
        self.rho: float | None = None
        self._found: tuple[nn.Module, PositionalSite] | None = None
        self._capture: NetworkCalls | None = None
        self._watching, self._has_failed = ExitStack(), False
        self._passes = PairedPasses(0)  # wants nothing until a fit is set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit = fit_of(self, trainer, pl_module)
        if stage == "fit":
            self._watching.close()
            self._found, self._has_failed, self.rho = None, False, None
            self._passes = PairedPasses(self.batches)
            fit.read(lambda: self._find(trainer, calls) if (calls := fit.known_calls()) else None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation and not self._passes.is_done and not self._has_failed:
            self._fail(trainer, NothingMatchedError("there is no validation data to compare the training data with"))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._passes.start_validation():
            self._conclude(trainer, pl_module)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._open(trainer, pl_module, self._passes.validation)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._close(trainer, self._passes.validation)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._passes.end_validation()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._open(trainer, pl_module, self._passes.train)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._close(trainer, self._passes.train)
        if self._passes.is_full:
            self._conclude(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._passes.fall_back():
            self._conclude(trainer, pl_module)
        self._passes.is_done = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._watching.close()

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule, part: PassSums) -> None:
        if self._has_failed or not self._passes.wants(part):
            return
        if self._found is None or has_compiled_part(self._found[0]):  # hooks that come after compilation may never run
            self._capture = NetworkCalls(pl_module, is_wrapped=trainer.strategy.model is not pl_module)
        else:
            self._watching.enter_context(watch(*self._found, part.sums))

    def _close(self, trainer: pl.Trainer, part: PassSums) -> None:
        self._watching.close()
        if self._capture is not None:
            captured, self._capture = self._capture.finish(), None
            if self._found is None:
                self._find(trainer, captured)
            try:
                if self._found is not None:
                    observe_calls(*self._found, captured, part.sums)
            except Exception as error:
                self._fail(trainer, error)
        self._passes.count(part)

    def _find(self, trainer: pl.Trainer, calls: list[NetworkCall]) -> None:
        try:
            with shared_traces(current_fit(trainer, trainer.lightning_module).traces):
                self._found = trace_first_site(calls)
        except Exception as error:
            self._fail(trainer, error)

    def _fail(self, trainer: pl.Trainer, error: Exception) -> None:
        self._has_failed = True
        if trainer.is_global_zero and (self.required or not isinstance(error, NothingMatchedError)):
            what = " ".join(str(error).split())
            warnings.warn(f"PositionalVariance measures nothing: {type(error).__name__}: {what}", NormkitWarning, stacklevel=2)

    def _conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up over ranks (each of them comes here, whatever it has seen), then log and warn, once."""
        self._passes.is_done = True
        totals: Any = trainer.strategy.reduce(self._passes.totals().float().to(pl_module.device), reduce_op="sum")
        ratio = self._passes.ratio(totals)
        if not math.isfinite(ratio.value):
            return
        self.rho = ratio.value
        for logger in trainer.loggers:
            logger.log_metrics({"normkit/positional_rho": self.rho}, step=trainer.global_step)
        if trainer.is_global_zero and ratio.is_off(self.threshold):
            place = f" (positions: {self._found[1].parameter})" if self._found is not None else ""
            what = f"{self._passes.compared}, training over validation, is {self.rho:.3f} and should be 1 within {self.threshold:.0%}"
            warnings.warn(f"{what}: augmentation changes how much positions weigh{place}. {_ADVICE}", NormkitWarning, stacklevel=2)
