"""`SAMOnNorms`: sharpness-aware minimization that moves norms only, in Lightning's automatic optimization."""

from __future__ import annotations

__all__ = ["SAMOnNorms"]

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pl_normkit.callbacks._fit import fit_of, warn_of_nothing
from pl_normkit.callbacks._lightning import Callback, is_sharded
from pl_normkit.callbacks._wrapping import silenced_logs, wrap_once
from pl_normkit.errors import ConfigError, NormkitWarning, NothingMatchedError, TraceError
from pl_normkit.methods.norm_training.ascent import AscentKind, NormAscent, check_options

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SAMOnNorms(Callback):
    """Runs each training step twice, the second time with the norms where the loss is higher, and steps by the second gradient.

    A step costs twice as much. Running statistics and what `self.log` logs are those of the first pass; metrics that `training_step`
    updates see both, the hooks around backward run in both, and the outputs given to `on_train_batch_end` are the second's. Float16
    scaling, clipping by the Trainer and DDP work as ever. A network without norms gets one warning, and trains as it is.

    Args:
        rho, kind, eta, normalize_bias: as for `NormAscent`.
        example_inputs: what the module's forward is called with, by default its `example_input_array`; with either, norms that are
            written out are found in the traced graph, else by module type.

    Attributes:
        ascent: the `NormAscent` of the fit, None before.

    Raises:
        ConfigError: for options that `NormAscent` refuses, and at the start of a fit for manual optimization (use `NormAscent` in the
            step), `accumulate_grad_batches` other than 1, and strategies that shard parameters or hold the gradients themselves.
    """

    _of_a_run = ("ascent", "_waiting")

    def __init__(
        self, rho: float = 0.5, kind: AscentKind = "l2", eta: float = 0.01, normalize_bias: bool = False, example_inputs: Any = None
    ) -> None:
        check_options(rho, kind, eta)
        self.rho = rho
        self.kind = kind
        self.eta = eta
        self.normalize_bias = normalize_bias
        self.example_inputs = example_inputs
        self.ascent: NormAscent | None = None
        self._waiting: object = None  # for the wrapper that the next step takes off

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit_of(self, trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refusals = {
            "the optimization is manual": (not pl_module.automatic_optimization, "call NormAscent(model).perturbed() in training_step"),
            "gradients are accumulated over batches": (_accumulates(trainer), "set accumulate_grad_batches=1"),
            "the strategy shards parameters or holds the gradients itself": (
                is_sharded(trainer) or trainer.strategy.handles_gradient_accumulation,
                "use DDP or one device",
            ),
        }
        for what, (is_so, fix) in refusals.items():
            if is_so:
                raise ConfigError(what, where="SAMOnNorms", fix=fix)
        self.ascent, self._waiting = None, None
        options: Any = {"rho": self.rho, "kind": self.kind, "eta": self.eta, "normalize_bias": self.normalize_bias}
        try:
            self.ascent = self._with_graph(trainer, pl_module, options) or NormAscent(pl_module, **options)
        except NothingMatchedError as error:
            warn_of_nothing(trainer, self, "norms", error)

    def _with_graph(self, trainer: pl.Trainer, pl_module: pl.LightningModule, options: Any) -> NormAscent | None:
        """The whole module and, where its call is known, what its graph shows beside module types."""
        inputs = self.example_inputs if self.example_inputs is not None else pl_module.example_input_array
        if inputs is None:
            return None
        try:
            return NormAscent(pl_module, inputs, **options)
        except TraceError as error:
            warnings.warn(f"SAMOnNorms reads module types alone: {error}", NormkitWarning, stacklevel=2)
            return None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.ascent is not None and self._waiting is None:
            if _accumulates(trainer):  # a scheduler of accumulation changed it
                raise ConfigError("gradients are accumulated over batches", where="SAMOnNorms", fix="set accumulate_grad_batches=1")
            token = self._waiting = object()
            wrap_once(pl_module, "optimizer_step", lambda step: self._step(pl_module, step) if self._waiting is token else step())

    def _step(self, pl_module: pl.LightningModule, step: partial[Any]) -> Any:
        self._waiting = None
        *before, closure = step.args
        ascent = self.ascent
        assert ascent is not None  # since the wrapper was put on

        def both_passes() -> Tensor | None:
            loss: Tensor | None = closure()
            if loss is not None:  # else the step asked to be skipped
                with ascent.perturbed(), silenced_logs(pl_module):
                    closure()
            return loss

        return step.func(*before, both_passes, **step.keywords)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ascent, self._waiting = None, None  # a wrapper that no step has taken off passes through


def _accumulates(trainer: pl.Trainer) -> bool:
    return bool(trainer.accumulate_grad_batches != 1)
