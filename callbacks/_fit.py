"""What our callbacks of one Trainer share within a stage: when the network is built, what it is called with, and its trace."""

from __future__ import annotations

__all__ = ["Fit", "after", "current_fit", "fit_of", "how_to_load", "in_first_network", "say_changes", "traced_network", "warn_of_nothing"]

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn

from pl_normkit.callbacks._first_batch import first_samples, inputs_in
from pl_normkit.callbacks._lightning import Callback, is_sharded, overrides, say
from pl_normkit.callbacks._network_calls import NetworkCall, networks_in, rehearse
from pl_normkit.errors import ConfigError, ModelSpecError, NormkitError, NormkitWarning, NothingMatchedError, TraceError
from pl_normkit.graph import ModelGraph
from pl_normkit.graph.sharing import TraceStore, shared_traces
from pl_normkit.surgery import Change, Changes
from pl_normkit.wrappers import unwrapped

if TYPE_CHECKING:
    import lightning.pytorch as pl

_UNKNOWN = "it is not known what the network is called with; pass example_inputs=, or set example_input_array on the LightningModule"
_fits: weakref.WeakKeyDictionary[Any, Fit] = weakref.WeakKeyDictionary()


_warned: weakref.WeakSet[Callback] = weakref.WeakSet()


def fit_of(
    callback: Callback,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
) -> Fit:
    """What `callback` shares with our others in the stage that begins; called in `setup`. A callback that comes again begins a stage."""
    fit = current_fit(trainer, pl_module)
    if callback in fit.members:
        fit = _fits[trainer] = Fit(trainer, pl_module)
    fit.members.add(callback)
    return fit


def current_fit(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Fit:
    """What our callbacks share in the stage that has begun."""
    fit = _fits.get(trainer)
    if fit is None or fit.pl_module is not pl_module:
        fit = _fits[trainer] = Fit(trainer, pl_module)
    return fit


class Fit:
    """See `fit_of`. Holds Trainer and module weakly."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer = weakref.ref(trainer)
        self._module = weakref.ref(pl_module)
        self.members: weakref.WeakSet[Callback] = weakref.WeakSet()
        self.traces = TraceStore()
        self._edits: list[Callable[[], None]] = []
        self._fixes: list[Callable[[], None]] = []
        self._readings: list[Callable[[], None]] = []
        self._calls: list[NetworkCall] = []
        self._has_looked = False
        self._is_waiting = False

    @property
    def trainer(self) -> pl.Trainer:
        trainer = self._trainer()
        assert trainer is not None
        return trainer

    @property
    def pl_module(self) -> pl.LightningModule:
        module = self._module()
        assert module is not None
        return module

    # -- when the module tree is complete

    def edit(
        self, callback: Callback, act: Callable[[], None], looked_for: str, *, reads_inputs: bool = False, before_sharding: bool = False
    ) -> None:
        """Let a remedy act now where the network is there, else when `setup` or `configure_model` of the module has built it.

        A network that has no place for it gives one warning, which names what was looked for; a run goes on.

        Args:
            callback: the remedy, for messages.
            act: makes the edit.
            looked_for: what it needs, in the plural, for the warning.
            reads_inputs: whether it needs `calls`, which may be known only after `setup` of the module.
            before_sharding: whether it acts before `configure_model`, which may shard, where it finds its place there.
        """
        has_network = any(True for _ in self.pl_module.parameters())
        is_built = has_network and not overrides(self.pl_module, "configure_model")
        if is_built and (not reads_inputs or self.calls(getattr(callback, "example_inputs", None))):
            self.edit_now(callback, act, looked_for)
        elif not (before_sharding and has_network and self._edit(callback, act) is None):
            self._edits.append(lambda: self.edit_now(callback, act, looked_for))
            self._wait()

    def edit_now(self, callback: Callback, act: Callable[[], None], looked_for: str) -> None:
        """`edit` where the run has begun."""
        failure = self._edit(callback, act)
        if failure is not None:
            warn_of_nothing(self.trainer, callback, looked_for, failure)

    def _edit(self, callback: Callback, act: Callable[[], None]) -> NormkitError | None:
        """Why there was nothing to edit, None where there was."""
        before, count = _keys(self.pl_module), len(_changes_of(callback))
        try:
            with shared_traces(self.traces):
                act()
        except (NothingMatchedError, ModelSpecError, TraceError) as failure:
            return failure
        if _keys(self.pl_module) != before:
            self._check_averages(callback)
        if len(_changes_of(callback)) > count:
            say_changes(callback, _changes_of(callback)[count:], getattr(callback, "summary", ""))
        return None

    def fix(self, act: Callable[[], None]) -> None:
        """Call `act`, which edits what it finds wrong, once the module tree is complete and every remedy has acted."""
        self._fixes.append(self._sharing(act))
        self._wait()

    def read(self, act: Callable[[], None]) -> None:
        """Call `act`, which edits nothing, after all edits, whatever the order of the callbacks."""
        self._readings.append(self._sharing(act))
        self._wait()

    def _sharing(self, act: Callable[[], None]) -> Callable[[], None]:
        def act_sharing() -> None:
            with shared_traces(self.traces):
                act()

        return act_sharing

    def _wait(self) -> None:
        if not self._is_waiting:
            self._is_waiting = True
            after(self.pl_module, "configure_model" if overrides(self.pl_module, "configure_model") else "setup", self._act)

    def _act(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer()
        if trainer is None or _fits.get(trainer) is not self:  # of a fit that failed before the call
            return
        self._is_waiting = False
        self._has_looked = False  # `setup` may have made what data and step need
        for waiting in (self._edits, self._fixes, self._readings):
            while waiting:
                waiting.pop(0)()

    def _check_averages(self, callback: Callback) -> None:
        """A copy of the network that another callback made before it got more parameters or buffers cannot follow it."""
        for other in self.trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(other, "_average_model", None)
            copied = {name.removeprefix("module.") for name in _keys(average)} if isinstance(average, nn.Module) else None
            if copied is not None and not {name.removeprefix("module.") for name in _keys(self.pl_module)} <= copied:
                raise ConfigError(
                    f"{type(other).__name__} copied the network before {type(callback).__name__} added to it",
                    where="Trainer(callbacks=[...])",
                    fix=f"put {type(callback).__name__} before {type(other).__name__}; the order decides which network is averaged",
                )

    def sharing(self) -> AbstractContextManager[None]:
        """Traces within the block are shared."""
        return shared_traces(self.traces)

    # -- what the networks are called with

    def calls(self, example_inputs: Any = None) -> list[NetworkCall]:
        """The networks a training step calls, with inputs; empty where they cannot be known before the first step.

        `example_inputs`, else the module's `example_input_array` are for the module's own forward, or for its only network. Without
        them, or where the array does not fit, it is what `rehearsed` says.
        """
        network = traced_network(self.pl_module)
        if example_inputs is not None:
            return [NetworkCall(network if network is not None else self.pl_module, example_inputs)]
        array = self.pl_module.example_input_array
        if array is None or network is None:
            return self.rehearsed()
        by_array = NetworkCall(network, array)
        return [by_array] if self.graph(by_array) is not None else self.rehearsed()

    def known_calls(self, example_inputs: Any = None) -> list[NetworkCall]:
        """`calls` as far as nothing must be rehearsed for them."""
        had_looked, self._has_looked = self._has_looked, True
        try:
            return self.calls(example_inputs)
        finally:
            self._has_looked = had_looked

    def rehearsed(self) -> list[NetworkCall]:
        """`calls` in a training step on two samples of the data, rehearsed once a fit."""
        if not self._calls and not self._has_looked:
            self._has_looked = True
            self._look(first_samples(self.trainer, self.pl_module))
        return self._calls

    def calls_with(self, batch: Any, example_inputs: Any = None) -> list[NetworkCall]:
        """`calls`, with a batch of the run where two samples did not tell."""
        known = self.calls(example_inputs)
        if not known:
            self._look(batch)
        return known or self._calls

    def learn(self, calls: list[NetworkCall]) -> None:
        """What was seen in the run's own first step, where nothing was known before."""
        self._calls = self._calls or calls

    def inputs_for(self, network: nn.Module) -> Callable[[Any], Any]:
        """From a batch to what the training step calls `network` with; what the form of the batch tells where it calls it in no way."""

        def inputs(batch: Any) -> Any:
            calls = rehearse(self.trainer, self.pl_module, batch, until=network)
            seen = next((call.inputs for call in calls if unwrapped(call.network) is network), None)
            return inputs_in(batch, network) if seen is None else seen

        return inputs

    def graph(self, call: NetworkCall) -> ModelGraph | None:
        """The trace of a call, None where it cannot be had; the same one for everybody."""
        try:
            with shared_traces(self.traces):
                return ModelGraph.from_model(*call)
        except TraceError:
            return None

    def _look(self, batch: Any) -> None:
        pl_module = self.pl_module
        if batch is None or any(parameter.is_meta for parameter in pl_module.parameters()):
            return
        if not is_sharded(self.trainer):
            self._calls = rehearse(self.trainer, pl_module, batch)
        network = traced_network(pl_module)
        if not self._calls and network is not None and (inputs := inputs_in(batch, network)) is not None:
            self._calls = [NetworkCall(network, inputs)]


def traced_network(pl_module: nn.Module) -> nn.Module | None:
    """What a batch is meant for: the module where it has a `forward`, else its only child with parameters, None where there are several."""
    if overrides(pl_module, "forward"):
        return pl_module
    networks = list(networks_in(pl_module))
    return networks[0] if len(networks) == 1 else None


def in_first_network(calls: Sequence[NetworkCall], act: Callable[[NetworkCall], Changes]) -> tuple[NetworkCall, Changes]:
    """Let a remedy act in the first network that has a place for it. Raises NothingMatchedError where none has or none is known."""
    failure = NothingMatchedError(_UNKNOWN)
    for call in calls:
        try:
            return call, act(call)
        except NothingMatchedError as error:
            failure = error
    raise failure


def warn_of_nothing(trainer: pl.Trainer, callback: Callback, looked_for: str, error: Exception) -> None:
    """Once for each callback."""
    if trainer.is_global_zero and callback not in _warned:
        _warned.add(callback)
        why = "; ".join(line.strip() for line in str(error).splitlines())
        warnings.warn(f"{type(callback).__name__} changes nothing: it looked for {looked_for}. {why}", NormkitWarning, stacklevel=2)


def _changes_of(callback: Any) -> list[Change]:
    changes: Changes = callback.changes
    return changes.made


def say_changes(callback: Callback, made: list[Change], summary: str = "", how_to_load: str = "") -> None:
    """One line on what a remedy did."""
    listed = "; ".join(map(str, made[:3])) + (f"; ... and {len(made) - 3} more" if len(made) > 3 else "")
    shown = summary or listed
    say(f"{type(callback).__name__} changed {shown}" + (f". {how_to_load}" if how_to_load else ""))


def how_to_load(callback: Callback) -> str:
    return f"Load its checkpoints with {type(callback).__name__} in the Trainer, or call pl_normkit.restore_edits(model, checkpoint)"


def _keys(module: nn.Module) -> set[str]:
    return {name for name, _ in (*module.named_parameters(), *module.named_buffers())}


def after(owner: Any, method: str, act: Callable[..., None]) -> Callable[[], None]:
    """Let `act`, which gets the arguments too, follow the next call of a method. The instance is as before then, in whatever order
    several such wrappers come off, also where others have wrapped the method since. The value takes the wrapper off where no call came."""
    own = vars(owner)
    waiting = [act]
    below: Any = own.get(method)  # None where the class has the method
    original = getattr(owner, method)

    def take_off() -> None:
        waiting.clear()
        if own.get(method) is call_then_act:
            left = below
            while getattr(left, "is_off", lambda: False)():
                left = left.below
            if left is None:
                del own[method]
            else:
                own[method] = left

    def call_then_act(*args: Any, **kwargs: Any) -> Any:
        due = list(waiting)
        take_off()
        result = original(*args, **kwargs)
        for act in due:
            act(*args, **kwargs)
        return result

    vars(call_then_act).update(is_off=lambda: not waiting, below=below)
    own[method] = call_then_act
    return take_off
