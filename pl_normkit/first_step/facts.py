"""What a training step showed: plain data, and the sums over it that reports tell."""

from __future__ import annotations

__all__ = [
    "Broadcast",
    "Cut",
    "Dropout",
    "FirstInput",
    "ForwardFacts",
    "InitialLoss",
    "NormCall",
    "ReverseRead",
    "Silenced",
    "StackedActivation",
    "StepFacts",
]

from collections.abc import Mapping
from dataclasses import dataclass, field

from pl_normkit.findings import Place


@dataclass(frozen=True)
class Cut:
    """An operation whose result carries no gradient although its input could.

    Attributes:
        how: what cut it, as a user writes it: "detach()", "torch.no_grad()", "argmax()", "item()".
        place: the module that ran it and the user's line.
        parameters: names of the parameters whose gradient ends there.
    """

    how: str
    place: Place
    parameters: frozenset[str]


@dataclass(frozen=True)
class NormCall:
    """One call of a normalization.

    Attributes:
        place: the module that ran it and the line.
        kind: "batch", "group", "layer" or "instance".
        values: how many values each statistic was taken over in this step.
        values_per_sample: the same for a batch of one.
        input_has_gradient: whether anything before it is trained.
        is_training: whether it used the batch's statistics.
    """

    place: Place
    kind: str
    values: int
    values_per_sample: int
    input_has_gradient: bool
    is_training: bool


@dataclass(frozen=True)
class FirstInput:
    """Values that reached a first weight layer, after whatever scaling the model does itself; per column for rows of features."""

    place: Place
    shape: tuple[int, ...]
    low: float
    high: float
    mean: float
    std: float
    is_whole: bool
    far_column: tuple[int, float, float] | None = None
    is_cast_from_integers: bool = False


@dataclass(frozen=True)
class Dropout:
    """A dropout that dropped."""

    place: Place
    op: str
    probability: float


@dataclass(frozen=True)
class ReverseRead:
    """The last time step of a bidirectional recurrent layer's output was read."""

    place: Place


@dataclass(frozen=True)
class ForwardFacts:
    """What one forward pass showed.

    Attributes:
        called: paths of the modules that were called.
        read: parameters that an operation used.
        reached: parameters that the model's outputs, or tensors it left in its attributes, carry gradients to.
        written: parameters that the forward pass itself wrote to.
        cuts: where gradients ended, in the order they ran.
        norms: calls of normalizations.
        first_inputs: what reached the first weight layers.
        dropouts: dropouts that were active.
        silent_dropouts: modules that called a dropout function with a probability and `training=False`, by path.
        reverse_reads: last steps read of reverse directions.
        inputs_used: which of the input's tensors (by position among the leaves) some output depends on.
        draws_numbers: whether single random numbers were drawn, of Python, numpy or torch: they may decide what is computed.
    """

    called: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    reached: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    cuts: tuple[Cut, ...] = ()
    norms: tuple[NormCall, ...] = ()
    first_inputs: tuple[FirstInput, ...] = ()
    dropouts: tuple[Dropout, ...] = ()
    silent_dropouts: tuple[str, ...] = ()
    reverse_reads: tuple[ReverseRead, ...] = ()
    inputs_used: frozenset[int] = frozenset()
    draws_numbers: bool = False


@dataclass(frozen=True)
class StackedActivation:
    """`first` feeds `second` with nothing but views between; `loss` is the function that applies `second`, "" where none was seen.

    For a `kl_div` (`second`) `first` is what it was given in the place of log-probabilities, or "target of ..." for a wrong target.
    """

    first: str
    second: str
    loss: str = ""


@dataclass(frozen=True)
class Broadcast:
    """Two tensors of the loss that broadcast to more elements than either has."""

    op: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    result: tuple[int, ...]


@dataclass(frozen=True)
class Silenced:
    """An operation that let no gradient through for any of its elements.

    Attributes:
        op: "relu", "sigmoid", ...
        units: how many units (channels) it has.
        parameters: names of the parameters before it.
    """

    op: str
    units: int
    parameters: frozenset[str]


@dataclass(frozen=True)
class InitialLoss:
    """What the loss function saw: for cross-entropy the number of classes, for a regression the target's variance."""

    function: str
    value: float
    expected: float


@dataclass(frozen=True)
class StepFacts:
    """What a training step showed, before its optimizer step.

    Attributes:
        gradients: largest absolute gradient of every trainable parameter, None where there is none.
        explained: parameters whose zero gradient follows from an all-zero parameter behind them (zero-initialised scales and heads).
        stacked: activations in front of one another.
        broadcasts: what broadcast in the loss.
        silenced: operations that let no gradient through.
        dead_shares: share of dead units of every ReLU, by the name of a parameter of the layer before it.
        initial_loss: what to hold the first loss against, None where the function is not known.
        forward: what the forward pass showed, None where it was not watched.
        dropped_by_backward: parameters without a gradient although the loss's graph leads to them: a function of the user's own returns
            None for them.
        in_eval_mode: modules with dropout or norms in eval mode during the step, by path.
        needs_all_gradients: the model runs under DistributedDataParallel without `find_unused_parameters`.
        not_cleared: parameters whose gradient of the second optimizer step contained the first's.
        in_train_mode: modules with dropout or norms in training mode during an evaluation, by path.
        evaluation_dropouts: dropouts that were active during an evaluation although their module was in eval mode.
        is_loss_cut: the loss is a tensor made anew (of `loss.item()`, say), so that its backward reaches nothing.
    """

    gradients: Mapping[str, float | None] = field(default_factory=dict)
    explained: frozenset[str] = frozenset()
    stacked: tuple[StackedActivation, ...] = ()
    broadcasts: tuple[Broadcast, ...] = ()
    silenced: tuple[Silenced, ...] = ()
    dead_shares: Mapping[str, float] = field(default_factory=dict)
    initial_loss: InitialLoss | None = None
    forward: ForwardFacts | None = None
    dropped_by_backward: frozenset[str] = frozenset()
    in_eval_mode: tuple[str, ...] = ()
    needs_all_gradients: bool = False
    not_cleared: tuple[str, ...] = ()
    in_train_mode: tuple[str, ...] = ()
    evaluation_dropouts: tuple[Dropout, ...] = ()
    is_loss_cut: bool = False

    def numbers(self) -> dict[str, float]:
        """For a report: how many parameters got no gradient, and the mean share of dead units over the ReLUs."""
        found = {"unused_parameters": float(sum(size is None for size in self.gradients.values()))}
        if self.dead_shares:
            found["dead_share"] = sum(self.dead_shares.values()) / len(self.dead_shares)
        return found

    def curves(self) -> dict[str, dict[str, float]]:
        """For a report: the share of dead units from the first ReLU to the last, where any is dead."""
        return {"Share of dead units": dict(reversed(list(self.dead_shares.items())))} if any(self.dead_shares.values()) else {}
