"""Finds the attention modules of a model, how each can be given a bias, and the grid its tokens stand on."""

from __future__ import annotations

__all__ = ["Site", "TracedAttention", "read_traced", "site_of"]

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pl_normkit.graph import Attention, ModelGraph, Node
from pl_normkit.methods.gaussian_bias.grid import WindowGrid
from pl_normkit.methods.gaussian_bias.modules import Grid, GridSource
from pl_normkit.methods.gaussian_bias.reach import (
    AddToLogits,
    AddToMask,
    AddToMultiheadMask,
    BiasedBias,
    BiasedCall,
    BiasedRelativePositionBias,
    BiasedRelPosBias,
)
from pl_normkit.surgery import PreHook

MASKS = ("shared_rel_pos_bias", "shared_rel_pos", "attn_mask", "attention_mask")
"""Arguments that timm's and transformers' self-attention adds to its logits."""
ADDITIVE = ("eager", "sdpa")
"""Attention implementations of transformers that add `attention_mask`."""
MOST_PREFIX_TOKENS = 32
_ATTENTION = re.compile(r"Att(entio)?n|ParallelScalingBlock$")
_NO_SELF_ATTENTION = re.compile(r"Pool|Cross|Class|2d")
_PATCH_CONVOLUTIONS = ("patch_embed.proj", "conv_proj", "embeddings.patch_embeddings.projection", "patch_embeddings.projection")


@dataclass(frozen=True)
class Site:
    """One attention module and how the bias gets into it.

    Attributes:
        path: of the attention module.
        host: path of the module whose child the bias becomes: the attention, its relative position module or its softmax.
        reach: a pre-hook of the host, or a mix-in for its class.
        num_heads: heads of the attention, None where it is not known.
        grid_size: rows and columns of the patches.
        num_prefix_tokens: tokens before the patches.
        patches: path of the convolution that makes the patches, "" for windows.
        source: what knows the grid at each call, where that is neither the convolution nor the host.
        has_heads: whether a bias per head is possible.
    """

    path: str
    host: str
    reach: PreHook | type[nn.Module]
    num_heads: int | None
    grid_size: Grid
    num_prefix_tokens: int = 0
    patches: str = ""
    source: GridSource | None = None
    has_heads: bool = True


@dataclass(frozen=True)
class TracedAttention:
    """Attention as the trace shows it.

    Attributes:
        path: of the module that runs it.
        num_queries: tokens that look, `num_keys` those that are looked at.
        runs: how many attention operations the module runs in one pass.
        input_shape: of the first value from outside that the module works on.
        has_heads: whether heads are an axis of the logits of their own.
        patches: the last convolution before it whose map can be its patches, with the grid; None where there is none.
        batch: images in the traced pass.
    """

    path: str
    num_queries: int
    num_keys: int
    runs: int
    input_shape: tuple[int, ...]
    has_heads: bool
    patches: tuple[str, Grid] | None
    batch: int = 0


def read_traced(model: nn.Module, graph: ModelGraph) -> dict[str, TracedAttention]:
    """The attention of the traced pass, by the path of its module; a softmax module counts as its parent."""
    found: dict[str, list[Attention]] = {}
    for attention in graph.attentions:
        path = attention.module
        if isinstance(model.get_submodule(path), nn.Softmax):
            path = path.rpartition(".")[0]
        found.setdefault(path, []).append(attention)
    return {path: _traced(model, graph, path, seen) for path, seen in found.items()}


def _traced(model: nn.Module, graph: ModelGraph, path: str, seen: list[Attention]) -> TracedAttention:
    node = seen[0].node
    if seen[0].fused:  # a learned query is no operation on the input, so the graph is asked
        query, key = (node.argument(name, position, None).meta["val"].shape for position, name in enumerate(("query", "key")))
        logits = (*query[:-1], key[-2])
    else:
        logits = node.shape
    patches = _patches_before(model, graph, node, int(logits[-2]))
    batch = graph.nodes[0].shape[0] if graph.nodes[0].shape else 0
    return TracedAttention(path, int(logits[-2]), int(logits[-1]), len(seen), _input_shape(graph, path), len(logits) > 3, patches, batch)


def _input_shape(graph: ModelGraph, path: str) -> tuple[int, ...]:
    inside = [node for node in graph.nodes if node.module == path or node.module.startswith(f"{path}.")]
    return next((source.shape for node in inside for source in node.inputs if source not in inside), ())


def _patches_before(model: nn.Module, graph: ModelGraph, attention: Node, num_tokens: int) -> tuple[str, Grid] | None:
    upstream = {attention}
    for node in reversed(graph.nodes[: attention.index + 1]):
        if node not in upstream:
            continue
        upstream.update(node.inputs)
        if "conv" in node.op and len(node.shape) == 4 and isinstance(model.get_submodule(node.module), nn.Conv2d):
            grid = (node.shape[-2], node.shape[-1])
            if 0 <= num_tokens - math.prod(grid) <= MOST_PREFIX_TOKENS:
                return node.module, grid
    return None


def site_of(model: nn.Module, path: str, module: nn.Module, traced: TracedAttention | None) -> Site | str | None:
    """How the bias gets into the attention module at `path`; a text says why it cannot, None that this is no self-attention."""
    if traced is not None and traced.num_queries != traced.num_keys:
        return f"{traced.num_queries} queries look at {traced.num_keys} keys, which is no self-attention"
    windowed = _windowed_site(path, module)
    if windowed is not None:
        return windowed
    reach: PreHook | type[nn.Module] | None = _reach_of(module)
    if reach is None and traced is None:
        return None
    if traced is not None and (reach is None or (isinstance(reach, AddToMask) and len(traced.input_shape) != 3)):
        if traced.runs > 1:
            return f"its forward runs {traced.runs} attentions and takes no mask"
        reach = BiasedCall
    if isinstance(reach, AddToMask) and reach.argument == "attention_mask" and _implementation(module) not in ADDITIVE:
        return f"the attention implementation {_implementation(module)!r} adds no mask; use 'sdpa' or 'eager'"
    assert reach is not None
    return _site_on_patches(model, path, module, reach, traced)


def _implementation(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "_attn_implementation", "eager"))


def _windowed_site(path: str, module: nn.Module) -> Site | None:
    """Attention whose position bias is a method of it or of its child, on a `window_size` that they know."""
    prefix = f"{path}." if path else ""
    rel_pos = getattr(module, "rel_pos", None)
    if isinstance(rel_pos, nn.Module) and hasattr(rel_pos, "get_bias") and hasattr(rel_pos, "window_size"):
        tokens = int(getattr(rel_pos, "prefix_tokens", 0))
        return Site(path, f"{prefix}rel_pos", BiasedBias, _heads(module), _window(rel_pos), tokens)
    if not hasattr(module, "window_size") or "shared_rel_pos_bias" in _parameters(module):
        return None
    if hasattr(module, "_get_rel_pos_bias"):
        return Site(path, path, BiasedRelPosBias, _heads(module), _window(module))
    if hasattr(module, "get_relative_position_bias"):
        return Site(path, path, BiasedRelativePositionBias, _heads(module), _window(module))
    if isinstance(getattr(module, "softmax", None), nn.Softmax) and hasattr(module, "cpb_mlp"):
        return Site(path, f"{prefix}softmax", AddToLogits(), _heads(module), _window(module), source=WindowGrid((module,)))
    return None


def _window(module: Any) -> Grid:
    rows, columns = module.window_size
    return int(rows), int(columns)


def _reach_of(module: nn.Module) -> PreHook | None:
    if isinstance(module, nn.MultiheadAttention):
        return AddToMultiheadMask()
    name = type(module).__name__
    if not _ATTENTION.search(name) or _NO_SELF_ATTENTION.search(name) or _heads(module) is None:
        return None
    positions = _parameters(module)
    argument = next((mask for mask in MASKS if mask in positions), None)
    return None if argument is None else AddToMask(argument, positions[argument], positions.get("is_causal", -1))


def _parameters(module: nn.Module) -> dict[str, int]:
    """Names of the arguments of its forward, with their positions."""
    return {name: position for position, name in enumerate(inspect.signature(module.forward).parameters)}


def _heads(module: nn.Module) -> int | None:
    heads = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
    return heads if isinstance(heads, int) else None


def _site_on_patches(
    model: nn.Module, path: str, module: nn.Module, reach: PreHook | type[nn.Module], traced: TracedAttention | None
) -> Site | str:
    """Attention over all patches of the image, whose grid the convolution that makes them shows."""
    if traced is not None:
        if traced.patches is None:
            return f"no convolution before it makes a grid that fits its {traced.num_queries} tokens"
        if not _attends_over_input(module, traced):
            return f"its {traced.num_queries} tokens are not those of its input {traced.input_shape}"
        (convolution, grid), heads = traced.patches, _heads(module)
        has_heads = heads is not None and (traced.has_heads or reach is not BiasedCall)
        return Site(path, path, reach, heads, grid, traced.num_queries - math.prod(grid), convolution, has_heads=has_heads)
    for owner_path, owner in _owners(model, path):
        convolution = next((name for name in _PATCH_CONVOLUTIONS if _is_convolution(owner, name)), "")
        if convolution:
            known, tokens = _known_grid(owner, convolution), _prefix_tokens(owner, convolution)
            if known is None or tokens is None:
                return "its grid of patches is known from a trace only; pass example_inputs"
            return Site(path, path, reach, _heads(module), known, tokens, f"{owner_path}.{convolution}" if owner_path else convolution)
    return "no patch embedding is known for it; pass example_inputs to have its grid read from a trace"


def _attends_over_input(module: nn.Module, traced: TracedAttention) -> bool:
    """Whether the tokens are those of the module's input, of whole images: not channels, nor windows folded into the batch."""
    shape = traced.input_shape
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        return len(shape) == 3 and shape[:2] == (traced.num_queries, traced.batch)
    if len(shape) == 3:
        return shape[:2] == (traced.batch, traced.num_queries)
    return len(shape) == 4 and shape[0] == traced.batch and traced.num_queries in (math.prod(shape[1:3]), math.prod(shape[2:]))


def _owners(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules around `path`, innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield path, model.get_submodule(path)


def _is_convolution(owner: nn.Module, path: str) -> bool:
    found: Any = owner
    for name in path.split("."):
        found = getattr(found, name, None)
    return isinstance(found, nn.Conv2d)


def _known_grid(owner: nn.Module, convolution: str) -> Grid | None:
    """The grid the model was built for: timm's `grid_size`, or image over patch size."""
    embedding = owner.get_submodule(convolution.rpartition(".")[0]) if "." in convolution else owner
    grid = getattr(embedding, "grid_size", None)
    if grid is not None:
        return int(grid[0]), int(grid[1])
    image, patch = getattr(embedding, "image_size", None), getattr(embedding, "patch_size", None)
    if image is None or patch is None:
        return None
    images, patches = ((size, size) if isinstance(size, int) else tuple(size) for size in (image, patch))
    return images[0] // patches[0], images[1] // patches[1]


def _prefix_tokens(owner: nn.Module, convolution: str) -> int | None:
    tokens = getattr(owner, "num_prefix_tokens", None)
    if isinstance(tokens, int):
        return tokens
    holder: Any = owner.get_submodule(convolution.split(".")[0]) if convolution.startswith("embeddings.") else owner
    found = [getattr(holder, name, None) for name in ("cls_token", "class_token", "distillation_token", "dist_token", "register_tokens")]
    lengths = [token.shape[-2] for token in found if isinstance(token, nn.Parameter) and token.dim() >= 2]
    return sum(lengths) if lengths else None
