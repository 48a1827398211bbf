"""What is judged: a model and whatever else of its training run is known, built by one call wherever an audit starts."""

from __future__ import annotations

__all__ = ["Loaders", "Needs", "Subject"]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pl_normkit.wrappers import unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from pl_normkit.first_step import StepFacts
    from pl_normkit.graph import ModelGraph

T = TypeVar("T")


class Needs(StrEnum):
    """What a subject must hold before a rule can judge it."""

    MODEL = "model"
    GRAPH = "graph"
    OPTIMIZERS = "optimizers"
    LOSS = "loss"
    LOADERS = "loaders"
    STEP = "step"


@dataclass(frozen=True)
class Loaders:
    """Where a run's batches come from. Rules read how they are made, and draw batches only where `Subject.measure` allows it.

    Attributes:
        train: iterable of batches as the training loop draws them, None where unknown.
        evaluation: the same for validation.
        transforms: what else may change a batch on its way into the model: a timm `Mixup`, a LightningModule, a data module.
    """

    train: Iterable[Any] | None = None
    evaluation: Iterable[Any] | None = None
    transforms: Sequence[Any] = ()


@dataclass(frozen=True)
class Subject:
    """What is judged. Every part is optional; a rule runs when the parts it needs are there. `dataclasses.replace` adds parts.

    Attributes:
        model: the module, as the user built it; one that is compiled or wrapped for several devices stands for the original.
        root: the module that reported paths are relative to, where `model` is a part of it (a LightningModule's network).
        example_inputs: what `model` is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        optimizers: the optimizers of the run.
        loss: the scalar loss of a real step, with its autograd graph.
        loss_call: how `loss` was called, so that rules may call it again with other arguments.
        loaders: the data of the run.
        step: what one training step showed of the wiring.
        measure: whether rules may run the model and draw batches to measure; never True for a model on the meta device.
        graph: the traced model; None where there was nothing to trace, where tracing failed, or before it was tried.
        trace_failure: why tracing failed, "" where it did not; it is not tried again.
    """

    model: nn.Module | None = None
    root: nn.Module | None = None
    example_inputs: Any = None
    optimizers: Sequence[Optimizer] = ()
    loss: Tensor | None = None
    loss_call: Any = None
    loaders: Loaders | None = None
    step: StepFacts | None = None
    measure: bool = True
    graph: ModelGraph | None = None
    trace_failure: str = ""
    _memo: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.model is not None:
            object.__setattr__(self, "model", unwrapped(self.model))
            object.__setattr__(self, "measure", self.measure and not _is_on_meta(self.model))

    def has(self, need: Needs) -> bool:
        value = getattr(self, need.value)
        return value is not None and not (isinstance(value, Sequence) and len(value) == 0)

    def once(self, probe: Callable[[Subject], T]) -> T:
        """`probe(self)`, run at most once per subject however many rules ask for it."""
        if probe not in self._memo:
            self._memo[probe] = probe(self)
        return cast(T, self._memo[probe])


def _is_on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
