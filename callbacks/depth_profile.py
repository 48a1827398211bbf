"""`DepthProfile`: what happens to the residual stream over depth, followed through a run."""

from __future__ import annotations

__all__ = ["DepthProfile"]

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pl_normkit.callbacks._lightning import Callback, is_sharded
from pl_normkit.callbacks._network_calls import NetworkCall, NetworkCalls
from pl_normkit.errors import ConfigError, NormkitError, NormkitWarning, NothingMatchedError, nearest
from pl_normkit.methods.depth_profile import DepthProbe, EntropyCollapse, StuckGradients
from pl_normkit.methods.depth_profile import DepthProfile as Profile
from pl_normkit.methods.depth_profile.profile import PANELS, gradient_ratio
from pl_normkit.wrappers import unwrapped

if TYPE_CHECKING:
    import lightning.pytorch as pl


class DepthProfile(Callback):
    """Measures the residual stream every `every_n_steps` steps, logs a few numbers and a figure, and warns once of a run that is stuck
    and, where `panels` names an entropy, of attention that collapses while the loss spikes.

    The network is traced on the inputs of the first batch; later measurements are one more forward pass without gradients, after the
    step. The gradients that the run has anyway are read every `gradient_every` steps, with accumulation once an optimizer step. The
    warning compares first with last blocks of one width, as for rule NK901. Ranks see their own batches; logged means are means over
    ranks, `depth/largest` is the largest of all. A failure is one warning, never a broken run; sharded networks are not measured.

    Args:
        every_n_steps: optimizer steps between two profiles.
        panels: measures in the figure; () draws none. "entropy" and "entropy_lowest" are measured only where they are named here.
        gradient_every: optimizer steps between two readings of the gradients; the median of three counts.

    Attributes:
        profile: the last profile of this rank, None before the first.
        is_stuck, has_collapsed: whether the warning was given.

    Raises:
        ConfigError: for steps below 1 and for an unknown panel.
    """

    _of_a_run = ("_probe", "_capture")

    def __init__(
        self, every_n_steps: int = 100, panels: Sequence[str] = ("variance", "ratio", "angle", "largest"), *, gradient_every: int = 10
    ) -> None:
        if every_n_steps < 1 or gradient_every < 1:
            raise ConfigError("steps between measurements are at least 1", evidence=f"{every_n_steps} and {gradient_every}")
        for name in panels:
            if name not in PANELS:
                raise ConfigError(f"a profile has no panel {name!r}", fix=nearest(name, PANELS) or ", ".join(PANELS))
        self.every_n_steps, self.panels, self.gradient_every = every_n_steps, tuple(panels), gradient_every
        self._forget()

    def _forget(self) -> None:
        self.profile: Profile | None = None
        self.is_stuck = self.has_collapsed = False
        self._probe: DepthProbe | None = None
        self._watch, self._collapse = StuckGradients(), EntropyCollapse()
        self._ratio: float | None = None
        self._capture: NetworkCalls | None = None
        self._measured_at = -1
        self._has_failed = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget()
        if is_sharded(trainer):
            self._fail(NormkitError("each process holds a part of the parameters"))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not self._has_failed and step % self.every_n_steps == 0 and step != self._measured_at:
            self._measured_at = step
            self._capture = NetworkCalls(pl_module, is_wrapped=trainer.strategy.model is not pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._probe is None or self._has_failed or trainer.global_step % self.gradient_every:
            return
        self._ratio = gradient_ratio(self._probe.live_gradients())
        if self._probe.is_one_stack and self._watch.add(self._ratio) and not self.is_stuck:
            self.is_stuck = True
            self._say(
                trainer,
                f"The first quarter of the blocks gets {self._watch.value:.2g} of the gradient of the last quarter (step "
                f"{trainer.global_step}): runs like this got stuck. Lower the learning rate or warm it up over more steps (NK901)",
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.gradient_every == 0:
            self._collapse.add_output(outputs, trainer.global_step)
        if self._capture is None:
            return
        captured, self._capture = self._capture.finish(), None
        profile = None
        try:
            with trainer.precision_plugin.forward_context():
                profile = self._measure(captured)
        except Exception as error:  # whatever the network or its trace does, the run goes on
            self._fail(error)
        self._log(trainer, pl_module, profile)
        if profile is not None and not self.has_collapsed and (said := self._collapse.judge(profile, trainer.global_step)):
            self.has_collapsed = True
            self._say(trainer, said)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._capture is not None:
            self._capture.finish()
            self._capture = None

    def _measure(self, captured: list[NetworkCall]) -> Profile:
        failure: NormkitError = NothingMatchedError("no network ran in the first batch")
        for network, inputs in captured:
            try:
                self._probe = self._probe or DepthProbe(network, inputs)
            except NothingMatchedError as error:
                failure = error
                continue
            if unwrapped(network) is self._probe.model:
                return self._probe.measure(inputs, entropy=any(name.startswith("entropy") for name in self.panels))
        raise failure

    def _say(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            warnings.warn(text, NormkitWarning, stacklevel=3)

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        warnings.warn(f"DepthProfile measures nothing: {error}", NormkitWarning, stacklevel=2)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, profile: Profile | None) -> None:
        """Every rank adds up, also one whose measurement failed: then nothing is logged."""
        total = trainer.strategy.reduce(torch.tensor(float(profile is not None), device=pl_module.device), reduce_op="mean")
        if profile is None or float(total) < 1.0:
            return
        self.profile = profile
        numbers = profile.scalars() | ({} if self._ratio is None else {"gradient_ratio": self._ratio})
        logged = {}
        for name, value in numbers.items():
            reduced = trainer.strategy.reduce(
                torch.tensor(value, device=pl_module.device), reduce_op="max" if name == "largest" else "mean"
            )
            logged[f"depth/{name}"] = float(reduced)
        for logger in trainer.loggers:
            logger.log_metrics(logged, trainer.global_step)
            add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if trainer.is_global_zero and self.panels and add_figure is not None:
                add_figure("depth/profile", profile.draw(self.panels), trainer.global_step)
