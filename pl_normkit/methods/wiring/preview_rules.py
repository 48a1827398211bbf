"""NK014 to NK016: contested, so off until selected."""

from __future__ import annotations

__all__ = ["bias_before_norm", "initial_loss", "last_step_of_reverse"]

from collections.abc import Iterator

from pl_normkit.findings import Evidence, FixSafety, Place, Severity
from pl_normkit.methods.wiring.find import find_biases_before_norms
from pl_normkit.methods.wiring.fix import freeze_biases_before_norms
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

SOURCE = "derived here; tests/methods/wiring"
_STEP = (Needs.MODEL, Needs.STEP)
_FAR = 2.0


@rule("NK014", "initial-loss", mark=Mark.DERIVED, source=SOURCE, needs=_STEP, preview=True)
def initial_loss(subject: Subject) -> Iterator[Observation]:
    """What it does
    Holds the loss of an untrained model against what a model that knows nothing gives: ln(classes) for cross-entropy, the variance of
    the targets for mean squared error; it speaks up beyond twice that value.

    Why it hurts
    The first steps are spent on taking a confident wrong start back: last layers too large, targets far from 0 without a bias for them.
    A model that was trained before starts elsewhere, so this is a preview.

    Evidence
    The loss, and the value to hold it against.

    Example
    ```python
    import torch
    import torch.nn.functional as F

    loss = F.cross_entropy(20 * torch.randn(64, 10), torch.randint(0, 10, (64,)))
    ```

    Use instead
    ```python
    loss = F.cross_entropy(0.1 * torch.randn(64, 10), torch.randint(0, 10, (64,)))
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here: the entropy of a uniform guess, the error of a constant one. Tested in tests/methods/wiring/test_rules.py.
    """
    seen = subject.step.initial_loss if subject.step is not None else None
    if seen is not None and seen.value > _FAR * seen.expected > 0:
        yield Observation(
            f"{seen.function} starts far above what a model that knows nothing gives",
            [Place("loss")],
            "start the last layer small, and its bias at the targets' mean (or the classes' log frequencies)",
            (Evidence("loss of this step", seen.value, f"about {seen.expected:.3g}"),),
        )


@rule(
    "NK015",
    "bias-before-norm",
    mark=Mark.DERIVED,
    source=SOURCE,
    severity=Severity.NOTE,
    needs=(Needs.MODEL, Needs.GRAPH),
    fix=freeze_biases_before_norms,
    fix_safety=FixSafety.SAFE,
    preview=True,
)
def bias_before_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes biases of layers that a batch or instance norm follows directly: the norm subtracts them again.

    Why it hurts
    A little memory and time, and a parameter that wanders with rounding noise and weight decay. Nothing is learned worse.

    Evidence
    How many elements there are.

    Example
    ```python
    from torch import nn

    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    ```

    Use instead
    ```python
    block = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    ```

    Fix and its safety
    Safe: `freeze_biases_before_norms` takes them out of training; the function and the state_dict stay.

    Source
    Derived here: a norm over the channel removes what is constant in it. Tested in tests/methods/wiring/test_fix.py.
    """
    assert subject.model is not None
    assert subject.graph is not None
    found = find_biases_before_norms(subject.model, subject.graph)
    if found:
        parameters = dict(subject.model.named_parameters())
        count = sum(parameters[bias.parameter].numel() for bias in found)
        yield Observation(
            "the following norm removes these biases",
            [Place(bias.parameter, bias.source) for bias in found],
            "build the layer with bias=False",
            (Evidence("elements", count, "0", is_measured=False),),
        )


@rule("NK016", "last-step-of-reverse", mark=Mark.DERIVED, source=SOURCE, needs=_STEP, preview=True)
def last_step_of_reverse(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds the output of a bidirectional recurrent layer read at its last time step.

    Why it hurts
    There the reverse direction has seen one token: half of the features know only the end of the sequence.

    Evidence
    None beside the line.

    Example
    ```python
    import torch
    from torch import nn

    layer = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
    output, (hidden, _) = layer(torch.randn(4, 5, 8))
    summary = output[:, -1]
    ```

    Use instead
    ```python
    summary = torch.cat((hidden[-2], hidden[-1]), dim=1)  # the last state of each direction
    ```

    Fix and its safety
    Advice only: it changes what is computed.

    Source
    Derived here from the layout of torch's recurrent outputs. Tested in tests/methods/wiring/test_rules.py.
    """
    forward = subject.step.forward if subject.step is not None else None
    places = list(dict.fromkeys(read.place for read in forward.reverse_reads)) if forward is not None else []
    if places:
        yield Observation(
            "the last time step of a bidirectional layer is read: its reverse direction has seen one token there",
            places,
            "take the last hidden state of each direction, or pool over time",
        )
