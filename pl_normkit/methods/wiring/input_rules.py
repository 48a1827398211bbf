"""NK011 to NK013: what becomes of the inputs."""

from __future__ import annotations

__all__ = ["input_ignored", "input_out_of_range", "samples_mixed"]

import inspect
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from pl_normkit.findings import Evidence, Place
from pl_normkit.first_step import FirstInput
from pl_normkit.graph import call_arguments
from pl_normkit.methods.wiring.mode_rules import eval_run
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

SOURCE = "derived here, measured on the step's own inputs; tests/methods/wiring"
_STEP = (Needs.MODEL, Needs.STEP)
_ENOUGH, _FLAT_PIXELS, _PATCH_PIXELS = 32, 64, 27  # a patch of 3 x 3 colours


@rule("NK011", "samples-mixed", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def samples_mixed(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds models whose eval output for one sample changes with another sample's input, where the operation that mixes them first is one
    that nobody lets do so on purpose: a recurrent layer or attention without `batch_first`, a view after a permutation, a softmax over
    dimension 0.

    Silent for similarities, graphs over the rows and statistics of the batch, and where the shapes leave open which dimension is the
    batch.

    Why it hurts
    The prediction depends on the company a sample has in its batch; the sequence is never read as one.

    Evidence
    Measured by changing one sample and watching the others.

    Example
    ```python
    from torch import nn

    attention = nn.MultiheadAttention(32, 4)  # fed with (batch, time, features)
    ```

    Use instead
    ```python
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here. Tested in tests/methods/wiring/test_measure.py.
    """
    mixing = subject.once(eval_run).mixing
    if mixing is not None:
        yield Observation(f"the output of one sample depends on another's input: {mixing.why}", [mixing.place], mixing.advice)


@rule("NK012", "input-ignored", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def input_ignored(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds tensor inputs that no output depends on, in training mode or in eval mode: a mask, lengths, a condition.

    An input counts as read when an operation on it reaches an output, whatever the values (behind a zero-initialised layer, say), when
    Python reads its values, or when other values of it change an output.

    Why it hurts
    The model trains on padding as if it were data, or without the condition that it will be asked to follow.

    Evidence
    Measured by changing the input.

    Example
    ```python
    def forward(self, ids, mask):
        return self.last(self.table(ids).mean(1))
    ```

    Use instead
    ```python
    def forward(self, ids, mask):
        weight = mask.unsqueeze(-1).float()
        return self.last((self.table(ids) * weight).sum(1) / weight.sum(1).clamp_min(1))
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here. Tested in tests/methods/wiring/test_measure.py.
    """
    model = subject.model
    assert model is not None
    ignored = subject.once(eval_run).ignored
    if ignored:
        names = _names_of_inputs(model, subject.example_inputs)
        told = ", ".join(names[position] if position < len(names) else str(position) for position in ignored)
        yield Observation(
            f"no output depends on the input {told}", [Place("")], "use it in forward, or leave it out of the call", cause=told
        )


def _names_of_inputs(model: nn.Module, inputs: Any) -> list[str]:
    """A name for every tensor of the inputs, in order: the parameter of forward, and the way into a container."""
    args, kwargs = call_arguments(inputs)
    parameters = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind is not p.VAR_POSITIONAL]
    given = [(parameters[index] if index < len(parameters) else f"argument {index}", value) for index, value in enumerate(args)]
    return [name for start, value in (*given, *kwargs.items()) for name in _leaf_names(start, value)]


def _leaf_names(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield name
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaf_names(f"{name}[{key!r}]", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaf_names(f"{name}[{index}]", inner)


@rule("NK013", "input-out-of-range", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def input_out_of_range(subject: Subject) -> Iterator[Observation]:
    """What it does
    Looks at the values that reach the first layer with weights, after whatever scaling the model does itself: images from 0 to 255,
    a mean more than 20 standard deviations from 0 (of the whole, or of one feature), integer codes cast to float.

    Why it hurts
    Initialisations are made for inputs around 0 with variance 1. Large inputs make the first steps huge; a large mean hides the signal
    in a constant; codes as numbers say that class 7 lies between 6 and 8.

    Evidence
    Range, mean and standard deviation of the values.

    Example
    ```python
    import torch

    image = torch.randint(0, 256, (1, 3, 8, 8)).float()
    ```

    Use instead
    ```python
    image = (image / 255 - 0.5) / 0.25  # or the data set's own mean and standard deviation
    ```

    Fix and its safety
    Advice only: scaling belongs into the data pipeline.

    Source
    Derived here; the limits are chosen so that scaled data cannot reach them. Tested in tests/methods/wiring/test_rules.py.
    """
    step = subject.step
    assert step is not None
    for seen in step.forward.first_inputs if step.forward is not None else ():
        judged = _judge(seen)
        if judged is not None:
            message, advice, evidence = judged
            yield Observation(message, [seen.place], advice, evidence)
            return  # the layers beside it get the same


def _judge(seen: FirstInput) -> tuple[str, str, tuple[Evidence, ...]] | None:
    if _is_raw_image(seen):
        return "pixels from 0 to 255 reach the first layer", "divide by 255 and normalize", (_value("largest value", seen.high, "about 1"),)
    if seen.is_cast_from_integers and max(abs(seen.low), abs(seen.high)) >= 50:
        advice = "look codes up in nn.Embedding, or scale counts to about -1..1"
        return "integers reach the first layer as numbers", advice, (_value("largest value", seen.high, "about 1"),)
    distance = abs(seen.mean) / seen.std if seen.std > 0 and prod(seen.shape) >= _ENOUGH else 0.0
    if distance > 20:
        return "the inputs lie far from 0", "subtract their mean", (_value("mean over standard deviation", distance, "below 20"),)
    if seen.far_column is not None and seen.far_column[2] > 0:
        index, mean, std = seen.far_column
        if abs(mean) > max(10.0, 20 * std):
            return (
                f"feature {index} lies far from 0",
                "subtract its mean",
                (_value("mean over standard deviation", abs(mean) / std, "below 20"),),
            )
    return None


def _value(what: str, value: float, expected: str) -> Evidence:
    return Evidence(what, value, expected)


def _is_raw_image(seen: FirstInput) -> bool:
    rank = len(seen.shape)
    if (rank == 2 and seen.shape[1] >= _FLAT_PIXELS) or (rank == 3 and seen.shape[2] >= _PATCH_PIXELS):
        return seen.low == 0 and 200 <= seen.high <= 255 and seen.is_whole
    has_channels = (rank == 4 and seen.shape[1] in (1, 3, 4)) or (rank == 5 and {seen.shape[1], seen.shape[2]} & {1, 3, 4})
    return bool(has_channels) and seen.low >= 0 and 128 <= seen.high <= 255.5 and (seen.is_whole or seen.high > 200)
