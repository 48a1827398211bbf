"""NK901 to NK905: what a depth profile says is wrong. NK906 to NK914, on where the norms stand, come along."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Iterator

import torch
from torch import nn

from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.methods.depth_profile import placement_rules as placement_rules
from pl_normkit.methods.depth_profile import published_rules as published_rules
from pl_normkit.methods.depth_profile.profile import AdditionProfile, gradient_ratio
from pl_normkit.methods.depth_profile.stuck import CUT
from pl_normkit.methods.depth_profile.subjects import probe_of, profile_of
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

FLOAT16_LARGEST = 65504.0
IDENTITY = 1e-3
OFF_EXPONENTIAL = 0.5


def _places(rows: list[AdditionProfile]) -> list[Place]:
    return [Place(row.module, row.source) for row in rows]


@rule(
    "NK901",
    "stuck-gradients",
    mark=Mark.MEASURED,
    source="measured here: docs/depth_profile.md; direction: arXiv 2110.09456",
    needs=(Needs.MODEL, Needs.GRAPH),
    preview=True,
)
def stuck_gradients(subject: Subject) -> Iterator[Observation]:
    """What it does
    Compares the gradients that the weights of the first and of the last quarter of the blocks hold now. Blocks of one width
    and one list only: an encoder is not held against its decoder.

    Why it hurts
    When the first blocks get hardly any gradient, the network trains its last blocks on features that do not change.

    Evidence
    Root mean square gradient of the weights of a block, mean over the first quarter of the blocks over the mean over the last.

    Example
    ```python
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=False)
    model = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)  # norm after the addition, trained at a high rate without warm-up
    ```

    Use instead
    ```python
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=True)
    model = nn.TransformerEncoder(layer, 24, norm=nn.LayerNorm(64), enable_nested_tensor=False)
    ```

    Fix and its safety
    None here: lower the learning rate, warm it up, or build the blocks with the norm before the branch.

    Source
    Measured on language models of 12 blocks: runs that got stuck had a rolling median below 0.02 after 30 steps, healthy ones at least
    0.3. One reading is less than a median, so this rule is a preview; the callback DepthProfile follows the run. The direction, more
    gradient in the first blocks under pre-norm, is published: arXiv 2110.09456.
    """
    probe = subject.once(probe_of)
    if probe is None or not probe.is_one_stack:
        return
    ratio = gradient_ratio(probe.live_gradients())
    if ratio is not None and ratio < CUT:
        first = probe.additions[0]
        yield Observation(
            message="The first quarter of the blocks gets hardly any gradient beside the last quarter",
            places=[Place(first.module, first.source)],
            evidence=[Evidence("gradient of the first quarter of the blocks over the last", ratio, f"at least {CUT}")],
            advice="Lower the learning rate or warm it up over more steps; in new models put the norm before the branch",
        )


@rule(
    "NK902",
    "exponential-growth",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/depth_profile/test_rules.py; theory: arXiv 2502.05795, Lemma 3.2",
    needs=(Needs.MODEL, Needs.GRAPH),
    preview=True,
)
def exponential_growth(subject: Subject) -> Iterator[Observation]:
    """What it does
    Fits a line and an exponential to the variance of the residual stream over depth, and reports an exponential that fits better, to
    within 0.5 in logarithms, and grows by more than e^3.

    Why it hurts
    Where the variance grows by a factor a block, each later block adds little to what is there, and half precision overflows.

    Evidence
    The factor from the first addition to the last, and the errors of both fits in logarithms.

    Example
    ```python
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x):
            return x + 2 * self.linear(x)  # no norm: the branch grows with the stream
    ```

    Use instead
    ```python
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.linear = nn.Linear(width, width)

        def forward(self, x):
            return x + self.linear(self.norm(x))
    ```

    Fix and its safety
    None: normalize the input of each branch, or scale the branches' last weights by 1 / sqrt(2L) at initialization.

    Source
    Derived: both cuts are ours. arXiv 2502.05795 bounds the variance of pre-norm networks between linear and exponential growth
    (Lemma 3.2). In our runs on small language models the exponential never fitted better, so this rule is a preview.
    """
    profile = subject.once(profile_of)
    growth = None if profile is None else profile.growth
    if profile is None or growth is None or not growth.is_exponential or growth.rate * len(profile.stream) <= 3.0:
        return
    if growth.exponential_error > OFF_EXPONENTIAL:  # one step from a small start, or another stack, is no exponential
        return
    yield Observation(
        message="The variance of the residual stream grows exponentially with depth",
        places=_places([profile.stream[-1]]),
        evidence=[
            Evidence("variance after the last addition over the first", profile.stream[-1].variance / profile.stream[0].variance),
            Evidence("error of the exponential fit, in logarithms", growth.exponential_error),
            Evidence("error of the linear fit, in logarithms", growth.linear_error),
        ],
        advice="Normalize the input of each branch, or initialize its last weights smaller, by 1 / sqrt(number of branches)",
    )


@rule(
    "NK903",
    "dead-deep-layers",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/depth_profile/test_rules.py",
    needs=(Needs.MODEL, Needs.GRAPH),
    severity=Severity.NOTE,
    preview=True,
)
def dead_deep_layers(subject: Subject) -> Iterator[Observation]:
    """What it does
    In a trained model, finds deep branches that change the residual stream by less than a thousandth of its standard deviation, where more
    than a third of the deeper half is such.

    Why it hurts
    These layers cost time and memory and do nothing.

    Evidence
    The share of such branches in the deeper half.

    Example
    ```python
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    for block in model.layers[2:]:
        nn.init.zeros_(block.linear2.weight)
        nn.init.zeros_(block.self_attn.out_proj.weight)
    ```

    Use instead
    ```python
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ```

    Fix and its safety
    None: measure_depth_profile(model, batch, loss_fn, skip=True) says what each branch is worth on your data.

    Source
    Derived. A model counts as trained when the scale of one of its norms is no longer the same for all channels. Our measurements found no
    relation between the share of layers that can be skipped and the loss of small models, so this rule is a preview.
    """
    profile = subject.once(profile_of)
    if profile is None or subject.model is None or subject.graph is None or not placement_rules.is_trained(subject):
        return
    deep = profile.stream[len(profile.stream) // 2 :]
    dead = [row for row in deep if math.sqrt(row.ratio) < IDENTITY]
    if len(dead) > len(deep) / 3:
        yield Observation(
            message="Deep residual branches leave the stream as it is",
            places=_places(dead),
            evidence=[Evidence("share of such branches in the deeper half", len(dead) / len(deep), "at most a third")],
            advice="See what each branch is worth with measure_depth_profile(..., skip=True), then train a shallower model",
        )


@rule(
    "NK904",
    "massive-activations",
    mark=Mark.PUBLISHED,
    source="arXiv 2402.17762, as public summaries quote its definition",
    needs=(Needs.MODEL, Needs.GRAPH),
    severity=Severity.NOTE,
    preview=True,
)
def massive_activations(subject: Subject) -> Iterator[Observation]:
    """What it does
    Lists the tokens and channels of the residual stream whose magnitude is above 100 and at least 1000 times the median of that state.

    Why it hurts
    It need not: large language models have such activations at a few places and use them as biases. They matter to quantization to 8 bits
    and to float16, and they dominate what is averaged over channels.

    Evidence
    The largest magnitude over the median.

    Example
    ```python
    from transformers import AutoModelForCausalLM  # a trained Llama 2 7B shows them at its first token

    load = AutoModelForCausalLM.from_pretrained
    ```

    Use instead
    ```python
    import torch

    dtype = torch.bfloat16  # has the range of float32
    ```

    Fix and its safety
    None: such activations are part of how the model computes; keep them in range instead.

    Source
    Published: the definition is that of arXiv 2402.17762, as public summaries quote it. Nothing of the kind was seen in our small runs, so
    this rule is a preview.
    """
    profile = subject.once(profile_of)
    rows = [row for row in profile.additions if row.massive] if profile is not None else []
    if rows:
        top = max((row for row in rows), key=lambda row: row.massive[0].value)
        item = top.massive[0]
        yield Observation(
            message=f"The residual stream has massive activations, the largest at position {item.position} in channel {item.channel}",
            places=_places(rows),
            evidence=[Evidence("largest magnitude", item.value), Evidence("median magnitude of the same state", top.median)],
            advice="Keep the stream in float32 or bfloat16, and leave these channels out of 8-bit quantization",
        )


@rule(
    "NK905",
    "stream-near-float16-limit",
    mark=Mark.DERIVED,
    source="derived here: float16 has 65504 as its largest number",
    needs=(Needs.MODEL, Needs.GRAPH),
)
def stream_near_float16_limit(subject: Subject) -> Iterator[Observation]:
    """What it does
    In a network that computes in float16, finds residual additions whose largest magnitude is above a quarter of 65504.

    Why it hurts
    The stream sums up every branch; above 65504 it is infinite, and the next norm turns that into NaN.

    Evidence
    The largest magnitude in the stream, on the inputs that were given.

    Example
    ```python
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).half()
    ```

    Use instead
    ```python
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(torch.bfloat16)
    ```

    Fix and its safety
    None: compute in bfloat16, or keep the stream in float32.

    Source
    Derived from the range of float16; the factor of 4 leaves room for inputs that were not measured.
    """
    if not subject.measure or subject.model is None or not _computes_in_float16(subject.model):
        return
    profile = subject.once(profile_of)
    rows = [row for row in profile.additions if row.dtype == "float16" and not row.largest <= FLOAT16_LARGEST / 4] if profile else []
    if rows:
        largest = max((row.largest for row in rows), key=lambda value: math.inf if math.isnan(value) else value)
        is_over = not math.isfinite(largest)
        yield Observation(
            message="The residual stream has left the range of float16" if is_over else "The residual stream nears the limit of float16",
            places=_places(rows),
            evidence=[Evidence("largest magnitude in the stream", largest, f"at most {FLOAT16_LARGEST / 4:g}")],
            advice="Compute in bfloat16, or keep the residual stream in float32",
            severity=Severity.ERROR if is_over else None,
        )


def _computes_in_float16(model: nn.Module) -> bool:
    devices = {parameter.device.type for parameter in model.parameters()}
    autocast = any(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16 for kind in devices)
    return autocast or any(parameter.dtype is torch.float16 for parameter in model.parameters())
