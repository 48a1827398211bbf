"""NK001 to NK004, NK009 and NK010: what the gradients and the loss of one step show. The other rules are imported to register."""

from __future__ import annotations

__all__ = [
    "activation_before_loss",
    "bias_before_norm",
    "dropout_active_in_evaluation",
    "gradient_always_zero",
    "gradients_not_cleared",
    "initial_loss",
    "input_ignored",
    "input_out_of_range",
    "last_step_of_reverse",
    "loss_broadcasts",
    "module_in_eval_mode",
    "norm_of_one_value",
    "parameter_not_updated",
    "parameter_without_gradient",
    "samples_mixed",
    "statistics_of_frozen_norm",
]

from collections.abc import Iterator

from pl_normkit.findings import Evidence, FixSafety, Place, Severity
from pl_normkit.first_step import StackedActivation, StepFacts
from pl_normkit.methods.wiring.input_rules import input_ignored, input_out_of_range, samples_mixed
from pl_normkit.methods.wiring.mode_rules import (
    dropout_active_in_evaluation,
    module_in_eval_mode,
    norm_of_one_value,
    statistics_of_frozen_norm,
)
from pl_normkit.methods.wiring.preview_rules import bias_before_norm, initial_loss, last_step_of_reverse
from pl_normkit.methods.wiring.unlearned import not_updated, without_gradient
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

SOURCE = "derived here from how torch computes gradients; tests/methods/wiring"
_STEP = (Needs.MODEL, Needs.STEP)


def _facts(subject: Subject) -> StepFacts:
    assert subject.step is not None  # Needs.STEP
    return subject.step


@rule("NK001", "parameter-without-gradient", mark=Mark.DERIVED, source=SOURCE, needs=_STEP, explains=["NK208"])
def parameter_without_gradient(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds trainable parameters that the loss of a step sends no gradient to: no code of the model reads them, the gradient is cut on its
    way (`detach()`, `.data`, `no_grad`, `argmax()`, `item()`; the finding names the line), their result is thrown away, or forward leaves
    their module out in every step, by a slice (`for block in self.blocks[:2]`), a loop or a condition that hangs on constants alone.
    Under DistributedDataParallel without `find_unused_parameters` it names every parameter without a gradient.

    Silent for what may get its gradient in another step: modules that the code reads under some condition (heads of several tasks,
    experts, dropped blocks), outputs that this loss does not use, the networks of an optimizer whose turn it is not, teachers beside
    a student of the same shape, parameters that the forward pass writes itself.

    Why it hurts
    They stay at their random start while the optimizer carries them, and the network is smaller than it looks. DistributedDataParallel
    stops with an error in the second step.

    Evidence
    The share of the trainable elements.

    Example
    ```python
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 10)

        def forward(self, x):
            return self.last(self.first(x).relu())  # the norm is never read
    ```

    Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 10)

        def forward(self, x):
            return self.last(self.norm(self.first(x)).relu())
    ```

    Fix and its safety
    Advice only: whether the layer or its use is missing is the author's to say.

    Source
    Derived here: `torch.autograd.grad` gives None exactly where the graph has no path. Tested in tests/methods/wiring/test_rules.py.
    """
    yield from without_gradient(subject, _facts(subject))


@rule("NK002", "gradient-always-zero", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def gradient_always_zero(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds parameters whose gradient is exactly 0 in every element because something behind them lets nothing through: a layer of dead
    ReLUs, a saturated sigmoid, tanh or softmax, rounding, a softmax over a single value, a mask of zeros.

    Silent where a zero-initialised scale or head behind them explains it, and where a small layer may be dead by the chance of one batch
    (fewer than 32 units, and neither a shift nor the signs of its weights hold it there).

    Why it hurts
    Nothing will ever move them: the function is flat for every sample.

    Evidence
    The share of dead or saturated units.

    Example
    ```python
    from torch import nn

    net = nn.Sequential(nn.Linear(32, 1), nn.Softmax(dim=1))  # always 1
    ```

    Use instead
    ```python
    net = nn.Linear(32, 1)  # with binary_cross_entropy_with_logits
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here from the derivatives of these functions. Tested in tests/methods/wiring/test_rules.py.
    """
    step = _facts(subject)
    left = {name for name, size in step.gradients.items() if size == 0.0} - step.explained
    for seen in step.silenced:
        names = [name for name in step.gradients if name in left & seen.parameters]
        left -= set(names)
        if names and not (seen.op.startswith("a mask") and _drops_at_random(step)):
            yield Observation(
                f"the gradient is exactly 0: {seen.op} behind these parameters lets nothing through",
                [Place(name) for name in names],
                _advice_for(seen.op),
                (Evidence("share of its units without a gradient", 1.0, "below 1"),),
                cause=seen.op,
            )


def _drops_at_random(step: StepFacts) -> bool:
    """Whether the zeros of a mask may be the chance of this step: a branch that stochastic depth dropped."""
    return step.forward is not None and (step.forward.draws_numbers or bool(step.forward.dropouts))


def _advice_for(op: str) -> str:
    if "over one value" in op:
        return "return the score itself and use binary_cross_entropy_with_logits, or give the layer one output for each class"
    if op.endswith("()"):
        return f"take {op} out of the path of the gradient, or pass it straight through: x + ({op[:-2]}(x) - x).detach()"
    if op.startswith("a mask"):
        return "check the mask, and whether it is inverted"
    return "initialise the layer before it so that its outputs spread around 0, or scale its inputs down"


@rule(
    "NK003",
    "parameter-not-updated",
    mark=Mark.DERIVED,
    source=SOURCE,
    needs=(*_STEP, Needs.OPTIMIZERS),
    explains=["NK204"],
)
def parameter_not_updated(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds parameters that get a gradient and will not move: the learning rate of their group is 0, or the optimizer holds other tensors
    in their place (those from before `deepcopy`, or from before a layer was replaced). NK204 then says nothing of these parameters.

    A warm-up that starts at 0 is silent: schedulers leave `initial_lr` in the group.

    Why it hurts
    The loss is computed, the backward runs, and nothing is learned.

    Evidence
    The share of the trainable elements.

    Example
    ```python
    import copy
    import torch
    from torch import nn

    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = copy.deepcopy(model)  # the optimizer moves the old one
    ```

    Use instead
    ```python
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here from how torch.optim works. Tested in tests/methods/wiring/test_rules.py.
    """
    yield from not_updated(subject, _facts(subject))


@rule("NK004", "gradients-not-cleared", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def gradients_not_cleared(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an optimizer whose second step used the first step's gradients again, because nothing cleared them between.

    Accumulation is silent: there the gradients of several backwards make one step. Seen by `ModelAudit` and `StepRecorder` alone, since
    it takes two steps.

    Why it hurts
    Every step goes along the sum of all gradients so far: it acts like a momentum of 1 that nobody set.

    Evidence
    None beside the names.

    Example
    ```python
    def step(model, optimizer, x, y):
        (model(x) - y).square().mean().backward()
        optimizer.step()
    ```

    Use instead
    ```python
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here from how torch accumulates gradients. Tested in tests/first_step/test_recorder.py.
    """
    names = _facts(subject).not_cleared
    if names:
        yield Observation(
            "the second optimizer step used the first step's gradients again",
            [Place(name) for name in names],
            "call optimizer.zero_grad() before each backward that starts a new step",
        )


@rule("NK009", "activation-before-loss", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def activation_before_loss(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds a softmax, log_softmax or sigmoid whose result goes into a loss that applies one itself (cross_entropy,
    binary_cross_entropy_with_logits), or a softmax in front of nll_loss or kl_div, which expect log_softmax. For kl_div also scores in the
    place of log-probabilities, and a target that holds scores, or logarithms without `log_target=True`, or the reverse.

    Why it hurts
    The second squashing sees numbers between 0 and 1: with 10 classes softmax before cross_entropy cannot bring the loss below 1.46, and
    the gradients are small from the start. The run learns, slowly and badly. A repeated log_softmax changes nothing and is a note.

    Evidence
    None beside the two functions.

    Example
    ```python
    import torch
    import torch.nn.functional as F

    scores, target = torch.randn(4, 10), torch.randint(0, 10, (4,))
    loss = F.cross_entropy(scores.softmax(-1), target)
    ```

    Use instead
    ```python
    loss = F.cross_entropy(scores, target)
    ```

    Fix and its safety
    Advice only: the model may be used elsewhere with its activation.

    Source
    Derived here from the definitions of the loss functions. Tested in tests/methods/wiring/test_rules.py.
    """
    for seen in _facts(subject).stacked:
        if seen.first in _TARGETS:
            message, advice = _TARGETS[seen.first]
            yield Observation(message, [Place("loss")], advice, cause=seen.first)
            continue
        repeats = seen.first == seen.second == "log_softmax"
        loss = seen.loss or "the loss"
        verb = f"{loss}, which expects log_softmax" if seen.second in _OF_LOGARITHMS else f"{loss}, which applies {_applied(seen)} itself"
        message = f"{seen.first} in front of {verb}"
        yield Observation(
            f"{message}; it changes nothing here" if repeats else message,
            [_place_of(subject, seen.first)],
            f"use log_softmax instead of {seen.first}"
            if seen.second in _OF_LOGARITHMS
            else f"drop the {seen.first} and give the loss the scores",
            severity=Severity.NOTE if repeats else None,
            cause=f"{seen.first} {seen.second}",
        )


_OF_LOGARITHMS = ("nll_loss", "kl_div")
_TARGETS = {
    "target of scores": ("the target of kl_div holds scores, not probabilities", "apply softmax to the target"),
    "target of logarithms": (
        "the target of kl_div holds logarithms, not probabilities",
        "pass log_target=True, or give it the probabilities",
    ),
    "target of probabilities": (
        "the target of kl_div with log_target=True holds probabilities",
        "leave log_target out, or give it the target's log_softmax",
    ),
}


def _applied(seen: StackedActivation) -> str:
    return {"binary_cross_entropy_with_logits": "a sigmoid", "soft_margin_loss": "a sigmoid"}.get(seen.second, f"a {seen.second}")


def _place_of(subject: Subject, op: str) -> Place:
    """The last such operation of the traced network, Place("loss") where it cannot be told."""
    nodes = [] if subject.graph is None else [node for node in subject.graph.nodes if node.op.strip("_") == op]
    return Place(nodes[-1].module, nodes[-1].source) if nodes else Place("loss")


@rule("NK010", "loss-broadcasts", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def loss_broadcasts(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds two tensors in the loss whose shapes broadcast to more elements than either has: (N, 1) against (N,) compares every sample with
    every target.

    Silent where the operand was unsqueezed or transposed for it (pairwise losses), and where the sizes differ (quantiles, supports).

    Why it hurts
    The loss falls to the targets' variance and stays: the best answer to all targets at once is their mean.

    Evidence
    The elements compared, over those there are.

    Example
    ```python
    import torch

    output, target = torch.randn(16, 1), torch.randn(16)
    loss = ((output - target) ** 2).mean()  # of (16, 16) differences
    ```

    Use instead
    ```python
    loss = ((output.squeeze(1) - target) ** 2).mean()
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here from torch's broadcasting rules. Tested in tests/first_step/test_broadcasts.py.
    """
    for seen in _facts(subject).broadcasts:
        sizes = [max(1, _numel(shape)) for shape in (seen.left, seen.right)]
        yield Observation(
            f"{seen.op} broadcasts {seen.left} and {seen.right} to {seen.result}",
            [Place("loss")],
            "give both the same shape: squeeze the output's last dimension, or unsqueeze the target's",
            (Evidence("elements compared over those there are", _numel(seen.result) / max(sizes), "1", is_measured=False),),
            fix_safety=FixSafety.DISPLAY,
            cause=f"{seen.op} {seen.left} {seen.right}",
        )


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
