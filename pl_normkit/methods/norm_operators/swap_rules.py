"""NK926 to NK929 and NK935: a conversion that a model could have, and norms of `swap_norms` that stand where they do not work."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import NormkitError
from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.norm_operators.measure import inputs_of
from pl_normkit.methods.norm_operators.operators.dyt import LANGUAGE_ALPHA, DynamicTanh
from pl_normkit.methods.norm_operators.operators.fixed_std import FixedStdNorm
from pl_normkit.methods.norm_operators.operators.powernorm import PowerNorm
from pl_normkit.methods.norm_operators.operators.prepbn import ProgressiveBatchNorm
from pl_normkit.methods.norm_operators.operators.tdln import TimeDependentNorm
from pl_normkit.methods.norm_operators.operators.unified import UnifiedNorm
from pl_normkit.methods.norm_operators.rms_conversion import convertible_streams
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

FEWEST_TOKENS = 2
"""Tokens for each channel below which statistics of a batch are taken for noise (derived)."""
UNUSED = 1e-3
"""Distance of the two gains of a time-dependent norm, over their size, below which time has no effect (derived)."""
OUTLIER = 10.0
"""Times the mean deviation of its rows beyond which a position needs a constant of its own (derived)."""
OFF = 2.0
"""Factor from the published alpha beyond which a start is named (derived)."""


@rule(
    "NK926",
    "free-rmsnorm-conversion",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_swap_rules.py",
    needs=(Needs.GRAPH, Needs.MODEL),
    severity=Severity.NOTE,
    preview=True,
)
def free_rmsnorm_conversion(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes layer norms of a model in eval mode that `to_rmsnorm` can turn into RMS norms without changing what the model computes.

    Why it hurts
    It does not: the mean that each of these norms takes away could be taken away once. A plain swap to RMS norms would change the
    function, by how much the share of the mean in the rows tells.

    Evidence
    The largest share of the squared mean in the mean square of the rows that such a norm gets.

    Example
    ```python
    from torch import nn

    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    ```

    Use instead
    ```python
    import torch

    from pl_normkit import to_rmsnorm

    changes = to_rmsnorm(model, torch.randn(4, 8))
    ```

    Fix and its safety
    None by the audit, since whether it is faster depends on the device: docs/norm_operators.md has our times. `to_rmsnorm` is exact.

    Source
    Derived. arXiv 2305.14858 is the conversion; a model qualifies by its graph, whatever the share of the mean.
    """
    assert subject.model is not None
    if subject.model.training or not any(isinstance(module, nn.LayerNorm) for module in subject.model.modules()):
        return
    try:
        graph = ModelGraph.from_model(subject.model, subject.example_inputs, training=False)
        streams, _ = convertible_streams(subject.model, graph)
    except NormkitError:  # nothing to convert
        return
    paths = list(dict.fromkeys(norm.module for stream, _ in streams for norm in stream.norms))
    seen = inputs_of(subject, (nn.LayerNorm,)) if subject.measure else {}
    shares = [float((x.mean(-1).square().mean() / x.square().mean()).nan_to_num()) for path, (_, x) in seen.items() if path in paths]
    yield Observation(
        message="Layer norms could be RMS norms with the same function",
        places=[Place(path) for path in paths],
        evidence=[Evidence("largest share of the mean in the mean square of the rows", max(shares), "")] if shares else [],
        advice="Try pl_normkit.to_rmsnorm(model, inputs) and measure; do not swap the norms alone",
    )


@rule(
    "NK927",
    "dynamic-tanh-start",
    mark=Mark.DERIVED,
    source="derived from the tables of arXiv 2503.10622: tests/methods/norm_operators/test_swap_rules.py",
    needs=(Needs.MODEL,),
    preview=True,
)
def dynamic_tanh_start(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds dynamic tanh layers of wide language models whose alpha is more than a factor of 2 away from the published one for their width,
    and those without a scale of their own whose modulation starts at zero.

    Why it hurts
    The wider a language model, the smaller an alpha its authors found to train; the default of 0.5 is for all other models. Where
    adaptive norms (DiT) start at zero, their patch takes that start away.

    Evidence
    The alpha that is farthest off, and the published one.

    Example
    ```python
    from torch import nn

    from pl_normkit import swap_norms

    model = nn.Sequential(nn.Embedding(10, 8192), nn.LayerNorm(8192), nn.Linear(8192, 10))
    changes = swap_norms(model, to="dyt", alpha=0.5)
    ```

    Use instead
    ```python
    changes.undo()
    changes = swap_norms(model, to="dyt", alpha=0.1)
    ```

    Fix and its safety
    None: swap again with another alpha, for attention and for the rest by `where=`; or start the modulation as a linear layer does.

    Source
    Derived: the factor. Published, arXiv 2503.10622: alpha by width (tables 11 and 12), and that its code takes the zero start of DiT away.
    """
    assert subject.model is not None
    tanhs = {path: module for path, module in subject.model.named_modules() if isinstance(module, DynamicTanh)}
    found = _far_alphas(subject.model, tanhs)
    if found:
        path, (value, published) = max(found.items(), key=lambda item: abs(math.log(item[1][0] / item[1][1])))
        yield Observation(
            message="Dynamic tanh layers of a language model start far from the published alpha",
            places=[Place(name) for name in found],
            evidence=[Evidence(f"alpha of {path}", value, f"near {published:g}", is_measured=False)],
            advice="Swap with the alpha of this width: swap_norms(model, to='dyt', alpha=...)",
            cause="alpha",
        )
    bare = [path for path, module in tanhs.items() if module.weight is None]
    zeros = [path for path, layer in subject.model.named_modules() if isinstance(layer, nn.Linear) and _is_modulation(layer, tanhs, bare)]
    if zeros:
        yield Observation(
            message="The modulation of dynamic tanh layers starts at zero",
            places=[Place(path) for path in zeros],
            advice="Start these layers as other linear layers",
            cause="modulation",
        )


def _far_alphas(model: nn.Module, tanhs: dict[str, DynamicTanh]) -> dict[str, tuple[float, float]]:
    """Alpha and the published one, for layers of a language model at their start (few values among them) that are far off."""
    if not any(isinstance(module, nn.Embedding) for module in model.modules()) or any(norm.alpha.is_meta for norm in tanhs.values()):
        return {}
    alphas = {path: float(norm.alpha.detach()) for path, norm in tanhs.items() if norm.width >= min(LANGUAGE_ALPHA)}
    if len(set(alphas.values())) > 2:  # trained
        return {}
    found = {}
    for path, value in alphas.items():
        published = LANGUAGE_ALPHA[min(LANGUAGE_ALPHA, key=lambda width: abs(math.log(width / tanhs[path].width)))]
        nearest = min(max(value, min(published)), max(published))
        if value <= 0 or abs(math.log(value / nearest)) > math.log(OFF):
            found[path] = (value, nearest)
    return found


def _is_modulation(layer: nn.Linear, tanhs: dict[str, DynamicTanh], bare: list[str]) -> bool:
    """Whether a layer that is all zero makes several vectors as wide as a norm without a scale."""
    is_of_several = any(layer.out_features % tanhs[path].width == 0 and layer.out_features > tanhs[path].width for path in bare)
    held = [parameter for parameter in (layer._parameters.get("weight"), layer._parameters.get("bias")) if parameter is not None]
    return is_of_several and not any(parameter.is_meta or bool(parameter.any()) for parameter in held)


@rule(
    "NK928",
    "few-tokens-for-batch-statistics",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_swap_rules.py",
    needs=(Needs.GRAPH, Needs.MODEL, Needs.LOADERS),
    preview=True,
)
def few_tokens_for_batch_statistics(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds norms of `prepbn`, `powernorm` and `unified` that get fewer than two tokens for each channel in a training batch.

    Why it hurts
    They normalize by statistics of the batch: of so few tokens these are noisy, and differ from what evaluation uses.

    Evidence
    The fewest tokens for each channel: those of a sample, times the loader's batch size, over the channels.

    Example
    ```python
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from pl_normkit import swap_norms

    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 2))
    changes = swap_norms(model, to="prepbn")
    loader = DataLoader(TensorDataset(torch.randn(32, 64)), batch_size=8)
    ```

    Use instead
    ```python
    loader = DataLoader(TensorDataset(torch.randn(512, 64)), batch_size=256)
    ```

    Fix and its safety
    None: larger batches, or more ranks, whose tokens count too and are not counted here.

    Source
    Derived; the cut is not tuned.
    """
    assert subject.loaders is not None
    size = getattr(subject.loaders.train, "batch_size", None)
    samples = next((leaf.shape[0] for leaf in tree_leaves(subject.example_inputs) if isinstance(leaf, Tensor) and leaf.ndim), 0)
    if not isinstance(size, int) or not samples or not subject.measure:
        return
    found = {}
    for path, (norm, x) in inputs_of(subject, (ProgressiveBatchNorm, PowerNorm, UnifiedNorm)).items():
        assert isinstance(norm, (ProgressiveBatchNorm, PowerNorm, UnifiedNorm))
        tokens = x.numel() / norm.width / samples * size
        if tokens < FEWEST_TOKENS * norm.width:
            found[path] = tokens / norm.width
    if found:
        yield Observation(
            message="Norms with batch statistics get few tokens for their channels",
            places=[Place(path) for path in found],
            evidence=[Evidence("fewest tokens for each channel", min(found.values()), f"at least {FEWEST_TOKENS}")],
            advice="Train with larger batches",
        )


@rule(
    "NK929",
    "time-without-effect",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_swap_rules.py",
    needs=(Needs.MODEL,),
    severity=Severity.NOTE,
    preview=True,
)
def time_without_effect(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes time-dependent norms of a model in eval mode whose two gains, and shifts, are within a thousandth of each other.

    Why it hurts
    The norm then computes the same at all times: training has found no use for what it costs.

    Evidence
    The largest distance of the gains over their size.

    Example
    ```python
    from torch import nn

    from pl_normkit import swap_norms

    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    changes = swap_norms(model, to="tdln")
    model = model.eval()
    ```

    Use instead
    ```python
    changes.undo()  # if training has left them so
    ```

    Fix and its safety
    None: hand the time to the norms while training (`norm_inputs`), or do without them.

    Source
    Derived from the formula of arXiv 2406.09416 (code); the cut is not tuned.
    """
    assert subject.model is not None
    found = {}
    for path, norm in subject.model.named_modules():
        if not isinstance(norm, TimeDependentNorm) or norm.training:
            continue
        pairs = [(norm.weight, norm.other_weight), (norm.bias, norm.other_bias)]
        distances = [_distance(a, b) for a, b in pairs if a is not None and b is not None and not a.is_meta]
        if distances and max(distances) < UNUSED:
            found[path] = max(distances)
    if found:
        yield Observation(
            message="Time-dependent norms compute the same at all times",
            places=[Place(path) for path in found],
            evidence=[Evidence("largest distance of the two gains over their size", max(found.values()), f"at least {UNUSED}")],
            advice="Check that norm_inputs(model, time=...) is used in training, or do without these norms",
        )


@torch.no_grad()
def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean() / a.abs().mean().clamp(min=1e-12))


@rule(
    "NK935",
    "outlier-position-of-constant-norm",
    mark=Mark.DERIVED,
    source="derived from the code of arXiv 2409.13710: tests/methods/norm_operators/test_swap_rules.py",
    needs=(Needs.GRAPH, Needs.MODEL),
    preview=True,
)
def outlier_position_of_constant_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds norms of `fixed_std` that get rows of one position whose deviation is more than 10 times that of the middle position.

    Why it hurts
    Such a norm ends as one constant for all tokens. A position of another size, as the first of GPT-2 is, comes out larger by that
    factor, and raises the constant for all others.

    Evidence
    The largest ratio of a position's mean deviation and the median over positions.

    Example
    ```python
    import torch
    from torch import nn

    from pl_normkit import swap_norms

    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))
    changes = swap_norms(model, to="fixed_std")
    inputs = torch.randn(2, 6, 8) * torch.tensor([50.0, 1, 1, 1, 1, 1])[:, None]
    ```

    Use instead
    ```python
    changes.undo()  # and keep the layer norm there, or leave that position out of the data
    ```

    Fix and its safety
    None: swap other norms alone (`where=`), or train without such a token.

    Source
    Derived: the cut. Published, arXiv 2409.13710 (code): the first token of GPT-2 small has a constant of 108 against 3.0 for the others.
    """
    found = {}
    for path, (norm, x) in inputs_of(subject, (FixedStdNorm,)).items() if subject.measure else ():
        assert isinstance(norm, FixedStdNorm)
        if x.ndim < 3 or norm.axis != -1 or x.shape[-2] < 3:
            continue
        by_position = x.float().var(-1, correction=0).sqrt().flatten(0, -2).mean(0)
        ratio = float(by_position.max() / by_position.median().clamp(min=1e-12))
        if ratio > OUTLIER:
            found[path] = ratio
    if found:
        yield Observation(
            message="One position has rows of another size than a norm with one constant can take",
            places=[Place(path) for path in found],
            evidence=[Evidence("largest deviation of a position over the median", max(found.values()), f"at most {OUTLIER:g}")],
            advice="Keep the layer norm there: swap_norms(model, to='fixed_std', where=...)",
        )
