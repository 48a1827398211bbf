"""The first training step as `ModelAudit` sees it: collects what its report is made of, and says when it is complete."""

from __future__ import annotations

__all__ = ["StepHooks", "WatchedRun", "can_record"]

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from pl_normkit.callbacks._fit import Fit
from pl_normkit.callbacks._lightning import Callback, has_compiled_part, is_compiled, is_sharded
from pl_normkit.callbacks._network_calls import NetworkCalls, networks_in
from pl_normkit.callbacks._report_of_run import loaders_of
from pl_normkit.callbacks.gamma_decay import GammaDecay
from pl_normkit.findings import NoteKind
from pl_normkit.first_step import StepRecorder
from pl_normkit.graph.sharing import shared_traces
from pl_normkit.methods.nan_safety.losses.stress import StepCall
from pl_normkit.restoring import edit_records
from pl_normkit.rules import load_rules
from pl_normkit.run_audit import RunAudit
from pl_normkit.selection import Selection
from pl_normkit.subject import Needs

if TYPE_CHECKING:
    import lightning.pytorch as pl

if TYPE_CHECKING:
    import lightning.pytorch as pl


def can_record(fit: Fit) -> bool:
    """Whether nothing compiles the operations of a step, and no rank holds its parameters in part."""
    return not is_compiled(fit.pl_module) and not has_compiled_part(fit.pl_module) and not is_sharded(fit.trainer)


class WatchedRun:
    """One fit under audit.

    `audit.parts` takes what else is learnt of the step (facts of its backward, say): until the first optimizer step it enters the report,
    in the batch after that it is added. The hooks say whether there is something to tell.

    Args:
        fit: what our callbacks share.
        selection: the rules.
        example_inputs: for the LightningModule's forward, None where they are to be found.
        measure: whether rules may run the networks.
        fix: as for `ModelAudit`.
        stress: the same.

    Attributes:
        audit: what is known so far.
        had_inputs: `fix` knew what the networks are called with.
    """

    def __init__(self, fit: Fit, selection: Selection, example_inputs: Any, *, measure: bool, fix: str, stress: bool = False) -> None:
        self.audit = RunAudit(fit.pl_module, selection, measure=measure and not is_sharded(fit.trainer))
        self._fit = fit
        self._example_inputs = example_inputs
        self._fix, self._stress = fix, stress
        self._watch: NetworkCalls | None = None
        self._recorder: StepRecorder | None = None
        self._batch: Any = None
        self._batches_told = self._known = 0
        self._is_first, self._is_late = True, False
        self.had_inputs = self._has_loss = self._is_concluded = False

    @property
    def trainer(self) -> pl.Trainer:
        return self._fit.trainer

    def fix(self) -> list[dict[str, Any]]:
        """Let fixes act on all networks; their records for a checkpoint."""
        records = []
        calls = self._fit.calls(self._example_inputs)
        self.had_inputs = bool(calls)
        for network, inputs in calls:
            planned = self.audit.fix(network, inputs, allow_unsafe=self._fix == "unsafe")
            records += edit_records(self._fit.pl_module, network, inputs, planned)
        return records

    def start_batch(self, batch: Any, index: int) -> None:
        if self._is_late and index > 0:
            return
        self._batch = batch
        module = self._fit.pl_module
        if self._watch is None and not is_compiled(module):  # what runs compiled takes no hooks
            self._watch = NetworkCalls(module, is_wrapped=self._fit.trainer.strategy.model is not module)
        if self._is_first and can_record(self._fit):
            self._recorder = self._recorder or StepRecorder(self._trained_module, self._fit.trainer.optimizers)
            self._recorder.before_forward(batch)

    @property
    def _trained_module(self) -> nn.Module:
        wrapper = self._fit.trainer.strategy.model
        return wrapper if isinstance(wrapper, DistributedDataParallel) else self._fit.pl_module

    def before_backward(self, loss: Any) -> None:
        """Each loss of the first step that has one."""
        if self._is_first and not self._is_inside_compiled_step:
            if self._recorder is not None and isinstance(loss, Tensor):
                self._recorder.before_backward(loss)
            self.audit.judge_loss(loss, self._step_call() if self._stress and not self._has_loss else None)
            self._has_loss = True

    def _step_call(self) -> StepCall | None:
        """The first training step, to be run on corner batches; a step that optimizes by hand would train on them."""
        module, trainer = self._fit.pl_module, self._fit.trainer
        if not module.automatic_optimization or is_sharded(trainer):
            return None
        return StepCall(module, self._batch, context=trainer.precision_plugin.train_step_context)

    def after_backward(self) -> None:
        """The gradients of the first step, as the backward leaves them; where the user calls backward, more may follow before a step."""
        if self._fit.pl_module.automatic_optimization:
            self._read_gradients()

    def _read_gradients(self) -> None:
        if self._recorder is not None:
            self._recorder.after_backward()
            self._note_facts()

    def _note_facts(self) -> None:
        facts = None if self._recorder is None else self._recorder.late_facts()
        if facts is not None:
            self.audit.parts["step"] = facts
        if self._recorder is not None and self._recorder.failure is not None:
            self.audit.note_failure("the first step was not read", self._recorder.failure)

    def before_optimizer_step(self) -> bool:
        if not self._has_loss or self._is_concluded or self._is_inside_compiled_step:
            return False
        self._read_gradients()
        return self._conclude()

    def end_batch(self) -> bool:
        """What ran after the first optimizer step is judged here, and all where the optimizers stepped out of sight."""
        if self._recorder is not None:
            self._note_facts()
            if not self._has_loss:  # a step without a loss shows nothing
                self._recorder.close()
                self._recorder = None
        is_unseen = self._is_late and self._watch is None
        if is_unseen or not (self._has_loss or is_compiled(self._fit.pl_module)):
            return False
        self._is_first, before = False, len(self.audit.networks)
        if not self._is_concluded:
            self._conclude()
        self._batches_told += 1
        with shared_traces(self._fit.traces):
            self._add_networks()
            self.audit.judge_networks()
            self.audit.judge_parts()
        if self._is_late:
            self.stop()
        return not self._is_late or len(self.audit.networks) > before

    def end_epoch(self) -> bool:
        """A network that was not called in a whole epoch is looked for in the first batch of each later one alone."""
        has_news = not self._is_concluded and self._conclude()
        self.stop()
        self._is_first, self._is_late = False, True
        return has_news

    @property
    def is_over(self) -> bool:
        """Whether every network was read whose parameters an optimizer holds, and the step after the first one was seen."""
        if not self._is_concluded or self._batches_told < 2:
            return False
        is_new, self._known = self._known != len(self.audit.networks), len(self.audit.networks)
        return is_new and self.has_seen_all()

    def stop(self) -> None:
        if self._watch is not None:
            self._watch.finish()
        if self._recorder is not None:
            self._recorder.close()
        self._watch = self._batch = self._recorder = None
        self._fit.traces.forget()

    def _conclude(self) -> bool:
        """Judge everything that is known."""
        trainer = self._fit.trainer
        self._is_concluded = True
        if any(isinstance(callback, GammaDecay) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self.audit.selection = self.audit.selection.override(ignore=_rules_on_roles())
        with shared_traces(self._fit.traces):
            self._add_networks()
            self.audit.judge(optimizers=trainer.optimizers, loaders=loaders_of(trainer, self._fit.pl_module))
        if not self.audit.networks:
            self.audit.note("no network ran in the first training step, so none was read: give example_inputs=", NoteKind.NOT_RUN)
        if self._fix != "none" and not self.had_inputs and self.audit.is_fixable(allow_unsafe=self._fix == "unsafe"):
            self.audit.note(f"fix={self._fix!r} needs inputs when the fit is set up: give example_inputs=", NoteKind.NOT_RUN)
        return True

    @property
    def _is_inside_compiled_step(self) -> bool:
        """A step that optimizes by hand calls back from inside what `torch.compile` made of it."""
        module = self._fit.pl_module
        is_whole = getattr(module, "_compiler_ctx", None) is not None and not module.automatic_optimization
        return torch.compiler.is_compiling() or is_whole

    def _add_networks(self) -> None:
        known = self._fit.known_calls(self._example_inputs)
        seen = self._watch.calls() if self._watch is not None else []
        if not known and not seen and self._batch is not None:
            known = self._fit.calls_with(self._batch)
        for network, inputs in (*known, *seen):
            if network not in self.audit.networks:
                self.audit.add_network(network, _on_device_of(network, inputs))

    def has_seen_all(self) -> bool:
        """Whether every network was read whose parameters an optimizer holds."""
        held = {id(p) for optimizer in self._fit.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        networks = [network for network in networks_in(self._fit.pl_module) if any(id(p) in held for p in network.parameters())]
        return all(map(self.audit.has_read, networks))


class StepHooks(Callback):
    """The hooks of a training step that only look."""

    _watched: WatchedRun | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._watched is not None:
            self._watched.start_batch(batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        if self._watched is not None:
            self._watched.before_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watched is not None:
            self._watched.after_backward()


def _rules_on_roles() -> list[str]:
    """`GammaDecay` makes the groups by its policy: what they decay is no finding, and to add it no advice."""
    return [code for code, rule in load_rules().items() if {Needs.GRAPH, Needs.OPTIMIZERS} <= rule.needs]


def _on_device_of(network: nn.Module, inputs: Any) -> Any:
    device = next((parameter.device for parameter in network.parameters()), None)
    return inputs if device is None else tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
