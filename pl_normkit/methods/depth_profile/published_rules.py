"""NK909 to NK914: what the papers of the placements ask for, held against a model and its optimizer at the start."""

from __future__ import annotations

__all__ = ["deep_post_norm", "mix_share", "patch_embedding_gradient", "scaled_norms_conflict", "start_variance", "unit_weights"]

import math
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor, nn

from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.graph import Kind, ModelGraph, Node
from pl_normkit.methods.depth_profile.measure import gradients_of
from pl_normkit.methods.depth_profile.placement import Layer, branch_factor, channel_scales, ends_in_norm, gain_of, is_on_sphere
from pl_normkit.methods.depth_profile.placement_rules import is_trained, layers_of, places_of
from pl_normkit.methods.depth_profile.subjects import profile_of
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

DEEP, MOST_POST, SMALL, OFF_UNIT, LARGE_GRADIENT = 24, 0.34, 0.5, 1e-3, 10.0


def _attending(subject: Subject) -> list[Layer]:
    return [layer for layer in subject.once(layers_of) if layer.attends]


@rule(
    "NK909",
    "deep-post-norm",
    mark=Mark.PUBLISHED,
    source="arXiv 2412.13795 and arXiv 2502.05795, Table 1 of both; the cut of 24 blocks, the depth of their model, is ours",
    needs=(Needs.MODEL, Needs.GRAPH),
    severity=Severity.NOTE,
    preview=True,
)
def deep_post_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an untrained transformer of 24 blocks or more with plain norms behind the additions: no factor on the shortcut, no norm at the
    end of the branches.

    Why it hurts
    A post-norm language model of 250M parameters and 24 layers ended at a perplexity of 1409, where pre-norm had 22.

    Evidence
    The number of blocks.

    Example
    ```python
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=False, batch_first=True)
    model = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
    ```

    Use instead
    ```python
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, norm_first=True, batch_first=True)
    model = nn.TransformerEncoder(layer, 24, norm=nn.LayerNorm(64), enable_nested_tensor=False)
    ```

    Fix and its safety
    None here: place_norms(model, "deepnorm", inputs) before training, or a model with pre-norm.

    Source
    Published: the two papers' tables of language models of 24 blocks, which is our cut. Encoders with 24 post-norm blocks and a long
    warm-up were trained (BERT's large model), so this is a note and a preview.
    """
    layers = _attending(subject)
    is_plain = all(layer.is_post and layer.factor == 1.0 and not ends_in_norm(layer) for layer in layers)
    if len(layers) >= DEEP and is_plain and not is_trained(subject):
        yield Observation(
            message=f"A post-norm transformer has {len(layers)} blocks",
            places=places_of(layers[:1]),
            evidence=[Evidence("blocks with a norm behind the addition", len(layers), f"below {DEEP}")],
            advice='Place the norms before the branches, or call place_norms(model, "deepnorm", inputs) before training',
        )


@rule(
    "NK910",
    "scaled-norms-conflict",
    mark=Mark.PUBLISHED,
    source="arXiv 2502.05795, its code's README and Table 6; the cut of 0.5 is derived here",
    needs=(Needs.MODEL, Needs.GRAPH),
    preview=True,
)
def scaled_norms_conflict(subject: Subject) -> Iterator[Observation]:
    """What it does
    In a transformer whose branches are multiplied by 1/sqrt(l) in layer l (layer-norm scaling), finds last weights of branches that start
    below half of the others, and a learned scale per channel at the end of the branches (LayerScale).

    Why it hurts
    Each of the two scales the branches by depth already; the authors say that the small start weakens theirs, and take LayerScale out.

    Evidence
    The ratio of the standard deviations, or the scale's name.

    Example
    ```python
    from pl_normkit.nn import CausalTransformer

    model = CausalTransformer(256, width=16, depth=2, heads=2, length=8, placement="lns")
    for block in model.blocks:  # the start of GPT-2, made for plain pre-norm
        block.attn.proj.weight.data *= 0.25
        block.mlp.fc2.weight.data *= 0.25
    ```

    Use instead
    ```python
    from pl_normkit.nn import CausalTransformer

    model = CausalTransformer(256, width=16, depth=2, heads=2, length=8, placement="lns")
    ```

    Fix and its safety
    None: start all weights alike before training.

    Source
    Published: the README of lmsdss/LayerNorm-Scaling for the start, Table 6 of the paper for LayerScale in a ViT. The cut of 0.5 is ours.
    """
    layers, model = _attending(subject), subject.model
    if model is None or len(layers) < 2 or not _falls_with_depth([branch_factor(layer) for layer in layers]):
        return
    scales = [name for layer in subject.once(layers_of) for name in channel_scales(layer)]
    ratios = [ratio for layer in subject.once(layers_of) if (ratio := _last_over_others(layer, model)) is not None]
    places = places_of(layers[:1])
    if scales:
        evidence = [Evidence("scales per channel at the ends of branches", len(scales), "none beside layer-norm scaling")]
        yield Observation(
            message="Layer-norm scaling meets LayerScale", places=places, evidence=evidence, advice="Build the model without LayerScale"
        )
    if ratios and median(ratios) < SMALL and not is_trained(subject):
        evidence = [Evidence("deviation of branches' last weights over the others", median(ratios), f"at least {SMALL}")]
        yield Observation(
            message="Layer-norm scaling meets a start that is scaled by depth",
            places=places,
            evidence=evidence,
            advice="Start the last weights as the others",
        )


def _falls_with_depth(factors: list[float]) -> bool:
    return all(abs(factor * math.sqrt(number) - 1) < 0.01 for number, factor in enumerate(factors, 1))


def _last_over_others(layer: Layer, model: nn.Module) -> float | None:
    gains = [gain for node in layer.weights if (gain := gain_of(node, model)) is not None]
    return gains[-1] / max(gains[:-1]) if len(gains) > 1 and max(gains[:-1]) > 0 else None


@rule(
    "NK911",
    "many-post-norm-layers",
    mark=Mark.DERIVED,
    source="derived here from arXiv 2412.13795, Table 5",
    needs=(Needs.MODEL, Needs.GRAPH),
    severity=Severity.NOTE,
    preview=True,
)
def mix_share(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an untrained transformer whose first blocks are post-norm and the others pre-norm (Mix-LN), where more than 34 % are post-norm.

    Why it hurts
    With the share of post-norm blocks come post-norm's need of warm-up and its divergence.

    Evidence
    The share of post-norm blocks.

    Example
    ```python
    from pl_normkit.nn import CausalTransformer

    model = CausalTransformer(256, width=16, depth=4, heads=2, length=8, placement="mix", share=0.5)
    ```

    Use instead
    ```python
    from pl_normkit.nn import CausalTransformer

    model = CausalTransformer(256, width=16, depth=4, heads=2, length=8, placement="mix", share=0.25)
    ```

    Fix and its safety
    None: take a quarter before training.

    Source
    Derived: the cut is ours. Published: at 1B parameters perplexity was 18.18 with 25 %, 18.41 with 33 %, 18.86 with 50 %, and 1434 with
    all of the layers (Table 5).
    """
    post = [layer.is_post for layer in _attending(subject)]
    count = sum(post)
    if 0 < count < len(post) and all(post[:count]) and count / len(post) > MOST_POST and not is_trained(subject):
        yield Observation(
            message=f"{count} of {len(post)} blocks are post-norm before pre-norm ones",
            places=places_of(_attending(subject)[:1]),
            evidence=[Evidence("share of post-norm blocks", count / len(post), "0.25")],
            advice="Take a quarter of the blocks, and warm the learning rate up over a tenth of the steps",
        )


@rule(
    "NK912",
    "weights-off-the-sphere",
    mark=Mark.DERIVED,
    source="derived here from the code of NVIDIA/ngpt, arXiv 2410.01131",
    needs=(Needs.MODEL, Needs.GRAPH),
    preview=True,
)
def unit_weights(subject: Subject) -> Iterator[Observation]:
    """What it does
    In a transformer whose stream has length 1 after each addition (nGPT), finds weight matrices with rows and columns that are more than a
    thousandth off length 1, and an optimizer that decays such matrices. Those that the forward pass itself brings to length 1 are left out.

    Why it hurts
    nGPT's learning rates are angles on a sphere: weights that are not brought back to it after each step learn at another rate, and decay
    pulls them off it.

    Evidence
    The largest distance from length 1, and the decay.

    Example
    ```python
    import torch
    from pl_normkit.nn import CausalTransformer

    model = CausalTransformer(256, width=16, depth=2, heads=2, length=8, placement="ngpt")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)  # and nothing after its step
    ```

    Use instead
    ```python
    import torch
    from pl_normkit.nn import CausalTransformer

    model = CausalTransformer(256, width=16, depth=2, heads=2, length=8, placement="ngpt")
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.register_step_post_hook(lambda *_: model.normalize_weights())
    ```

    Fix and its safety
    None here: `normalize_weights` of the reference, or the like of your model, after each optimizer step.

    Source
    Derived from the authors' code, which also has no warm-up. The cut leaves room for bfloat16.
    """
    layers, model = subject.once(layers_of), subject.model
    if model is None or len(layers) < 2 or not is_on_sphere(layers):
        return
    made = {read.parameter for layer in layers for node in layer.weights for read in node.reads if len(read.path) > 1}
    matrices = {name: matrix for name, matrix in _matrices(layers, model).items() if name not in made}
    off = {name: distance for name, matrix in matrices.items() if not (distance := _off_unit(matrix)) <= OFF_UNIT}
    if off:
        worst = max(off, key=lambda name: off[name])
        yield Observation(
            message=f"{len(off)} of {len(matrices)} weight matrices of a network on the sphere are off length 1",
            places=[Place(worst.rpartition(".")[0])],
            evidence=[Evidence("largest distance of a row's length from 1", off[worst], f"at most {OFF_UNIT}")],
            advice="Bring rows, and columns of the last weights of branches, to length 1 after each optimizer step",
        )
    ids = {id(matrix) for matrix in matrices.values()}
    decays = [float(group.get("weight_decay", 0.0)) for optimizer in subject.optimizers for group in optimizer.param_groups
              if any(id(parameter) in ids for parameter in group["params"])]  # fmt: skip
    if any(decays):
        yield Observation(
            message="Weights that are kept at length 1 are decayed",
            places=places_of(layers[:1]),
            evidence=[Evidence("weight decay", max(decays), "0")],
            advice="Set weight_decay to 0",
        )


def _matrices(layers: list[Layer], model: nn.Module) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters())
    names = dict.fromkeys(name for layer in layers for node in layer.weights for name in node.parameters)
    return {name: known[name] for name in names if name in known and known[name].dim() == 2}


@torch.no_grad()
def _off_unit(matrix: Tensor) -> float:
    """Of rows or columns, whichever are nearer."""
    return min(float((torch.linalg.vector_norm(matrix.double(), dim=axis) - 1).abs().max()) for axis in (0, 1))


@rule(
    "NK913",
    "patch-embedding-gradient",
    mark=Mark.DERIVED,
    source="derived here; motive: arXiv 2302.01327",
    needs=(Needs.MODEL, Needs.GRAPH),
    severity=Severity.NOTE,
    preview=True,
)
def patch_embedding_gradient(subject: Subject) -> Iterator[Observation]:
    """What it does
    In a transformer over image patches, compares the gradient that the patch embedding holds now with that of the blocks.

    Why it hurts
    A patch embedding whose gradient is many times that of the blocks sets the largest learning rate that the network takes.

    Evidence
    The norm of its gradient over the median norm of the gradients of the blocks' weights.

    Example
    ```python
    from torch import nn

    patches = nn.Conv2d(3, 192, 16, stride=16)
    nn.init.normal_(patches.weight, std=1e-4)  # the stream starts small, so the first norm makes its gradient large
    ```

    Use instead
    ```python
    from torch import nn

    patches = nn.Sequential(nn.PixelUnshuffle(16), nn.Flatten(2))  # then transpose, LayerNorm(768), Linear(768, 192), LayerNorm(192)
    ```

    Fix and its safety
    None: Dual PatchNorm, a norm before and one behind the embedding, is for new models; first see how the embedding starts.

    Source
    Derived: the cut of 10 is ours; small ViTs of timm lay at 0.5 to 1.6 at their start, and below 6 two steps later. Blocks with
    LayerScale, which get next to no gradient at the start, are not judged. Published: two norms around the embedding improve
    well-tuned ViTs (abstract).
    """
    layers, model, graph = subject.once(layers_of), subject.model, subject.graph
    patches = _patch_embedding(graph) if graph is not None else None
    attends = any(layer.attends for layer in layers)
    if model is None or patches is None or not attends or any(channel_scales(layer) for layer in layers):
        return
    known = dict(model.named_parameters())
    own = _gradient_norm([known[name].grad for name in patches.parameters if name in known])
    blocks = [_gradient_norm([matrix.grad for matrix in _matrices([layer], model).values()]) for layer in layers]
    held = [norm for norm in blocks if norm is not None]
    if own is not None and held and own > LARGE_GRADIENT * median(held) > 0.0:
        yield Observation(
            message="The patch embedding gets many times the gradient of the blocks",
            places=[Place(patches.module, patches.source)],
            evidence=[Evidence("norm of its gradient over the median of the blocks", own / median(held), f"at most {LARGE_GRADIENT:g}")],
            advice="See how the embedding starts; in a new model put a norm before and behind it",
        )


def _patch_embedding(graph: ModelGraph) -> Node | None:
    """The first weight layer, where it is a convolution over patches that do not overlap."""
    first = next((node for node in graph.nodes if node.kind is Kind.WEIGHT), None)
    if first is None or "conv2d" not in first.op or not first.inputs or len(first.inputs[0].shape) != 4:
        return None
    return first if max(first.shape[2:]) * 4 <= max(first.inputs[0].shape[2:]) else None


def _gradient_norm(gradients: list[Tensor | None]) -> float | None:
    rms, count = gradients_of(gradients)
    return None if rms is None else rms * math.sqrt(count)


@rule(
    "NK914",
    "start-variance",
    mark=Mark.PUBLISHED,
    source="arXiv 2002.04745, Lemma 2; how far off counts is derived here",
    needs=(Needs.MODEL, Needs.GRAPH),
    severity=Severity.NOTE,
    preview=True,
)
def start_variance(subject: Subject) -> Iterator[Observation]:
    """What it does
    In an untrained pre-norm transformer whose stream starts at unit variance and whose matrices start as Xavier's, finds a mean square
    after block l that is less than half of 1 + l/2 or more than twice 1 + 3l/2.

    Why it hurts
    The lemma holds for plain blocks with that start; another growth says that a branch or the shortcut is scaled, by intent or not.

    Evidence
    The mean square of the stream after the last block, and the band.

    Example
    ```python
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)

        def forward(self, x):
            h = self.norm(x)
            return x + 8 * self.attention(h, h, h, need_weights=False)[0]  # a factor left over from a trial
    ```

    Use instead
    ```python
    from torch import nn

    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, norm_first=True), 12, enable_nested_tensor=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    ```

    Fix and its safety
    None: it tells what to look at.

    Source
    Published: the band, for unit embeddings and Xavier's start alone. Starts at 0.02, as most language models have, are not judged.
    """
    layers, model = subject.once(layers_of), subject.model
    profile = subject.once(profile_of)
    if model is None or profile is None or len(profile.stream) != len(layers) or any(layer.is_post for layer in layers):
        return
    if len({layer.add.node.shape for layer in layers}) != 1:  # a head that pools by attention has an addition of its own (SigLIP)
        return
    gains = [gain for layer in layers for node in layer.weights if (gain := gain_of(node, model)) is not None]
    first, last, depth = profile.stream[0], profile.stream[-1], sum(layer.attends for layer in layers)
    started = first.branch_variance / first.ratio if first.ratio > 0 else 0.0
    is_plain = depth > 1 and gains and all(0.8 < gain < 1.25 for gain in gains) and 0.5 < started < 2.0
    if not is_plain or is_trained(subject) or 0.5 * (1 + depth / 2) <= last.mean_square <= 2 * (1 + 1.5 * depth):
        return
    yield Observation(
        message="The residual stream does not start as plain pre-norm blocks with Xavier's weights do",
        places=[Place(last.module, last.source)],
        evidence=[Evidence(f"mean square after {depth} blocks", last.mean_square, f"{1 + depth / 2:.3g} to {1 + 1.5 * depth:.3g}")],
        advice="See what scales the branches or the shortcut",
    )
