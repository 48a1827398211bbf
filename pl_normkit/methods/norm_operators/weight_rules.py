"""NK931 to NK934: weights that are normalized to no effect."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.graph import Kind, Node
from pl_normkit.graph.norms import norms_that_read
from pl_normkit.preserve import preserved
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

LAG = 0.1
"""How far the largest singular value of a spectrally normalized weight may be from 1 (derived)."""


def _reparametrized(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Modules whose weight torch's weight norm ("WeightNorm") or spectral norm ("SpectralNorm") makes, in either API, by path."""
    found = {}
    for path, module in model.named_modules():
        ways: Sequence[object] = tuple(module._forward_pre_hooks.values())
        if parametrize.is_parametrized(module, "weight"):
            ways = [*ways, *module.parametrizations["weight"]]
        if any(type(way).__name__.lstrip("_") == name for way in ways):
            found[path] = module
    return found


@rule(
    "NK931",
    "norm-undoes-weight-norm",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_rules.py",
    needs=(Needs.GRAPH, Needs.MODEL),
    preview=True,
)
def norm_undoes_weight_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds layers with weight norm that a batch or instance norm reads at once, and layers with spectral norm that any norm reads at once.

    Why it hurts
    The norm divides by the scale that the reparametrization has set: the learned length of a weight-normalized filter has no effect on
    the output, and a bound on the largest singular value bounds nothing.

    Evidence
    The layers.

    Example
    ```python
    from torch import nn
    from torch.nn.utils.parametrizations import spectral_norm

    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU())
    ```

    Use instead
    ```python
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU())
    ```

    Fix and its safety
    None: take one of the two out.

    Source
    Derived: batch statistics scale with the layer's outputs, so a factor cancels up to eps. Biases weaken it. arXiv 1602.07868 is weight
    norm, arXiv 1802.05957 spectral norm; neither is cited for this.
    """
    assert subject.model is not None
    assert subject.graph is not None
    for name, undoing in (("WeightNorm", {"batch", "instance"}), ("SpectralNorm", {"batch", "instance", "layer", "group", "rms"})):
        layers = _reparametrized(subject.model, name)
        nodes = [node for node in subject.graph.nodes if node.kind is Kind.WEIGHT and node.module in layers]
        undone = [node for node in nodes if norms_that_read(node, subject.graph.norms) <= undoing]
        if undone:
            yield Observation(
                message=f"A norm undoes the {'weight' if name == 'WeightNorm' else 'spectral'} norm of the layer in front of it",
                places=[Place(path) for path in dict.fromkeys(node.module for node in undone)],
                advice="Take one of the two out: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
                cause=name,
            )


@rule(
    "NK932",
    "standardized-weights-without-norm",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_rules.py",
    needs=(Needs.GRAPH, Needs.MODEL),
    preview=True,
)
def standardized_weights_without_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds timm's StdConv2d layers behind which no norm comes before the model's output or the next layer with weights.

    Why it hurts
    A standardized filter has variance 1 whatever was learned, so the layer's output is larger by the square root of the number of its
    weights and cannot be scaled.

    Evidence
    The layers.

    Example
    ```python
    from timm.layers import StdConv2d
    from torch import nn

    model = nn.Sequential(StdConv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    ```

    Use instead
    ```python
    model = nn.Sequential(StdConv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    ```

    Fix and its safety
    None: put a norm behind it, or use timm's ScaledStdConv2d, which has a gain and the factor for networks without norms.

    Source
    Derived; arXiv 1903.10520 uses standardized convolutions in front of norms.
    """
    assert subject.model is not None
    assert subject.graph is not None
    convs = {path: conv for path, conv in subject.model.named_modules() if type(conv).__name__ in ("StdConv2d", "StdConv2dSame")}
    own = {
        path
        for path, module in subject.model.named_modules()
        if "Norm" in type(module).__name__ or "FilterResponse" in type(module).__name__
    }
    norms = {norm.node for norm in subject.graph.norms} | {node for node in subject.graph.nodes if node.module in own}
    nodes = [node for node in subject.graph.nodes if node.module in convs and node.kind is Kind.WEIGHT]
    alone = [node.module for node in nodes if not _reaches(node, norms)]
    if alone:
        yield Observation(
            message="No norm follows layers with standardized weights",
            places=[Place(path) for path in dict.fromkeys(alone)],
            advice="Put a norm behind them, or use timm.layers.ScaledStdConv2d",
        )


def _reaches(start: Node, norms: set[Node]) -> bool:
    """Whether a norm reads `start`, through anything but layers with weights (sums, activations, pools)."""
    waiting, seen = [start], {start}
    while waiting:
        for user in waiting.pop().users:
            if user in norms:
                return True
            if user not in seen and user.kind is not Kind.WEIGHT:
                seen.add(user)
                waiting.append(user)
    return False


@rule(
    "NK933",
    "spectral-norm-lags",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_rules.py",
    needs=(Needs.MODEL,),
    preview=True,
)
def spectral_norm_lags(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds spectrally normalized weights whose largest singular value is more than 0.1 from 1.

    Why it hurts
    The power iteration takes one step each training forward. Where weights move faster than it follows, or were loaded without its
    vectors, the bound does not hold.

    Evidence
    The largest singular value that is farthest from 1, by SVD of the weight as a matrix, in eval mode.

    Example
    ```python
    import torch
    from torch import nn
    from torch.nn.utils.parametrizations import spectral_norm

    model = nn.Sequential(spectral_norm(nn.Linear(16, 16)))
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.diag(torch.arange(16.0)))
    ```

    Use instead
    ```python
    for _ in range(100):
        _ = model.train()[0].weight  # each reading in training mode is one step of the iteration
    ```

    Fix and its safety
    None: more power iterations (`n_power_iterations`), a lower learning rate, or a few readings in training mode after loading.

    Source
    Derived. The bound is that of the matrix (outputs, all else); the norm of a convolution can be larger by up to the root of the
    kernel's size.
    """
    assert subject.model is not None
    if not subject.measure:
        return
    found: dict[str, float] = {}
    with preserved(subject.model, buffers=True), torch.no_grad():
        subject.model.eval()
        for path, module in _reparametrized(subject.model, "SpectralNorm").items():
            weight = module.weight
            if not isinstance(weight, Tensor) or not parametrize.is_parametrized(module, "weight") or weight.ndim < 2:
                continue
            is_transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            matrix = (weight.transpose(0, 1) if is_transposed else weight).flatten(1).float()
            value = float(torch.linalg.matrix_norm(matrix, 2))
            if abs(value - 1) > LAG:
                found[path] = value
    if found:
        yield Observation(
            message="Spectrally normalized weights are not of norm 1",
            places=[Place(path) for path in found],
            evidence=[Evidence("largest singular value", max(found.values(), key=lambda value: abs(value - 1)), "1")],
            advice="Raise n_power_iterations, or read the weight a few times in training mode after loading",
        )


@rule(
    "NK934",
    "decayed-gain",
    mark=Mark.PUBLISHED,
    source="arXiv 2102.06171 (code): gains and biases are not decayed",
    needs=(Needs.MODEL, Needs.OPTIMIZERS),
    severity=Severity.NOTE,
    preview=True,
)
def decayed_gain(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes gains of timm's ScaledStdConv2d that stand in a parameter group with weight decay.

    Why it hurts
    Gains scale the filters of networks without norms; the recipe of NFNets decays weights alone. They have four dimensions, so that
    splits by number of dimensions, timm's own among them, take them for weights.

    Evidence
    How many gains are decayed, and the decay.

    Example
    ```python
    import timm
    import torch

    model = timm.create_model("nf_resnet26", num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=2e-5)
    ```

    Use instead
    ```python
    gains = [parameter for name, parameter in model.named_parameters() if name.endswith(".gain")]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith(".gain")]
    optimizer = torch.optim.SGD([{"params": others, "weight_decay": 2e-5}, {"params": gains, "weight_decay": 0.0}], 0.1)
    ```

    Fix and its safety
    None: give them a group without decay.

    Source
    Published: High-Performance Large-Scale Image Recognition Without Normalization, arXiv 2102.06171, the authors' code.
    """
    assert subject.model is not None
    decay = {
        id(parameter): float(group["weight_decay"])
        for optimizer in subject.optimizers
        for group in optimizer.param_groups
        if group.get("weight_decay")
        for parameter in group["params"]
    }
    gains = [
        (f"{path}.gain", decay[id(module.gain)])
        for path, module in subject.model.named_modules()
        if type(module).__name__ in ("ScaledStdConv2d", "ScaledStdConv2dSame") and id(module.gain) in decay
    ]
    if gains:
        yield Observation(
            message="Weight decay reaches the gains of scaled convolutions",
            places=[Place(name) for name, _ in gains],
            evidence=[Evidence("largest weight decay", max(value for _, value in gains), "0", is_measured=False)],
            advice="Give the gains a parameter group with weight_decay=0",
        )
