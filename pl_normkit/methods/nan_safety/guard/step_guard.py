"""The guard of a training loop, without Lightning: bad optimizer steps do not happen, are named, counted and undone. Derived here.

In a plain loop the optimizers' own hooks and `torch.autograd.backward` tell it what happens:

    guard = StepGuard(folder="nan_guard")
    with guard.watching(model, optimizer, step=lambda batch: loss_of(model, batch)):
        for batch in batches:
            guard.begin(batch)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

`callbacks/nan_guard.py` calls the same methods from Lightning's hooks.
"""

from __future__ import annotations

__all__ = ["StepGuard"]

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_normkit.errors import ConfigError
from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis
from pl_normkit.methods.nan_safety.diagnosis.replay import RandomState
from pl_normkit.methods.nan_safety.diagnosis.rerun import Batch
from pl_normkit.methods.nan_safety.guard.budget import SkipBudget, SpikeWatch
from pl_normkit.methods.nan_safety.guard.causes import bad_gradient, lasting_cause
from pl_normkit.methods.nan_safety.guard.decision import Verdict, gradients, measure, shared
from pl_normkit.methods.nan_safety.guard.device_flags import DeviceFlags
from pl_normkit.methods.nan_safety.guard.events import EventLog, end_of_run
from pl_normkit.methods.nan_safety.guard.last_look import LastLook
from pl_normkit.methods.nan_safety.guard.losses_seen import Seen
from pl_normkit.methods.nan_safety.guard.raw_steps import RawSteps
from pl_normkit.methods.nan_safety.guard.running import Run, SkipStep, Step, Surroundings, device_of, drop_gradients
from pl_normkit.methods.nan_safety.guard.undo import Snapshot, Transaction, accepts_device_flag, steps_once
from pl_normkit.optimizer_hooks import around_steps

log = logging.getLogger(__name__)

FORGIVEN_AFTER = 8
"""Skips in a row for a buffer alone (loss, gradients and weights finite) after which its values are taken for normal."""
ROLLBACKS = 3
"""Returns to one snapshot for a cause that stays, before the run ends."""


class StepGuard:
    """Skip optimizer steps whose loss, gradients or buffers are not finite; end a run whose weights are not.

    Args: as `NaNGuard`.

    Attributes:
        log: the events.
        budget: counts of steps and skips.
        overflows: float16 scaler overflows seen.
        spikes: steps skipped for a finite gradient norm far above the median.
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
        if policy not in ("skip", "raise", "rollback"):
            raise ConfigError(f"unknown policy {policy!r} of NaNGuard", fix='use "skip", "raise" or "rollback"')
        if snapshot_every < 1 or not 0 < lr_factor <= 1 or (spike_factor is not None and not spike_factor > 1):
            raise ConfigError(
                "snapshot_every must be at least 1, lr_factor in (0, 1] and spike_factor above 1",
                evidence=f"snapshot_every={snapshot_every}, lr_factor={lr_factor}, spike_factor={spike_factor}",
            )
        self.policy = policy
        self.snapshot_every, self.lr_factor, self.device_side = snapshot_every, lr_factor, device_side
        self.folder = folder
        self.log = EventLog(diagnose=diagnose, max_files=max_files, save_weights=save_weights)
        self.budget = SkipBudget(max_skips, max_skips_per_1000)
        self.overflows = self.spikes = 0
        self._spike_watch = SpikeWatch(spike_factor)
        self._undo: list[Callable[[], Any]] = []
        self._run: Run | None = None
        self._flags = DeviceFlags(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also in another process, starts outside of any run; its counts and settings go with it."""
        return vars(self) | {"_undo": [], "_run": None, "_flags": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _flags=DeviceFlags(self))

    # -- the loop

    @contextmanager
    def watching(
        self,
        module: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        step: Callable[[Any], Tensor] | None = None,
        scaler: Any = None,
    ) -> Iterator[StepGuard]:
        """Guard the steps of a plain training loop while the block runs.

        Args:
            module: whose buffers are kept and whose parameters are named.
            optimizers: their `step` is guarded.
            step: computes the loss of a batch again, to name the cause of an event; without it the cause is "unknown".
            scaler: the `GradScaler`, where there is one.
        """
        found = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        rank = dist.get_rank() if distributed else 0
        self.start(module, found, Surroundings(distributed=distributed, rank=rank, manual=True, step=step))
        if scaler is not None:
            self._undo.append(RawSteps(self).watch_scaler(scaler))
        try:
            yield self
            self.finish()
        finally:
            self.stop()

    def start(
        self, module: nn.Module, optimizers: Sequence[Optimizer], around: Surroundings, at_end: Callable[[], Any] | None = None
    ) -> None:
        """Begin to guard; `stop` ends it, and calls `at_end`."""
        self.stop()
        self._undo += [at_end] if at_end is not None else []
        run = self._run = Run(module, list(optimizers), around)
        self._undo.append(run.shadow.close)
        raw = RawSteps(self)
        for optimizer in optimizers:
            self._undo.append(around_steps(optimizer, raw.before, raw.after))
        if around.manual:
            self._undo.append(run.losses.watch())
        self._take_snapshot()

    def begin(self, batch: Any = None, index: int | None = None) -> None:
        """A new batch: called before its forward."""
        run = self.running
        if run.around.step is not None or run.around.where is None:  # a plain loop has no hook at the end of a batch
            self.end()
        self._flags.read()
        if run.decided:
            self.report_buffers(run.shadow.accept_outside())
        run.decided = False
        run.batches += 1
        known = batch is not None
        run.losses.begin(Batch(batch, run.batches - 1 if index is None else index, RandomState.now()) if known else None)
        run.last_bad = False
        if run.around.manual:
            run.transactions = {id(o): Transaction(o) for o in run.optimizers if not steps_once(o) and run.passes.get(id(o)) != 1}

    def saw_loss(self, loss: Tensor) -> None:
        """Called before the backward of `loss`."""
        self.running.losses.saw(loss)

    def end(self) -> None:
        """The batch is done."""
        run = self.running
        if run.around.manual and run.batches:
            for optimizer in run.optimizers:
                if id(optimizer) in run.transactions and run.transactions[id(optimizer)].moved():
                    step = Step()
                    step.verdict = self.look_at(optimizer, step)
                    step.spoiled = step.verdict.bad
                    self.conclude(optimizer, step)
            if run.last_bad:
                run.shadow.restore()
            elif run.decided:
                self.report_buffers(run.shadow.restore_bad())
        if run.batches and not run.decided:
            LastLook(self).at_open_step()
        if run.decided and self.budget.row == 0 and self.where()[0] % self.snapshot_every == 0:
            self._take_snapshot()

    def clean(self, *, for_checkpoint: bool = False) -> None:
        """Before others read the buffers, or a checkpoint stores all: put back what is bad, end a run whose weights are."""
        if self._run is not None:
            LastLook(self).at_buffers()
            if for_checkpoint:
                LastLook(self).at_weights(together=False)

    def finish(self) -> None:
        """The last batch is done."""
        self.end()
        self._flags.read(wait=True)
        LastLook(self).at_buffers()
        LastLook(self).at_weights(together=True)

    def stop(self) -> None:
        """Take away all hooks."""
        while self._undo:
            self._undo.pop()()
        self._run = None

    @property
    def is_watching(self) -> bool:
        return self._run is not None

    @property
    def running(self) -> Run:
        """What it remembers of the run it watches."""
        if self._run is None:
            raise ConfigError("the guard watches nothing", fix="call its methods inside `with guard.watching(model, optimizer):`")
        return self._run

    def state_dict(self) -> dict[str, Any]:
        """Counts, those of decisions that are still on the device among them."""
        if self._run is not None:
            self._flags.count_all()
        counts = {"budget": self.budget.state_dict(), "overflows": self.overflows, "files": self.log.files}
        return counts | {"spikes": self.spikes, "norms": self._spike_watch.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.budget.load_state_dict(state["budget"])
        self.overflows, self.log.files = state["overflows"], state["files"]
        self.spikes = state.get("spikes", 0)
        self._spike_watch.load_state_dict(state.get("norms", {}))

    # -- one optimizer step

    def guarded(self, optimizer: Optimizer, make: Callable[[], Any]) -> Any:
        """Run `make`, which steps `optimizer` and calls `judge` before that; skip the step, or take it back, if it is bad."""
        run, step, result = self.running, Step(), None
        run.step = step
        scaler = run.around.scaler
        scale = None if scaler is None else float(scaler.get_scale())
        try:
            result = make()
        except SkipStep:
            step.bad = not step.spike
        finally:
            run.step = None
            if hasattr(optimizer, "found_inf"):
                del optimizer.found_inf
        if step.scale_back:
            scaler.update(scale)
        if step.evaluations:
            run.passes[id(optimizer)] = max(step.evaluations, run.passes.get(id(optimizer), 0))
        self.conclude(optimizer, step)
        return result

    def judge(self, optimizer: Optimizer) -> None:
        """After the backward and before the optimizer moves anything.

        Raises:
            SkipStep: the step must not be made.
        """
        run = self.running
        step = run.step = run.step or Step()
        step.evaluations += 1
        if run.around.scaler is None and self._decides_on_device(optimizer):
            self._flags.offer(optimizer, step)
            return
        step.verdict = verdict = self.look_at(optimizer, step)
        step.spike = step.evaluations == 1 and not verdict.bad and self.is_spike(optimizer, verdict)
        step.spoiled = verdict.bad
        if not verdict.bad and not step.spike:
            self._open_transaction(optimizer, step)
            if id(optimizer) not in run.transactions:
                run.accept()  # else when the whole step has ended well
        elif run.around.scaler is not None:
            self._judge_scaled(optimizer, step)
        elif step.evaluations > 1:
            run.shadow.restore()  # in the middle of a step of several evaluations: judged when it ends
        else:
            raise SkipStep

    def look_at(self, optimizer: Optimizer, step: Step) -> Verdict:
        """What of the step of `optimizer` is not finite, the same on every rank. Waits for the device."""
        vector = self.measured(optimizer, step)
        verdict = Verdict.of(vector)
        if not verdict.bad:
            return verdict
        run = self.running
        run.bad_gradient = bad_gradient(run.module, optimizer)
        transaction = run.transactions.get(id(optimizer))
        if transaction is not None and transaction.was_finite():  # will be undone, parameters and all
            return verdict._replace(gradient=True, parameter=False, state=False)
        if verdict.stays:
            return verdict
        stays = lasting_cause(run.module, run.optimizers, run.excused) is not None
        flag = torch.tensor(float(stays), device=device_of(optimizer))
        return verdict._replace(parameter=bool(shared(flag, distributed=run.around.distributed).item()))

    def measured(self, optimizer: Optimizer, step: Step) -> Tensor:
        """The answers about this step, the same on every rank; on the device, read by no one yet."""
        run = self.running
        if run.buffer_row >= FORGIVEN_AFTER:
            for name in run.shadow.forgive():
                log.warning("NaNGuard takes the non-finite values of buffer %s for normal: nothing else was wrong", name)
            run.buffer_row = 0
        seen = run.losses.of(optimizer)
        step.seen += seen
        buffers_bad = torch.ones((), dtype=torch.bool) if run.spoiled else run.shadow.bad()
        run.spoiled = False
        losses = [found.loss for found in seen if found.loss is not None]
        parameters, states = run.watched.parameters(optimizer, run.shadow.parameters), run.watched.states(optimizer)
        vector = measure(losses, gradients(optimizer), buffers_bad, parameters, states, device_of(optimizer))
        if run.around.sharded and run.around.distributed and self._spike_watch.factor is not None:
            square = vector[5].square()
            dist.all_reduce(square)
            vector[5] = square.sqrt()
        return shared(vector, distributed=run.around.distributed)

    def is_spike(self, optimizer: Optimizer, verdict: Verdict) -> bool:
        """Whether its finite gradient norm is far above the running median; notes the norm."""
        scaler = self.running.around.scaler
        scale = float(scaler.get_scale()) if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
        return self._spike_watch.is_spike(self.running.index(optimizer), verdict.norm / scale)

    def _judge_scaled(self, optimizer: Optimizer, step: Step) -> None:
        """Under a scaler, which has looked at the gradients already or will: an overflow of its own, or an event."""
        run, scaler, verdict = self.running, self.running.around.scaler, step.verdict
        step.bad = not step.spike and (verdict.loss or verdict.buffer or verdict.stays or scaler.get_scale() <= 1.0)
        step.overflow = not step.bad and not step.spike
        step.spoiled = step.spoiled and not step.overflow
        step.scale_back = not step.overflow
        if step.overflow:
            self.overflows += 1
            run.accept()
        grads = gradients(optimizer)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and grads:
            grads[0].fill_(torch.nan)  # the scaler looks at these gradients later, and skips by itself
        else:
            drop_gradients(optimizer)

    def _open_transaction(self, optimizer: Optimizer, step: Step) -> None:
        run = self.running
        known = id(optimizer) in run.transactions
        if step.evaluations == 1 and not known and not steps_once(optimizer) and run.passes.get(id(optimizer)) != 1:
            run.transactions[id(optimizer)] = Transaction(optimizer)

    def conclude(self, optimizer: Optimizer, step: Step) -> None:
        """The step is over: undo one that ended badly, count, report, and do what the policy says."""
        run = self.running
        transaction = run.transactions.pop(id(optimizer), None)
        if transaction is not None and not step.deferred:
            lost = torch.tensor(float(step.spoiled or step.bad or step.spike or not transaction.holds()), device=device_of(optimizer))
            if bool(shared(lost, distributed=run.around.distributed).item()):
                transaction.take_back()
                step.bad = not step.spike
            else:
                run.accept()
        run.decided, run.last_bad = True, step.bad or step.spike
        run.losses.heard = False
        run.decisions += 1
        if step.bad or not (step.deferred or step.overflow):
            self.budget.count(skipped=step.bad)
        if step.bad or step.spike:
            run.shadow.restore()
            drop_gradients(optimizer)
            self.report(step.verdict, step.seen, self.where(), optimizer if step.spike else None)
        elif not step.deferred:
            run.buffer_row = 0

    def _decides_on_device(self, optimizer: Optimizer) -> bool:
        if self.device_side is False or self.policy != "skip" or self._spike_watch.factor is not None or not accepts_device_flag(optimizer):
            return False
        return bool(self.device_side) or device_of(optimizer).type == "cuda"

    # -- after an event

    def report(self, verdict: Verdict, seen: Sequence[Seen], where: tuple[int, int], spiked: Optimizer | None = None) -> None:
        """Name the first producer, save the replay file, keep the event, and do what the policy says."""
        run = self.running
        run.buffer_row = run.buffer_row + 1 if verdict == Verdict(buffer=True, norm=verdict.norm) else 0
        batch = seen[-1].batch if seen else None
        cause = lasting_cause(run.module, run.optimizers, run.excused) if verdict.stays else None
        if spiked is not None:
            self.spikes += 1
            median = self._spike_watch.median(run.index(spiked))
            detail = f"the gradient norm is {verdict.norm:.4g}, its running median {median:.4g}"
            found: Any = (Diagnosis("spike", detail=detail), None, batch)
        elif verdict.stays:
            found = (cause or Diagnosis("unknown", detail="the parameter that is not finite is on another rank"), None, batch)
        elif run.around.sharded:
            found = (Diagnosis("unknown", detail="not diagnosed: the parameters are sharded"), None, batch)
        else:
            with run.losses.paused():
                found = self.log.find(run.module, seen, run.around.context, run.around.step)
            if found[0].kind == "unknown":
                found[0].detail += "; the loss is not finite" if verdict.loss else run.bad_gradient
        event = self._add_event(found, where, gather=run.around.distributed)
        if run.around.rank == 0:
            file = f"; replay with: pl-normkit replay {event['file']}" if event["file"] else ""
            place = f"step {event['step']} (batch {event['batch_index']}, ranks {event['ranks']})"
            log.warning("NaNGuard skipped %s: %s%s", place, event["first"], file)
        if spiked is None:
            self._act(event, stays=verdict.stays)

    def _add_event(self, found: Any, where: tuple[int, int], *, gather: bool, skipped: bool = True) -> dict[str, Any]:
        run = self.running
        facts = {"step": where[0], "epoch": where[1], "rank": run.around.rank}
        return self.log.add(found, facts, folder=Path(self.folder or "nan_guard"), module=run.module, gather=gather, skipped=skipped)

    def report_buffers(self, names: list[str], when: str = "after the optimizer step") -> None:
        """Buffers that went bad outside of any step that could be skipped; put back already. Of this rank alone: others may have none."""
        for name in names:
            diagnosis = Diagnosis("buffer", name, detail=f"{name} was not finite {when}; its last good value is back")
            self._add_event((diagnosis, None, None), self.where(), gather=False, skipped=False)
            log.warning("NaNGuard: %s", diagnosis)

    def end_for(self, cause: Diagnosis, *, gather: bool = False) -> None:
        """A cause that stays, found outside of a step: the run ends or goes back."""
        self._act(self._add_event((cause, None, None), self.where(), gather=gather, skipped=False), stays=True)

    def _act(self, event: dict[str, Any], *, stays: bool) -> None:
        run, exceeded = self.running, self.budget.exceeded()
        can_go_back = self.policy == "rollback" and run.snapshot is not None
        if can_go_back and stays and run.snapshot is not None:
            run.snapshot.uses_for_cause += 1
            can_go_back = run.snapshot.uses_for_cause <= ROLLBACKS
        if self.policy == "raise" or exceeded or (stays and not can_go_back):
            raise end_of_run(event, exceeded, stays=stays)
        if can_go_back and run.snapshot is not None:
            run.snapshot.restore(self.lr_factor)
            run.shadow.accept()

    def _take_snapshot(self) -> None:
        run = self.running
        if self.policy == "rollback" and lasting_cause(run.module, run.optimizers, run.excused) is None:
            run.snapshot = Snapshot(run.module, run.optimizers, run.around.schedulers, self.where()[0])

    def where(self) -> tuple[int, int]:
        """Step and epoch now."""
        where = self.running.around.where
        return (self.budget.steps, 0) if where is None else where()
