"""NK906 to NK908: what is wrong with where the norms stand, at the start of a run."""

from __future__ import annotations

__all__ = ["attention_without_norm", "deepnorm_constant", "is_trained", "layers_of", "places_of", "post_norm_without_warmup"]

import math
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.methods.depth_profile.placement import Layer, attends_without_norm, gain_of, read_layers
from pl_normkit.methods.depth_profile.subjects import profile_of
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

OFF_ALPHA, OFF_BETA = 0.05, 0.2
HIGH_RATE, SCALED_RATE = 1e-3, 1e-2
"""Peak learning rates above which post-norm runs got stuck without warm-up: plain, and with small branches."""


def layers_of(subject: Subject) -> list[Layer]:
    """The residual additions of the main stream."""
    return [] if subject.graph is None else read_layers(subject.graph)


@rule(
    "NK906",
    "deepnorm-wrong-constant",
    mark=Mark.PUBLISHED,
    source="constants: microsoft/torchscale, code of arXiv 2203.00555; how far off counts is derived here",
    needs=(Needs.MODEL, Needs.GRAPH),
    preview=True,
)
def deepnorm_constant(subject: Subject) -> Iterator[Observation]:
    """What it does
    In a network with norm(alpha x + f(x)), one stack of L layers, finds an alpha that is more than 5 % off (2L)^(1/4), and in one whose
    norms are untrained, weights of the feed-forward part that are more than 20 % off (8L)^(-1/4) times those of queries and keys, in units
    of Xavier's standard deviation. Layers that make queries, keys and values at once are not judged for the latter.

    Why it hurts
    The constants bound how much the network changes in an update, whatever its depth. With the exponent inverted, the weights that
    should shrink with depth grow.

    Evidence
    The factor of the shortcut and the ratio of the weights, with what the depth asks for.

    Example
    ```python
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
            self.norm = nn.LayerNorm(width)

        def forward(self, x):
            return self.norm(2.828 * x + self.attention(x, x, x)[0])  # 2.828 is (2 * 32) ** 0.25, for any depth
    ```

    Use instead
    ```python
    from pl_normkit import deepnorm_constants

    (alpha, beta), _ = deepnorm_constants(12, 0)  # 12 layers: 2.213 and 0.319
    ```

    Fix and its safety
    None: it changes what the network computes. Correct the constants before training; a trained network needs those it was trained with.

    Source
    Published: the constants are those of the code of microsoft/torchscale for an encoder or a decoder alone. The cuts are ours. Stacks with
    cross-attention have other constants and are not judged.
    """
    layers = subject.once(layers_of)
    scaled = [layer for layer in layers if layer.is_post and layer.factor > 1.0]
    depth = sum(layer.attends for layer in layers)
    if subject.model is None or not depth or len(scaled) != len(layers) or len(layers) not in (depth, 2 * depth):
        return
    alphas, expected = [layer.factor for layer in scaled], (2 * depth) ** 0.25
    off = max(alphas, key=lambda alpha: abs(alpha / expected - 1))
    if abs(off / expected - 1) > OFF_ALPHA:
        yield Observation(
            message=f"The shortcut is multiplied by {off:.4g}, where DeepNorm's constant for {depth} layers is {expected:.4g}",
            places=places_of(scaled[:1]),
            evidence=[Evidence("factor of the shortcut", off, f"(2 * {depth}) ** 0.25 = {expected:.4g}")],
            advice="Take alpha from pl_normkit.deepnorm_constants",
        )
    ratio, wanted = _beta(scaled, subject.model), (8 * depth) ** -0.25
    if ratio is not None and not is_trained(subject) and abs(ratio / wanted - 1) > OFF_BETA:
        what = "has its exponent inverted" if abs(ratio * wanted - 1) <= OFF_BETA else "is off"
        yield Observation(
            message=f"DeepNorm's scale of the weights {what}",
            places=places_of(scaled[:1]),
            evidence=[Evidence("feed-forward weights over queries and keys", ratio, f"(8 * {depth}) ** -0.25 = {wanted:.4g}")],
            advice="Initialize values, outputs and feed-forward weights with Xavier's gain beta of pl_normkit.deepnorm_constants",
        )


def _beta(layers: list[Layer], model: nn.Module) -> float | None:
    """Gain of the feed-forward weights over that of queries and keys; None where these have no matrices of their own."""
    asking = [_gains(layer, model)[:3] for layer in layers if layer.attends and len(layer.weights) == 4]
    giving = [gain for layer in layers if not layer.attends for gain in _gains(layer, model)]
    if not giving or not asking or any(len(gains) < 3 for gains in asking):
        return None
    # of queries, keys and values two are equal and the third is another, so the median is the gain of queries and keys
    base = median(median(gains) for gains in asking)
    return median(giving) / base if base > 0.0 else None


def _gains(layer: Layer, model: nn.Module) -> list[float]:
    return [gain for node in layer.weights if (gain := gain_of(node, model)) is not None]


def is_trained(subject: Subject) -> bool:
    """Whether the scale of a norm is no longer the same for all channels; False on the meta device, where there are no values."""
    if subject.graph is None or subject.model is None:
        return False
    known = dict(subject.model.named_parameters())
    scales = [known[norm.gamma].detach() for norm in subject.graph.norms if norm.gamma in known]
    return any(scale.numel() > 1 and not scale.is_meta and bool((scale != scale.flatten()[0]).any()) for scale in scales)


@rule(
    "NK907",
    "attention-without-norm",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/depth_profile/test_placement_rules.py",
    needs=(Needs.GRAPH,),
    preview=True,
)
def attention_without_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds attention whose queries and keys are linear in a sum of the residual stream, with no norm on the way from that sum: neither
    before the projections nor on queries and keys. A stream of one addition, which has not grown, and convolutions are left out.

    Why it hurts
    Scores are products of queries and keys, so they grow with the square of the stream, which grows with depth: the softmax saturates.

    Evidence
    The number of attention layers of the kind.

    Example
    ```python
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

        def forward(self, x):
            return x + self.attention(x, x, x, need_weights=False)[0]
    ```

    Use instead
    ```python
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

        def forward(self, x):
            normed = self.norm(x)
            return x + self.attention(normed, normed, normed, need_weights=False)[0]
    ```

    Fix and its safety
    None: a norm in a trained network changes what it computes.

    Source
    Derived from how scores scale. Networks without norms by design (a learnable gain of 0 at each branch) are found too, so this rule is a
    preview.
    """
    graph = subject.graph
    found = [attention for attention in graph.attentions if attends_without_norm(graph, attention)] if graph is not None else []
    if graph is not None and found:
        yield Observation(
            message="Queries and keys come from the residual stream without a norm",
            places=[Place(attention.module, attention.node.source) for attention in found],
            evidence=[Evidence("attention layers without a norm before them", len(found), f"of {len(graph.attentions)}")],
            advice="Normalize the input of the attention, or its queries and keys",
        )


@rule(
    "NK908",
    "post-norm-without-warm-up",
    mark=Mark.MEASURED,
    source="measured here: docs/depth_profile.md; that post-norm needs warm-up: arXiv 2002.04745",
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
    severity=Severity.WARNING,
    preview=True,
)
def post_norm_without_warmup(subject: Subject) -> Iterator[Observation]:
    """What it does
    In a transformer whose norms stand behind the additions, before the first step of Adam or a relative of it, finds a peak learning rate
    above 1e-3 that no scheduler has lowered for the start. Branches that are small against the stream at initialization, together no
    larger than it, count from 1e-2 on. A scheduler is seen by what it leaves in the optimizer; RAdam warms up by itself.

    Why it hurts
    The gradients of the last blocks are large at initialization, whatever the depth. Runs of ours stopped at the frequencies of letters.

    Evidence
    The learning rate of the first step, the peak, and the variance of the branches over that of the stream, summed over depth.

    Example
    ```python
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=False, batch_first=True)
    model = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ```

    Use instead
    ```python
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=False, batch_first=True)
    model = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=4000)
    ```

    Fix and its safety
    None: warm the learning rate up, or take the norm before the branch in a new model.

    Source
    Measured: the cuts below.
    That post-norm needs warm-up is published: arXiv 2002.04745 has 8.45 BLEU without it against about 34 with 4000 steps of it. The cuts
    are from language models of ours with 12 layers of width 64, which learned at 1e-3, and with branches scaled by 1 / sqrt(2L) at 3e-3,
    and got stuck above. Other sizes were not tried, and a warm-up written into the training loop is not seen, so this rule is a preview.
    """
    attending = [layer for layer in subject.once(layers_of) if layer.attends]
    started = [start for optimizer in subject.optimizers if (start := _first_rate(optimizer)) is not None]
    if len(attending) < 2 or not all(layer.is_post for layer in attending) or not started:
        return
    rate, peak = max(started)
    profile = subject.once(profile_of) if rate >= peak > HIGH_RATE else None
    if profile is None:
        return
    branches = math.fsum(row.ratio for row in profile.stream)
    if branches > 1.0 or peak >= SCALED_RATE:
        yield Observation(
            message=f"A post-norm transformer starts at its peak learning rate of {peak:g}, without warm-up",
            places=places_of(attending[:1]),
            evidence=[
                Evidence("learning rate of the first step", rate, f"a warm-up, or at most {HIGH_RATE:g}"),
                Evidence("variance of the branches over the stream, summed over depth", branches),
            ],
            advice="Warm the learning rate up over thousands of steps, lower it, or place the norms before the branches of a new model",
        )


def _first_rate(optimizer: Optimizer) -> tuple[float, float] | None:
    """(learning rate of the first step, peak) of the group that starts highest; None after a step, and where the optimizer is no Adam."""
    name = type(optimizer).__name__.lower()
    if "adam" not in name or "radam" in name or any(optimizer.state.values()):
        return None
    return max((_rates(group) for group in optimizer.param_groups), default=None)


def _rates(group: Mapping[str, Any]) -> tuple[float, float]:
    """OneCycleLR keeps its peak as `max_lr`, other schedulers theirs as `initial_lr`."""
    rate = float(group["lr"])
    return rate, max(rate, *(float(group[name]) for name in ("initial_lr", "max_lr") if name in group), rate)


def places_of(layers: list[Layer]) -> list[Place]:
    """Where their additions stand."""
    return [Place(layer.add.node.module, layer.add.node.source) for layer in layers]
