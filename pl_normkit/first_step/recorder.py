"""Takes the facts of a training step: from a loss in hand by `torch.autograd.grad`, or beside a training loop at its own backward."""

from __future__ import annotations

__all__ = ["EvaluationRecorder", "StepRecorder", "read_step"]

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pl_normkit.first_step import backward_graph
from pl_normkit.first_step.autograd_nodes import GraphView
from pl_normkit.first_step.broadcasts import broadcasts
from pl_normkit.first_step.divergences import misread_divergences
from pl_normkit.first_step.facts import ForwardFacts, StepFacts
from pl_normkit.first_step.watch import ForwardWatch
from pl_normkit.graph import call_arguments
from pl_normkit.optimizer_hooks import around_steps
from pl_normkit.preserve import preserved
from pl_normkit.wrappers import unwrapped

_MODAL = (_NormBase, _DropoutNd)


def read_step(model: nn.Module, inputs: Any, loss: Tensor, *, run: bool = True) -> StepFacts | None:
    """The facts of the step that gave `loss`, before its backward; everything is as it was afterwards, the loss's graph too.

    Args:
        model: the module, in the mode it trains in.
        inputs: what it was called with, None where that is not known.
        loss: a scalar, with its autograd graph.
        run: whether the model may be called once more to see its forward pass.

    Returns:
        None where the loss has no graph, or one that cannot be walked (its backward has run).
    """
    if loss.numel() != 1 or loss.is_inference():
        return None
    parameters = _trainable(model)
    if _is_cut(loss):
        return StepFacts(gradients=dict.fromkeys(parameters), is_loss_cut=True)
    if loss.grad_fn is None:
        return None
    with preserved(model, buffers=True):
        try:
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        except RuntimeError:
            return None
        sizes = dict(zip(parameters, _largest(gradients), strict=True))
        facts = _before_backward(model, loss, parameters)
        dropped = frozenset(name for name in facts.dropped_by_backward if sizes[name] is None)
        if GraphView.of([loss], {}).has_hidden_paths:  # those get their gradients in a real backward alone
            sizes = {name: size for name, size in sizes.items() if size is not None or name in dropped}
        facts = replace(facts, gradients=sizes, dropped_by_backward=dropped)
    return replace(facts, forward=_forward_facts(model, inputs)) if run and inputs is not None else facts


def _forward_facts(model: nn.Module, inputs: Any) -> ForwardFacts | None:
    """One more forward pass in the mode the model is in; None where the model cannot be run with these inputs."""
    args, kwargs = call_arguments(inputs)
    watch = ForwardWatch(model, inputs)
    with preserved(model, buffers=True), torch.enable_grad():
        try:
            with watch.watching():
                model(*args, **kwargs)
        except Exception:  # the inputs are an example's; what they cannot do is not this step's mistake
            return None
        return watch.facts()


def _is_cut(loss: Tensor) -> bool:
    """Whether the graph of a loss that can run backward ends in a single number that is no parameter."""
    if loss.grad_fn is None:
        return loss.requires_grad and not isinstance(loss, nn.Parameter)
    leaves = [node.variable for node in GraphView.of([loss], {}).nodes if hasattr(node, "variable")]
    return bool(leaves) and all(leaf.numel() == 1 and not isinstance(leaf, nn.Parameter) for leaf in leaves)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _largest(gradients: Iterable[Tensor | None]) -> list[float | None]:
    """The largest entry of each, read from its device at once."""
    given = list(gradients)
    values = [None if g is None else (g.coalesce().values() if g.is_sparse else g).detach() for g in given]
    found: list[float | None] = [None if value is None else 0.0 for value in values]
    held: dict[torch.device, list[int]] = defaultdict(list)
    for position, value in enumerate(values):
        if value is not None and value.numel():
            held[value.device].append(position)
    for positions in held.values():
        sizes = [value.abs().amax().double() for position in positions if (value := values[position]) is not None]
        for position, size in zip(positions, torch.stack(sizes).tolist(), strict=True):
            found[position] = size
    return found


def _before_backward(model: nn.Module, loss: Tensor, parameters: Mapping[str, Tensor]) -> StepFacts:
    graph = GraphView.of([loss], {id(parameter): name for name, parameter in parameters.items()})
    return StepFacts(
        explained=backward_graph.explained_by_zeros(graph, parameters),
        stacked=backward_graph.stacked_activations(graph) + misread_divergences(graph),
        broadcasts=broadcasts(graph),
        silenced=backward_graph.silenced(graph, parameters),
        dead_shares=backward_graph.dead_shares(graph),
        initial_loss=backward_graph.initial_loss(graph),
        in_eval_mode=_modal(model, training=False),
        dropped_by_backward=graph.direct_arguments_of_functions if graph.has_hidden_paths else frozenset(),
    )


def _modal(model: nn.Module, *, training: bool) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if module.training is training and _drops_or_normalizes(module))


def _drops_or_normalizes(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout > 0 and module.num_layers > 1)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    return isinstance(module, _MODAL) and float(getattr(module, "p", 1)) > 0


class _Recorder:
    """Reads beside a run: what goes wrong in reading ends the reading, never the run.

    Attributes:
        failure: what went wrong, None else.
    """

    failure: Exception | None = None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = error
            self.close()

    def close(self) -> None:
        """Take all hooks away."""
        raise NotImplementedError


class StepRecorder(_Recorder):
    """Takes the facts of the first training step of a loop, from what the loop does anyway; nothing more runs.

    Call the methods where their names say; after the second optimizer step it holds nothing and hooks nothing. For a plain loop:

        recorder = StepRecorder(model, optimizers=[optimizer])
        for x, y in loader:
            with recorder.forward():
                loss = loss_fn(model(x), y)
            recorder.before_backward(loss)
            loss.backward()
            recorder.after_backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: the module that trains; under DistributedDataParallel the wrapper.
        optimizers: those of the run, to see whether gradients are cleared between their steps.

    Attributes:
        facts: what is known so far, None before `after_backward`.
        failure: what went wrong in reading, which ends it; the loop goes on.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        self.facts: StepFacts | None = None
        self._model = unwrapped(model)
        self._needs_all = isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
        self._watch: ForwardWatch | None = None
        self._forward: ForwardFacts | None = None
        self._pending: StepFacts | None = None
        self._is_done = False
        self._clearing = [_Clearing(optimizer) for optimizer in optimizers]

    def forward(self, inputs: Any = None) -> _Watched:
        """A context for the forward pass; it watches the first time and costs nothing later."""
        return _Watched(self, inputs)

    def before_forward(self, inputs: Any = None) -> None:
        if self._is_done:
            self.late_facts()
        elif self._watch is None and self._forward is None and self.failure is None:
            with self._reading():
                self._watch = ForwardWatch(self._model, inputs)
                self._watch.start()

    def after_forward(self) -> None:
        """`before_backward` calls it too."""
        watch, self._watch = self._watch, None
        if watch is not None and self._forward is None:
            watch.stop()
            with self._reading():
                self._forward = watch.facts()

    def before_backward(self, loss: Tensor) -> None:
        """The first loss counts, where a step has several."""
        self.after_forward()
        if self._is_done or self._pending is not None or self.failure is not None:
            return
        with self._reading():
            if _is_cut(loss):
                self._pending = StepFacts(is_loss_cut=True)
            elif loss.grad_fn is not None:
                self._pending = _before_backward(self._model, loss, _trainable(self._model))

    def after_backward(self) -> None:
        """Read the gradients the backward left; they may be scaled or accumulated, only 0 and absence are judged."""
        if self._is_done or self._pending is None:
            return
        self._is_done = True
        with self._reading():
            self._read_gradients(self._pending)
        self._pending = self._forward = None

    def _read_gradients(self, pending: StepFacts) -> None:
        trainable = _trainable(self._model)
        gradients = dict(zip(trainable, _largest(p.grad for p in trainable.values()), strict=True))
        dropped = frozenset(name for name in pending.dropped_by_backward if gradients[name] is None)
        facts = replace(pending, gradients=gradients, forward=self._forward, dropped_by_backward=dropped)
        self.facts = replace(facts, needs_all_gradients=self._needs_all)

    def late_facts(self) -> StepFacts | None:
        """The facts with what the second optimizer step showed."""
        kept = [tensor for clearing in self._clearing for tensor in clearing.take()]
        if kept and self.facts is not None:
            names = {id(parameter): name for name, parameter in self._model.named_parameters()}
            self.facts = replace(self.facts, not_cleared=tuple(names[id(tensor)] for tensor in kept if id(tensor) in names))
        return self.facts

    def close(self) -> None:
        """Take all hooks away, also when the loop ends early."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        for clearing in self._clearing:
            clearing.close()


class EvaluationRecorder(_Recorder):
    """Takes the facts of one evaluation step, from what it does anyway: modules in training mode, dropout that drops all the same.

        recorder = EvaluationRecorder(model)
        recorder.start()
        output = model(x)
        recorder.stop()

    Args:
        model: the module that is evaluated.

    Attributes:
        facts: None before `stop`.
        failure: what went wrong in reading, which ends it; the evaluation goes on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.facts: StepFacts | None = None
        self._model = unwrapped(model)
        self._watch: ForwardWatch | None = None

    def start(self) -> None:
        if self.facts is None and self._watch is None and self.failure is None:
            with self._reading():
                self._watch = ForwardWatch(self._model, ())
                self._watch.start()

    def stop(self) -> None:
        """The first step counts; later ones are not watched."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()
            with self._reading():
                modules = dict(self._model.named_modules())
                active = tuple(dropout for dropout in watch.facts().dropouts if not modules[dropout.place.module].training)
                self.facts = StepFacts(in_train_mode=_modal(self._model, training=True), evaluation_dropouts=active)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


class _Watched:
    def __init__(self, recorder: StepRecorder, inputs: Any) -> None:
        self._recorder, self._inputs = recorder, inputs

    def __enter__(self) -> None:
        self._recorder.before_forward(self._inputs)

    def __exit__(self, *_: Any) -> None:
        self._recorder.after_forward()


class _Clearing:
    """Sees whether one parameter's gradient is cleared between the first two steps of an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._not_cleared: list[Tensor] = []
        self._optimizer = optimizer
        self._watched: Tensor | None = None
        self._was_cleared = self._has_grown = self._is_over = False
        self._endings: list[Callable[[], Any]] = [around_steps(optimizer, None, self._after_step)]

    def _after_step(self, *_: Any) -> None:
        """A hook may not take itself away while the optimizer goes through its hooks: `take` and `close` do."""
        if self._is_over:
            return
        if self._watched is not None:
            if self._has_grown and not self._was_cleared:
                self._not_cleared = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._is_over = True
            return
        self._watched = _smallest_with_gradient(self._optimizer.param_groups)
        self._is_over = self._watched is None
        if self._watched is not None:
            self._endings.append(self._watched.register_hook(self._before_accumulation).remove)  # type: ignore[no-untyped-call]

    def _before_accumulation(self, _: Tensor) -> None:
        assert self._watched is not None
        grad = self._watched.grad
        self._has_grown = True
        self._was_cleared |= grad is None or not bool(grad.any())

    def take(self) -> list[Tensor]:
        """Parameters whose gradients were found uncleared, once."""
        found, self._not_cleared = self._not_cleared, []
        if self._is_over:
            self.close()
        return found

    def close(self) -> None:
        while self._endings:
            self._endings.pop()()


def _smallest_with_gradient(groups: Iterable[Mapping[str, Any]]) -> Tensor | None:
    held = [p for group in groups for p in group["params"] if p.grad is not None and not p.grad.is_sparse]
    return next((p for p in sorted(held, key=torch.Tensor.numel) if bool(p.grad.any())), None)
