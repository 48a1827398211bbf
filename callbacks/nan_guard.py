"""NaNGuard: a bad step is skipped on every rank, named and counted; weights, optimizer state and buffers stay finite."""

from __future__ import annotations

__all__ = ["NaNGuard"]

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from pl_normkit.callbacks._lightning import Callback
from pl_normkit.callbacks._network import is_sharded
from pl_normkit.errors import ConfigError, NonFiniteError
from pl_normkit.methods.nan_safety.diagnosis import Diagnosis
from pl_normkit.methods.nan_safety.guard import (
    BufferShadow,
    SkipBudget,
    Snapshot,
    Transaction,
    accepts_device_flag,
    gradient_total,
    gradients,
    gradients_are_finite,
    poison,
    steps_once,
)
from pl_normkit.methods.nan_safety.replay import RandomState, save_replay
from pl_normkit.methods.nan_safety.rerun import Batch, diagnose_batches

log = logging.getLogger(__name__)


class _SkipStepError(Exception):
    """Unwinds an optimizer's `step` before it has touched anything."""


@dataclass
class _Window:
    """What happened since the last decision: the batches, and the losses whose gradients are in the sum."""

    batches: list[Batch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    decided: bool = False


class NaNGuard(Callback):
    """Skip training steps whose loss, gradients or batch-norm statistics are not finite.

    A skipped step is an optimizer step that does not happen: weights and optimizer state are untouched, gradients are dropped, buffers
    return to their last finite values. `trainer.global_step` counts it and learning-rate schedulers advance. With gradient accumulation
    the whole window is skipped. Overflows of a float16 gradient scaler are the scaler's business: neither counted nor raised.

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
            come a step or more late and are not gathered over ranks. None does so for fused optimizers on accelerators.

    Attributes:
        events: one dict per event: step, epoch, batch_index, ranks, first (the diagnosis of the first producer) and file.
        budget: counts of steps and skips.
        overflows: float16 scaler overflows seen.

    Source: derived here; the sheet's "dynamic guard".
    """

    def __init__(
        self,
        policy: Literal["skip", "raise", "rollback"] = "skip",
        max_skips: int | None = None,
        max_skips_per_1000: int | None = None,
        *,
        snapshot_every: int = 100,
        lr_factor: float = 1.0,
        diagnose: bool = True,
        folder: str | Path | None = None,
        max_files: int = 10,
        save_weights: bool = False,
        device_side: bool | None = None,
    ) -> None:
        super().__init__()
        if policy not in ("skip", "raise", "rollback"):
            raise ConfigError(f"unknown policy {policy!r} of NaNGuard", mend='use "skip", "raise" or "rollback"')
        if snapshot_every < 1 or not 0 < lr_factor <= 1:
            raise ConfigError(
                "snapshot_every must be at least 1 and lr_factor in (0, 1]",
                evidence=f"snapshot_every={snapshot_every}, lr_factor={lr_factor}",
            )
        self.policy = policy
        self.snapshot_every = snapshot_every
        self.lr_factor = lr_factor
        self.diagnose = diagnose
        self.folder = folder
        self.max_files = max_files
        self.save_weights = save_weights
        self.device_side = device_side
        self.budget = SkipBudget(max_skips, max_skips_per_1000)
        self.events: list[dict[str, Any]] = []
        self.overflows = 0
        self._files = 0
        self._evaluations = 0
        self._stepping = False
        self._deferred = False
        self._scaled_event = False
        self._window = _Window()
        self._shadow: BufferShadow | None = None
        self._snapshot: Snapshot | None = None
        self._transactions: dict[int, Transaction] = {}
        self._passes: dict[int, int] = {}
        self._pending: deque[tuple[Tensor, Any, _Window, int]] = deque()
        self._undo: list[Callable[[], None]] = []

    # -- hooks, in the order of a step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        self._shadow = BufferShadow(pl_module)
        self._window = _Window()
        strategy = trainer.strategy
        strategy.optimizer_step = self._guarded(trainer, pl_module, strategy.optimizer_step)  # type: ignore[method-assign]
        self._undo.append(lambda: vars(strategy).pop("optimizer_step", None))
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_step_pre_hook(self._before_raw_step(trainer, pl_module)).remove)
        self._take_snapshot(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._shadow is not None
        self._read_pending(trainer, pl_module)
        if self._window.decided or not pl_module.automatic_optimization:
            self._window = _Window()
            self._shadow.accept_finite()
        self._window.batches.append(Batch(batch, batch_idx, RandomState.now()))
        if not pl_module.automatic_optimization:
            self._transactions = {id(o): Transaction(o) for o in trainer.optimizers if not steps_once(o) and self._passes.get(id(o)) != 1}

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        assert self._shadow is not None
        poison(loss, self._shadow.watched())
        self._window.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        assert self._shadow is not None
        self._evaluations += 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None and self._decides_on_device(optimizer):
            self._offer_flag(optimizer, trainer.global_step)
            return
        finite = gradients_are_finite(gradients(optimizer), sharded=is_sharded(trainer))
        if not self._window.losses and self._shadow.bad_names():
            finite = False  # no backward carried the statistics into the gradients
        if finite:
            self._prepare_transaction(optimizer)
            if id(optimizer) not in self._transactions:
                self._shadow.accept()  # else when the whole step has ended well
        elif scaler is not None:
            self._judge_overflow(scaler, optimizer)
        elif self._evaluations > 1:
            self._shadow.restore()  # in the middle of a step of several evaluations: judged when it ends
        else:
            raise _SkipStepError

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.automatic_optimization:
            self._close_transactions(trainer, pl_module)
            if not self._window.decided:
                self._clean_buffers()
        if trainer.global_step % self.snapshot_every == 0 and self._window.decided and self.budget.row == 0:
            self._take_snapshot(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clean_buffers()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._clean_buffers()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_pending(trainer, pl_module, wait=True)
        self._clean_buffers()
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        return {"budget": self.budget.state_dict(), "overflows": self.overflows, "files": self._files}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.budget.load_state_dict(state_dict["budget"])
        self.overflows, self._files = state_dict["overflows"], state_dict["files"]

    # -- the optimizer step

    def _guarded(self, trainer: pl.Trainer, pl_module: pl.LightningModule, original: Callable[..., Any]) -> Callable[..., Any]:
        """The strategy's `optimizer_step`, around which a step is opened, skipped or taken back."""

        def optimizer_step(optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
            self._evaluations, self._stepping, self._deferred, self._scaled_event = 0, True, False, False
            overflows, scale, result = self.overflows, _scale_of(trainer), None
            try:
                result = original(optimizer, closure, model, **kwargs)
                bad = self._scaled_event
            except _SkipStepError:
                bad = True
            finally:
                self._stepping = False
                if hasattr(optimizer, "found_inf"):
                    del optimizer.found_inf
            if self._scaled_event:
                trainer.precision_plugin.scaler.update(scale)  # type: ignore[attr-defined]
            bad = self._took_back(optimizer) or bad
            self._decided(trainer, pl_module, optimizer, bad=bad, counted=not self._deferred and self.overflows == overflows)
            return result

        return optimizer_step

    def _before_raw_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[..., None]:
        """A step that does not pass through Lightning (`self.optimizers(use_pl_optimizer=False)`) is judged here."""

        def judge(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            has_closure = any(argument is not None for argument in args[1:]) or kwargs.get("closure") is not None
            if self._stepping or has_closure:
                return
            finite = gradients_are_finite(gradients(optimizer), sharded=is_sharded(trainer))
            if finite and self._shadow is not None:
                self._shadow.accept()
            self._decided(trainer, pl_module, optimizer, bad=not finite)

        return judge

    def _prepare_transaction(self, optimizer: Optimizer) -> None:
        if self._evaluations == 1 and not steps_once(optimizer) and self._passes.get(id(optimizer)) != 1:
            self._transactions[id(optimizer)] = Transaction(optimizer)

    def _took_back(self, optimizer: Optimizer) -> bool:
        """After a step: learn how often the optimizer evaluates, and undo a step of several evaluations that ended badly."""
        if self._evaluations:
            self._passes[id(optimizer)] = max(self._evaluations, self._passes.get(id(optimizer), 0))
        transaction = self._transactions.pop(id(optimizer), None)
        if transaction is None:
            return False
        if transaction.holds():
            assert self._shadow is not None
            self._shadow.accept()
            return False
        transaction.take_back()
        return True

    def _close_transactions(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if id(optimizer) in self._transactions and self._took_back(optimizer):
                self._decided(trainer, pl_module, optimizer, bad=True)

    def _decided(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer, *, bad: bool, counted: bool = True
    ) -> None:
        self._window.decided = True
        if bad or counted:
            self.budget.count(skipped=bad)
        if bad:
            assert self._shadow is not None
            self._shadow.restore()
            _drop_gradients(optimizer)
            self._report(trainer, pl_module, self._window, trainer.global_step)

    def _judge_overflow(self, scaler: Any, optimizer: Optimizer) -> None:
        """Non-finite gradients under a scaler: its own overflow, unless the loss itself was not finite or the scale is at its end."""
        assert self._shadow is not None
        losses_bad = any(not bool(torch.isfinite(loss).all()) for loss in self._window.losses)
        self._scaled_event = _on_any_rank(losses_bad or bool(self._shadow.bad_names()) or scaler.get_scale() <= 1.0, optimizer)
        if not self._scaled_event:
            self.overflows += 1
            self._shadow.accept()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            gradients(optimizer)[0].fill_(torch.nan)  # the scaler looks at these gradients later, and skips by itself
        else:
            _drop_gradients(optimizer)  # the scaler has looked already

    # -- decision on the device

    def _decides_on_device(self, optimizer: Optimizer) -> bool:
        if self.device_side is False or self.policy != "skip" or not accepts_device_flag(optimizer):
            return False
        return bool(self.device_side) or optimizer.param_groups[0]["params"][0].device.type == "cuda"

    def _offer_flag(self, optimizer: Optimizer, step: int) -> None:
        """Hand `found_inf` to the fused optimizer; its value is read when it has arrived here."""
        assert self._shadow is not None
        bad = (~torch.isfinite(gradient_total(gradients(optimizer)))).float()
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        self._shadow.settle(bad)
        arrived = torch.cuda.Event() if bad.is_cuda else None  # type: ignore[no-untyped-call]
        self._pending.append((bad.to("cpu", non_blocking=True), arrived, self._window, step))
        if arrived is not None:
            arrived.record()
        self._deferred = True

    def _read_pending(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, wait: bool = False) -> None:
        """Count the flags that have arrived; waits for none unless asked to."""
        while self._pending:
            flag, arrived, window, step = self._pending[0]
            if arrived is not None and not arrived.query():
                if not wait:
                    return
                arrived.synchronize()
            self._pending.popleft()
            bad = bool(flag.item())
            self.budget.count(skipped=bad)
            if bad:
                self._report(trainer, pl_module, window, step, gather=False)

    # -- after an event

    def _clean_buffers(self) -> None:
        """Before anyone looks at the buffers while no step has been decided yet: put bad ones back."""
        if self._shadow is not None and not self._window.decided and self._shadow.bad_names():
            self._shadow.restore()

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, window: _Window, step: int, *, gather: bool = True) -> None:
        """Name the first producer, save the replay file, keep the event, and do what the policy says."""
        diagnosis, record, batch = Diagnosis("unknown", detail="not diagnosed"), None, None
        if self.diagnose and window.batches and not is_sharded(trainer):
            diagnosis, record, batch = diagnose_batches(pl_module, window.batches, trainer.precision_plugin.train_step_context)
        found = _from_all_ranks(diagnosis) if gather else {trainer.global_rank: diagnosis}
        producers = {rank: seen for rank, seen in found.items() if seen.kind != "unknown"} or found
        first = next(iter(producers.values()))
        event: dict[str, Any] = {"step": step, "epoch": trainer.current_epoch, "batch_index": batch.index if batch else -1}
        event |= {"ranks": list(producers), "first": first, "file": ""}
        if batch is not None and trainer.global_rank in producers and self._files < self.max_files:
            self._files += 1
            path = (
                Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "nan_guard")
                / f"step{step}_rank{trainer.global_rank}.pt"
            )
            facts = {"step": step, "epoch": trainer.current_epoch, "batch_index": batch.index, "rank": trainer.global_rank}
            weights = pl_module.state_dict() if self.save_weights else None
            save_replay(path, diagnosis, record, batch.values, batch.random_state, facts, weights)
            event["file"] = str(path)
        self.events.append(event)
        if trainer.is_global_zero:
            log.warning("NaNGuard skipped step %d (batch %d, ranks %s): %s", step, event["batch_index"], list(producers), first)
        self._act(event)

    def _act(self, event: dict[str, Any]) -> None:
        exceeded = self.budget.exceeded()
        if self.policy == "raise" or exceeded:
            raise NonFiniteError(
                exceeded or "a training step is not finite; it was not made",
                where=f"step {event['step']}, batch {event['batch_index']}, ranks {event['ranks']}",
                evidence=str(event["first"]),
                mend=f"pl-normkit replay {event['file']}" if event["file"] else "see NaNGuard.events",
                silence='NaNGuard(policy="skip", max_skips=None, max_skips_per_1000=None)',
            )
        if self.policy == "rollback" and self._snapshot is not None:
            self._snapshot.restore(self.lr_factor)
            assert self._shadow is not None
            self._shadow.accept()

    def _take_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.policy == "rollback":
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._snapshot = Snapshot(pl_module, trainer.optimizers, schedulers, trainer.global_step)

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._transactions.clear()
        self._pending.clear()


def _drop_gradients(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _scale_of(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _on_any_rank(flag: bool, optimizer: Optimizer) -> bool:
    """Called on every rank at once: whether `flag` holds on one of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return flag
    shared = torch.tensor(float(flag), device=optimizer.param_groups[0]["params"][0].device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared.item())


def _from_all_ranks(diagnosis: Diagnosis) -> dict[int, Diagnosis]:
    """Called on every rank at once, on events only."""
    if not (dist.is_available() and dist.is_initialized()):
        return {0: diagnosis}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, diagnosis)
    return dict(enumerate(found))
