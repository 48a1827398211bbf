"""Puts a Gaussian bias into the attention of a model, without editing its code."""

from __future__ import annotations

__all__ = ["add_gaussian_bias"]

import math
from typing import Any

import torch
from torch import nn

from pl_normkit.errors import ConfigError, ModelSpecError, NothingMatchedError, TraceError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.gaussian_bias.find import Site, TracedAttention, read_traced, site_of
from pl_normkit.methods.gaussian_bias.grid import TokenGrid
from pl_normkit.methods.gaussian_bias.modules import GaussianAttentionBias, check_amplitude, check_sigma
from pl_normkit.methods.gaussian_bias.reach import CHILD
from pl_normkit.surgery import Attach, Change, Changes, Edit, Filter, Insert, MixIn, apply_edits
from pl_normkit.wrappers import unwrapped

TOKEN_GRID = "token_grid"


def add_gaussian_bias(
    model: nn.Module,
    *,
    per_head: bool = False,
    amplitude: float = 1.0,
    sigma: float = 5.0,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
) -> Changes:
    """Add a `GaussianAttentionBias` to every self-attention over image patches or windows of `model`, in place.

    The bias becomes the child `gaussian_bias` of the attention module (of its relative position module, or of its softmax, where
    those hold the logits), so its parameters are trained, copied, moved and saved with it and no existing key moves. Do this before
    the optimizer is built and the model is wrapped, compiled or sharded. Twice is as once.

    Args:
        model: timm's ViT, DeiT, DeiT3, BEiT, EVA, relative-position ViT, Swin v1 and v2; torchvision's ViT and Swin; transformers' ViT;
            `nn.MultiheadAttention` and attention of your own where a trace shows them.
        per_head: one amplitude and sigma for each head, instead of one pair for each layer.
        amplitude: start value, not 0; it enters squared.
        sigma: start value in patches. In a window of 7 the default is nearly flat; about a third of the window is a Gaussian there.
        example_inputs: what the model is called with. With it attention is found in a trace, also in classes unknown here, and the
            grid of patches is read there and checked against the tokens; a second trace checks that every bias reaches the logits.
        filter_fn: called with (attention module, path), says whether to add a bias to it; by default all.

    Returns:
        The edits, and in `skipped` which attention was left alone and why; `undo()` gives back the model bit for bit.

    Raises:
        ConfigError: for a start value out of range, or a bias that is there with other heads than asked for.
        NothingMatchedError: when there is no attention, or the filter chose none.
        ModelSpecError: when no attention can be given the bias; the message says why. The model is untouched in each case.
        TraceError: when `example_inputs` are given and the model cannot be traced.

    Source: arXiv 2305.04722 for the bias (published for timm's vit_relpos, where it is added to the learned relative position bias);
    the ways into the other models are derived here.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    >>> changes = add_gaussian_bias(model)
    >>> len(changes.made) > 0, "blocks.0.attn.gaussian_bias.amplitude" in model.state_dict()
    (True, True)
    """
    model = unwrapped(model)
    check_amplitude(amplitude)
    check_sigma(sigma)
    sites, skipped = _find_sites(model, example_inputs, filter_fn, per_head)
    recorders: dict[str, TokenGrid] = {}
    edits: list[Edit] = []
    for site in sites:
        if not _has_bias(model, site, per_head):
            edits += _edits(model, site, per_head, (amplitude, sigma), recorders)
    changes = apply_edits(model, edits, skipped)
    if changes and example_inputs is not None:
        try:
            _check_reached(model, sites, example_inputs)
        except BaseException:
            changes.undo()
            raise
    return changes


def _find_sites(model: nn.Module, example_inputs: Any, filter_fn: Filter | None, per_head: bool) -> tuple[list[Site], list[Change]]:
    traced = read_traced(model, ModelGraph.from_model(model, example_inputs)) if example_inputs is not None else None
    sites: list[Site] = []
    skipped: list[Change] = []
    is_attention = False
    for path, module in model.named_modules():
        seen = None if traced is None else traced.get(path)
        found = site_of(model, path, module, seen) if traced is None or seen is not None else None
        if found is None:
            continue
        is_attention = True
        if filter_fn is not None and not filter_fn(module, path):
            skipped.append(Change(path, "not chosen by the filter"))
        elif isinstance(found, Site) and per_head and not found.has_heads:
            skipped.append(Change(path, f"{type(module).__name__}: its heads are not known, or have no axis in the logits"))
        elif isinstance(found, Site):
            sites.append(_checked(model, found, seen))
        else:
            skipped.append(Change(path, f"{type(module).__name__}: {found}"))
    if not sites:
        raise _nothing_to_do(model, skipped, is_attention=is_attention, is_traced=traced is not None, is_filtered=filter_fn is not None)
    return sites, skipped


def _checked(model: nn.Module, site: Site, traced: TracedAttention | None) -> Site:
    """The site, unless its grid does not fit the tokens that were traced, or patches are dropped before it."""
    fitting = math.prod(site.grid_size) + site.num_prefix_tokens
    if traced is not None and traced.num_queries != fitting:
        raise ModelSpecError(
            f"attention works on {traced.num_queries} tokens, its grid has {site.grid_size[0]} x {site.grid_size[1]} patches "
            f"and {site.num_prefix_tokens} prefix tokens",
            where=site.path,
            fix="leave it out with filter_fn, or use pl_normkit.nn.GaussianAttentionBias in the code",
        )
    owner = model.get_submodule(site.patches.removesuffix("patch_embed.proj").removesuffix(".")) if site.patches else nn.Identity()
    dropped = getattr(getattr(owner, "patch_drop", None), "prob", 0.0)
    if dropped:
        raise ModelSpecError(
            "this model drops patches in training, so its tokens stand on no grid",
            where=site.path,
            evidence=f"patch_drop_rate={dropped:g}",
            fix="build it with patch_drop_rate=0",
        )
    return site


def _check_reached(model: nn.Module, sites: list[Site], example_inputs: Any) -> None:
    """Raise ModelSpecError unless a second trace runs and shows every bias at work."""
    try:
        graph = ModelGraph.from_model(model, example_inputs)
    except TraceError as error:
        raise ModelSpecError(
            "with the Gaussian bias the model no longer runs",
            where=error.where,
            evidence=error.evidence,
            fix="leave layers out with filter_fn",
        ) from error
    read = {read.parameter for node in graph.nodes for read in node.reads}
    lost = [site.path for site in sites if f"{site.host}.{CHILD}.sigma".removeprefix(".") not in read]
    if lost:
        raise ModelSpecError(
            "the Gaussian bias does not reach the logits", where=", ".join(lost), fix="leave these layers out with filter_fn"
        )


def _nothing_to_do(
    model: nn.Module, skipped: list[Change], *, is_attention: bool, is_traced: bool, is_filtered: bool
) -> NothingMatchedError | ModelSpecError:
    name = type(model).__name__
    if not is_attention:
        fix = (
            "is this a network without attention?" if is_traced else "pass example_inputs: then attention of any class is found in a trace"
        )
        where = "trace" if is_traced else "modules"
        return NothingMatchedError(f"no self-attention is known in the {where} of this {name}", fix=fix)
    evidence = "; ".join(map(str, skipped[:4])) + (f" and {len(skipped) - 4} more" if len(skipped) > 4 else "")
    if is_filtered and all(change.what == "not chosen by the filter" for change in skipped):
        return NothingMatchedError("the filter chose no attention module", evidence=evidence)
    return ModelSpecError(
        f"no attention of this {name} can be given a Gaussian bias",
        evidence=evidence,
        fix="use pl_normkit.nn.GaussianAttentionBias in the model's code" + ("" if is_traced else ", or pass example_inputs"),
    )


def _has_bias(model: nn.Module, site: Site, per_head: bool) -> bool:
    """Whether an earlier call was here. Raises ConfigError when it was asked for other heads."""
    there = model.get_submodule(site.host)._modules.get(CHILD)
    if not isinstance(there, GaussianAttentionBias):
        return False
    if (there.num_heads is not None) != per_head:
        kind = "shared by all heads" if there.num_heads is None else "one for each head"
        raise ConfigError("there is a Gaussian bias already", where=site.host, evidence=kind, fix="undo the earlier changes first")
    return True


def _edits(model: nn.Module, site: Site, per_head: bool, start: tuple[float, float], recorders: dict[str, TokenGrid]) -> list[Edit]:
    device, dtype = _placement(model.get_submodule(site.path))
    bias = GaussianAttentionBias(
        site.grid_size, site.num_heads if per_head else None, site.num_prefix_tokens, *start, device=device, dtype=dtype
    )
    edits: list[Edit] = []
    if site.patches:
        bias.follow(_recorder(model, site, recorders, edits))
    elif site.source is not None:
        bias.follow(site.source)
    heads = f"{site.num_heads} heads" if per_head else "all heads alike"
    what = f"Gaussian bias on {site.grid_size[0]} x {site.grid_size[1]} patches, {heads}, amplitude {start[0]:g}, sigma {start[1]:g}"
    if isinstance(site.reach, type):
        return [*edits, Attach(site.host, CHILD, bias, what), MixIn(site.host, site.reach, f"uses its {CHILD}")]
    return [*edits, Attach(site.host, CHILD, bias, what, site.reach)]


def _recorder(model: nn.Module, site: Site, recorders: dict[str, TokenGrid], edits: list[Edit]) -> TokenGrid:
    """The one that stands behind the convolution, or a new one with the edit that puts it there."""
    there = model.get_submodule(site.patches)._modules.get(TOKEN_GRID)
    if isinstance(there, TokenGrid):
        return there
    if site.patches not in recorders:
        recorders[site.patches] = TokenGrid(site.grid_size)
        edits.append(Insert(site.patches, TOKEN_GRID, recorders[site.patches], "tells the biases the grid of patches", where="after"))
    return recorders[site.patches]


def _placement(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of the module's own weights, so that sharding finds one dtype in each group."""
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    return (None, None) if weight is None else (weight.device, weight.dtype)
