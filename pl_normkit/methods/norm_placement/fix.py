"""The remedy: norms and gains at another place of the blocks."""

from __future__ import annotations

__all__ = ["check_kind", "fold_placed_gains", "place_norms", "placement_records", "restore"]

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pl_normkit.errors import ConfigError, EditError, NothingMatchedError, nearest
from pl_normkit.methods.norm_placement.exits import Exit, find_exits, find_post_norm_exits
from pl_normkit.methods.norm_placement.find import Layout, Site, read_layout
from pl_normkit.methods.norm_placement.fold import fold_edits
from pl_normkit.methods.norm_placement.initialisation import is_trained
from pl_normkit.methods.norm_placement.pieces import PlacedMark, edits_of, placed_in
from pl_normkit.methods.norm_placement.placements import NOT_BY_EDITS, PLACEMENTS, Placement, Plan
from pl_normkit.surgery import Change, Changes, Edit, Filter, apply_edits, get_module
from pl_normkit.values import SetValues
from pl_normkit.wrappers import unwrapped


def place_norms(
    model: nn.Module, kind: str, example_inputs: Any, *, retrain: bool = False, filter_fn: Filter | None = None, **options: Any
) -> Changes:
    """Give the residual blocks of a model another norm placement, or the gains and the start that one asks for, before training.

    | kind | what it does | needs | source |
    |---|---|---|---|
    | "depth_init" | last weights of branches times 1/sqrt(2L), L layers of two branches | a weight layer | derived here; measured |
    | "deepnorm" | norm(alpha x + f), weights of v, output, fc1 and fc2 scaled by beta | post-norm | arXiv 2203.00555 |
    | "lns" | 1/sqrt(l) behind the norms of layer l; for images (`at="output"`) at the branch outputs | pre-norm | arXiv 2502.05795 |
    | "mix" | post-norm in the first `share` of the layers | pre-norm | arXiv 2412.13795 |
    | "post" | norm(x + f(x)) | pre-norm | arXiv 2002.04745 |
    | "pre" | x + f(norm(x)), by the norms that are there | post-norm, a norm before the first block | arXiv 2002.04745 |
    | "peri" | a norm at the output of each branch too | a norm in the branch | arXiv 2502.02732 |
    | "hybrid" | norms of q, k and v for that of the attention, one on the feed-forward's shortcut | pre-norm; q, k, v apart | 2503.04598 |
    | "sdd" | an RMS norm behind each weight layer of the branches | q, k and v apart | arXiv 2502.15499 |
    | "normformer" | gains of heads, a norm behind attention, one inside feed-forwards | pre-norm | arXiv 2110.09456 |
    | "head_scale" | the gains of heads alone; exact | attention | arXiv 2110.09456 |
    | "res_scale" | gains on the shortcuts of feed-forwards alone; exact | pre-norm | arXiv 2110.09456 |

    Old state_dict keys stay, new parameters get keys of their own. A second call changes nothing. "post" and "mix" let the block add
    norm(x + f) - x to x. "ngpt" is refused: `pl_normkit.nn.CausalTransformer(placement="ngpt")` is built that way.

    Args:
        model: edited in place.
        kind: see the table.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Placements that must know where a branch
            ends ("pre", "post", "mix", "hybrid", "normformer" with its shortcut, "res_scale") run them once.
        retrain: also edit a model whose norms are trained, which then computes something else. The exact kinds need no such word.
        filter_fn: called with (block, path), says whether to act in a block. Depth always counts all blocks.
        options: `at` of "lns" ("norm", "output", "auto"), `share` of "mix" (0.25), `scale_residual` of "normformer" (False), `first_block`
            of "hybrid" ("pre", which is HybridNorm*, or "hybrid").

    Returns:
        what was done; the last line has constants and advice. `undo()` gives the model back, weights included.

    Raises:
        ConfigError: for a kind or an option that does not exist.
        EditError: where blocks cannot be reached without rewriting forward, another placement is there already, or the model is trained.
        NothingMatchedError: for a model without residual branches.
        TraceError: when the model cannot be read. The model is untouched in each case.

    >>> import torch
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    >>> print(place_norms(layer, "lns", torch.zeros(5, 2, 8)))
    norm1: times 1
    norm2: times 1
    (the model): placed 'lns': 1/sqrt(layer) at the norm of 1 layers; keep the plain initialisation
    """
    placement = check_kind(kind, options)
    model = unwrapped(model)
    if there := placed_in(model):
        return _there_already(kind, [placed["kind"] for placed in there])
    layout = read_layout(model, example_inputs)
    if not placement.is_exact and not retrain and (name := is_trained(model, layout.graph)):
        raise EditError(
            f"{kind!r} changes what a trained model computes",
            where=name,
            evidence="its values differ from one another, as after training",
            fix="place norms before training; retrain=True does it all the same",
        )
    sites = [site for site in layout.sites if filter_fn is None or filter_fn(get_module(model, site.block), site.block)]
    plan = placement.plan(layout, sites, _exits(layout, sites, placement, example_inputs), {**placement.options, **options})
    if not plan.pieces and not plan.values:
        if plan.notes:
            return Changes(skipped=plan.notes)
        raise NothingMatchedError(f"there is no place for {kind!r}", fix="give a network with such blocks, and a filter that takes some")
    if any(value.is_meta for value in plan.values.values()):
        raise EditError(f"{kind!r} scales weights, and the model is on the meta device", fix="call it once the weights have their values")
    edits: list[Edit] = [*edits_of(model, plan.pieces), *_value_edits(plan)]
    return apply_edits(model, [*edits, PlacedMark(kind, tuple(plan.pieces), f"placed {kind!r}: {plan.words}")], plan.notes)


def check_kind(kind: str, options: Mapping[str, Any]) -> Placement:
    """The placement of that name. Raises ConfigError or EditError, the latter for one that no edit reaches."""
    if kind in NOT_BY_EDITS:
        raise EditError(
            f"{kind!r} cannot be placed without rewriting forward",
            evidence=NOT_BY_EDITS[kind],
            fix="pl_normkit.nn.CausalTransformer(placement='ngpt') is built that way",
        )
    placement = PLACEMENTS.get(kind)
    if placement is None:
        raise ConfigError(f"there is no norm placement {kind!r}", fix=nearest(str(kind), PLACEMENTS) or f"one of {', '.join(PLACEMENTS)}")
    for name in options:
        if name not in placement.options:
            raise ConfigError(f"{kind!r} has no option {name!r}", fix=f"it has {', '.join(placement.options) or 'none'}")
    return placement


def _there_already(kind: str, kinds: Sequence[str]) -> Changes:
    if kind in kinds:
        return Changes(skipped=[Change("", f"{kind!r} is placed already")])
    raise EditError(f"{kinds[0]!r} is placed already", fix="undo it first: the placements do not know of one another")


def _exits(layout: Layout, sites: Sequence[Site], placement: Placement, example_inputs: Any) -> dict[str, Exit]:
    wanted = [norm for site in sites if (norm := placement.exit_norm(site)) is not None]
    paths = [path for norm in wanted if (path := layout.norm_module(norm)) is not None]
    if not paths:
        return {}
    if not placement.is_for_post_norm:
        return find_exits(layout.model, example_inputs, paths)
    every = [path for norm in layout.graph.norms if (path := layout.norm_module(norm)) is not None]
    return find_post_norm_exits(layout.model, example_inputs, paths, every)


def _value_edits(plan: Plan) -> list[Edit]:
    return [SetValues(name.rpartition(".")[0], {name: value}, "scaled by depth, before training") for name, value in plan.values.items()]


def placement_records(prefix: str, model: nn.Module) -> list[dict[str, Any]]:
    """What was placed in `model`, which stands at `prefix` in a LightningModule, for its checkpoint: numbers, strings and lists alone."""
    return [{"room": "norm_placement", "network": prefix, **placed} for placed in placed_in(unwrapped(model))]


def restore(model: nn.Module, record: Mapping[str, Any]) -> Changes:
    """Put back what a record names; weights are those of the checkpoint. Raises EditError where the model has no such modules."""
    model, pieces = unwrapped(model), [dict(piece) for piece in record["pieces"]]
    if any(placed["kind"] == record["kind"] for placed in placed_in(model)):
        return Changes()
    return apply_edits(model, [*edits_of(model, pieces), PlacedMark(record["kind"], tuple(pieces), f"placed {record['kind']!r}")])


def fold_placed_gains(model: nn.Module) -> Changes:
    """Take the constant gains of "lns" and "deepnorm" into the parameters before them, for export: the same function, to rounding.

    norm(x; gamma, beta) s = norm(x; s gamma, s beta), and likewise for the weight and bias of a layer. Where the gain stands at a module
    that has neither, it stays, and `skipped` says so. Do it after training: the gain would be lost to it.

    Raises:
        NothingMatchedError: for a model without such gains.

    Source: derived here from arXiv 2502.05795, eq. 12.

    >>> import torch
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    >>> encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> _ = place_norms(encoder, "lns", torch.zeros(5, 2, 8))
    >>> changes = fold_placed_gains(encoder)
    >>> round(encoder.layers[1].norm1.weight[0].item(), 4)
    0.7071
    """
    model = unwrapped(model)
    edits, skipped = fold_edits(model)
    if not edits and not skipped:
        raise NothingMatchedError("there is no constant gain to fold")
    return apply_edits(model, edits, skipped)
