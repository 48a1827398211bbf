"""NaNGuard: a bad step is skipped on every rank, named and counted; weights, optimizer state and buffers stay finite."""

from __future__ import annotations

__all__ = ["NaNGuard"]

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from pl_normkit.callbacks._lightning import Callback
from pl_normkit.methods.nan_safety.guard.budget import SkipBudget
from pl_normkit.methods.nan_safety.guard.running import Surroundings
from pl_normkit.methods.nan_safety.guard.step_guard import StepGuard


class NaNGuard(Callback):
    """Skip training steps whose loss, gradients or buffers are not finite; end a run whose weights or optimizer state are not.

    A skipped step is an optimizer step that does not happen: weights and optimizer state are untouched, gradients are dropped, buffers
    return to their last good values. `trainer.global_step` counts it and learning-rate schedulers advance. With gradient accumulation
    the whole window is skipped. Overflows of a float16 gradient scaler are the scaler's business: neither counted nor raised.
    What would make every further step bad (a parameter or optimizer state that is not finite) raises `NonFiniteError` that names it.

    Args:
        policy: "skip"; "raise" stops at the first event; "rollback" also goes back to the last snapshot of weights, optimizers, schedulers
            and buffers, kept on the CPU.
        max_skips: most skipped steps in a row before `NonFiniteError`; None sets no limit.
        max_skips_per_1000: most skipped steps among the last 1,000 before `NonFiniteError`; None sets no limit.
        snapshot_every: steps between snapshots, for "rollback".
        lr_factor: factor for the learning rates at each rollback.
        diagnose: run the batch of an event again to name the first non-finite tensor. Off under sharded strategies.
        folder: where replay files go; default `<log_dir>/nan_guard`. Read them with `pl-normkit replay FILE`.
        max_files: most replay files written by each rank.
        save_weights: put the weights into replay files, so that the whole step can be run again from the file.
        device_side: leave the decision on the device (fused optimizers take it as `found_inf`), so that no step waits for it; reports then
            come a step or more late. None does so for fused optimizers on accelerators.
        spike_factor: also skip steps whose gradient norm is above this many times its running median; counted in `spikes`, not in `budget`.

    Attributes:
        events: one dict per event: step, epoch, batch_index, ranks, first (the diagnosis of the first producer), samples (indices in the
            batch), skipped and file.
        budget: counts of steps and skips; logged as `normkit/skipped`.
        overflows: float16 scaler overflows seen.
        spikes: steps skipped for `spike_factor`.

    Source: derived here; see docs/nan_safety.md.
    """

    def __init__(
        self,
        policy: Literal["skip", "raise", "rollback"] = "skip",
        max_skips: int | None = 50,
        max_skips_per_1000: int | None = None,
        *,
        snapshot_every: int = 100,
        lr_factor: float = 1.0,
        diagnose: bool = True,
        folder: str | Path | None = None,
        max_files: int = 10,
        save_weights: bool = False,
        device_side: bool | None = None,
        spike_factor: float | None = None,
    ) -> None:
        super().__init__()
        self._folder = folder
        self._guard = StepGuard(
            policy, max_skips, max_skips_per_1000, snapshot_every=snapshot_every, lr_factor=lr_factor, diagnose=diagnose, folder=folder,
            max_files=max_files, save_weights=save_weights, device_side=device_side, spike_factor=spike_factor,
        )  # fmt: skip

    @property
    def events(self) -> list[dict[str, Any]]:
        return self._guard.log.events

    @property
    def budget(self) -> SkipBudget:
        return self._guard.budget

    @property
    def overflows(self) -> int:
        return self._guard.overflows

    @property
    def spikes(self) -> int:
        return self._guard.spikes

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        # every rank asks for `log_dir`, here and once: it is broadcast
        self._guard.folder = self._folder or Path(trainer.log_dir or trainer.default_root_dir) / "nan_guard"
        kinds = {kind.__name__ for kind in type(strategy).__mro__}
        around = Surroundings(
            distributed=trainer.world_size > 1,
            sharded=bool(kinds & {"FSDPStrategy", "ModelParallelStrategy"}),
            rank=trainer.global_rank,
            manual=not pl_module.automatic_optimization,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
            context=trainer.precision_plugin.train_step_context,
            where=lambda: (trainer.global_step, trainer.current_epoch),
        )
        self._guard.start(pl_module, trainer.optimizers, around, at_end=lambda: vars(strategy).pop("optimizer_step", None))
        original = strategy.optimizer_step

        def optimizer_step(optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
            return self._guard.guarded(optimizer, lambda: original(optimizer, closure, model, **kwargs))

        strategy.optimizer_step = optimizer_step  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._guard.begin(batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._guard.is_watching:
            self._guard.saw_loss(loss)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        if self._guard.is_watching:  # code may drive the Trainer's loops by hand, after the fit
            self._guard.judge(optimizer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._guard.end()
        pl_module.log("normkit/skipped", float(self.budget.skips), batch_size=1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._guard.clean()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._guard.clean(for_checkpoint=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._guard.finish()
        self._guard.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._guard.stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._guard.stop()

    def state_dict(self) -> dict[str, Any]:
        return self._guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._guard.load_state_dict(state_dict)
