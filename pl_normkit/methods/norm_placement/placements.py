"""What each placement puts where, and what it needs of the blocks."""

from __future__ import annotations

__all__ = ["NOT_BY_EDITS", "PLACEMENTS", "Placement", "Plan"]

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pl_normkit.errors import ConfigError, EditError
from pl_normkit.graph import Norm
from pl_normkit.methods.norm_placement.exits import Exit
from pl_normkit.methods.norm_placement.find import Layout, Site
from pl_normkit.methods.norm_placement.initialisation import attention_weights, deepnorm_constants, depth_values, xavier_values
from pl_normkit.methods.norm_placement.pieces import Piece
from pl_normkit.surgery import Change

_EPS = {"layer": 1e-5, "rms": 1e-6}
Exits = Mapping[str, Exit]


@dataclass
class Plan:
    """What a placement does.

    Attributes:
        pieces: what to insert.
        values: new weights, by name.
        notes: what it leaves alone, and why.
        words: constants and advice, in one line.
    """

    pieces: list[Piece] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    notes: list[Change] = field(default_factory=list)
    words: str = ""


@dataclass(frozen=True)
class Placement:
    """One placement.

    Attributes:
        plan: from (layout, the sites to act on, exits of entry norms, options) to what is to be done. Raises EditError.
        options: its options and their defaults.
        exit_norm: the norm of a site by which its exit module is found, None where that is not needed.
        is_for_post_norm: whether that norm is the one behind the addition.
        is_exact: whether a trained model computes the same after it.
    """

    plan: Callable[[Layout, list[Site], Exits, Mapping[str, Any]], Plan]
    options: Mapping[str, Any] = field(default_factory=dict)
    exit_norm: Callable[[Site], Norm | None] = lambda site: None
    is_for_post_norm: bool = False
    is_exact: bool = False


def refuse(kind: str, site: Site, reason: str, fix: str = "") -> EditError:
    return EditError(
        f"{kind!r} cannot be placed without rewriting forward",
        where=site.last.module or site.add.module,
        evidence=reason,
        fix=fix or "write the block with its norms where they are wanted",
    )


def _depth_init(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    count = len(layout.sites)
    factor = 1 / math.sqrt(count)
    plan = Plan(words=f"last weights of branches times 1/sqrt({count}) = {factor:.4g}; it does not replace warm-up at high learning rates")
    for site in sites:
        if site.output_norm is not None:
            plan.notes.append(Change(site.last.module, f"{site.output_norm.module} behind it would undo the scale"))
        else:
            for node in site.ends:
                plan.values |= depth_values(layout, node, factor)
    return plan


def _refuse_two_stacks(layout: Layout, kind: str) -> None:
    decoders = _decoder_layers(layout)
    if decoders and decoders != {site.layer for site in layout.sites}:
        site = next(site for site in layout.sites if site.layer in decoders)
        raise refuse(
            kind, site, "some layers have a second attention: encoder and decoder count apart", "call place_norms on each of the two"
        )


def _decoder_layers(layout: Layout) -> set[int]:
    """Layers with two attentions, the second of which reads an encoder."""
    attending = Counter(site.layer for site in layout.sites if site.heads)
    return {layer for layer, count in attending.items() if count > 1}


def _lns(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    at = options["at"]
    if at not in ("auto", "norm", "output"):
        raise ConfigError(f'lns acts at "norm" or "output", not {at!r}', fix='"auto" takes the output for images')
    at = ("output" if layout.takes_images else "norm") if at == "auto" else at
    _refuse_two_stacks(layout, "lns")
    plan = Plan(words=f"1/sqrt(layer) at the {at} of {layout.depth} layers; keep the plain initialisation")
    for site in sites:
        if site.scale:
            raise refuse("lns", site, f"{site.scale} scales the branch already", "build the model without LayerScale")
        value = 1 / math.sqrt(site.layer)
        if at == "norm":
            plan.pieces.append({"piece": "gain", "at": _entry(layout, site, "lns"), "side": "after", "value": value})
        else:
            if site.output_norm is not None:
                raise refuse("lns", site, f"{site.output_norm.module} behind it would undo the gain")
            path, side = _output(layout, site, "lns")
            plan.pieces.append({"piece": "gain", "at": path, "side": side, "value": value})
    plan.pieces = [piece for index, piece in enumerate(plan.pieces) if piece not in plan.pieces[:index]]
    plan.notes += _small_start(layout, sites)
    return plan


def _small_start(layout: Layout, sites: list[Site]) -> list[Change]:
    """Branches whose last weights start much smaller than their other weights."""
    small = [site for site in sites if _spread(layout, site) < 0.5]
    if not small or len(small) < len(sites) / 2:
        return []
    what = "the last weights of branches start smaller with depth already, which weakens lns (its authors); start them as the other weights"
    return [Change(small[0].last.module, what)]


def _spread(layout: Layout, site: Site) -> float:
    def of(name: str) -> float:
        parameter = layout.model.get_parameter(name)
        return float(parameter.detach().double().std()) if not parameter.is_meta else math.nan

    others = [of(layout.weight_name(node)) for node in site.weights[:-1]]
    return of(layout.weight_name(site.last)) / max(others) if others and max(others) > 0 else math.nan


def _mix(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    _refuse_two_stacks(layout, "mix")
    share = options["share"]
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError("share is above 0 and at most 1", where="place_norms", evidence=repr(share), fix="0.25 is the authors' default")
    count = round(share * layout.depth)
    if count == 0:
        raise ConfigError(
            f"a share of {share:g} of {layout.depth} layers is none", where="place_norms", fix=f"share={1 / layout.depth:.2g}"
        )
    plan = _behind(layout, [site for site in sites if site.layer <= count], exits, "mix")
    plan.words = f"the first {count} of {layout.depth} layers post-norm, the others pre-norm; warm up over a tenth of the steps"
    return plan


def _post(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    plan = _behind(layout, sites, exits, "post")
    plan.words = "norms behind the additions; a final norm stays. Warm up over thousands of steps, deep ones may not train at all"
    return plan


def _behind(layout: Layout, sites: list[Site], exits: Exits, kind: str) -> Plan:
    plan = Plan()
    for site in sites:
        if layout.is_parallel(site):
            raise refuse(kind, site, "parallel branches share one addition")
        _refuse_output_norm(site, kind)
        norm = _entry(layout, site, kind)
        plan.pieces.append({"piece": "behind", "at": _exit(site, norm, exits, kind), "side": "after", "norm": norm})
    return plan


def _peri(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    plan = Plan(words="a norm at the output of each branch; learning rate and warm-up as for pre-norm, no decay on its scales")
    for site in sites:
        if site.output_norm is not None:
            plan.notes.append(Change(site.last.module, f"{site.output_norm.module} stands behind it already"))
            continue
        if site.norm is None:
            raise refuse("peri", site, "no norm stands before its weight layers", "build the model with pre-norm")
        path, side = _output(layout, site, "peri")
        plan.pieces.append(_norm_piece(layout, site, path, side, site.last.shape[layout.axis(site.last)], layout.axis(site.last)))
    return plan


def _norm_piece(layout: Layout, site: Site, path: str, side: str, width: int, axis: int) -> Piece:
    assert site.norm is not None
    if site.norm.kind not in ("layer", "rms"):
        raise refuse("an output norm", site, f"{site.norm.module} is a {site.norm.kind} norm, not a layer or RMS norm")
    eps, has_bias = _eps_of(layout, site.norm), bool(site.norm.beta)
    options = {"kind": site.norm.kind, "width": width, "eps": eps, "axis": axis, "bias": has_bias}
    return {"piece": "norm", "at": path, "side": side, **options}


def _eps_of(layout: Layout, norm: Norm) -> float:
    module = layout.model.get_submodule(norm.module)
    found = next((value for name in ("eps", "variance_epsilon") if isinstance(value := getattr(module, name, None), float)), None)
    return found or _EPS.get(norm.kind, 1e-5)


def _normformer(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    plan = Plan(words="head gains, a norm behind attention and one in the feed-forward; raise the learning rate (125M: 3e-3, 1.3B: 6e-4)")
    for site in sites:
        _entry(layout, site, "normformer")
        _refuse_several_ends(site, "normformer")
        path = layout.weight_module(site.last)
        if path is None:
            raise refuse("normformer", site, "its last weight layer is no module that is called, once")
        width = site.last.shape[layout.axis(site.last)]
        if site.heads:
            plan.pieces.append({"piece": "heads", "at": path, "side": "before", "heads": site.heads})
            plan.pieces.append(_norm_piece(layout, site, path, "after", width, layout.axis(site.last)))
        else:
            inner = site.last.inputs[0].shape[layout.axis(site.last)]
            plan.pieces.append(_norm_piece(layout, site, path, "before", inner, layout.axis(site.last)))
    if options["scale_residual"]:
        plan.pieces += _shortcut_gains(layout, sites, exits, "normformer")
    return plan


def _head_gains(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    plan = Plan(words="a gain of 1 for each head; the function stays, in training and after it")
    for site in (site for site in sites if site.heads):
        _refuse_several_ends(site, "head_scale")
        path = layout.weight_module(site.last)
        if path is None:
            raise refuse("head_scale", site, "the output projection of its attention is no module that is called, once")
        plan.pieces.append({"piece": "heads", "at": path, "side": "before", "heads": site.heads})
    return plan


def _residual_gains(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    plan = Plan(words="a gain of 1 for each channel of the shortcuts around feed-forwards; the function stays, in training and after it")
    plan.pieces = _shortcut_gains(layout, sites, exits, "res_scale")
    return plan


def _shortcut_gains(layout: Layout, sites: list[Site], exits: Exits, kind: str) -> list[Piece]:
    pieces = []
    for site in (site for site in sites if not site.heads):
        if layout.is_parallel(site):
            raise refuse(kind, site, "parallel branches share one shortcut")
        norm = _entry(layout, site, kind)
        assert site.norm is not None
        axis = 1 if "conv" in site.weights[0].op and len(site.add.shape) > 3 else -1
        options = {"norm": norm, "width": site.add.shape[axis], "axis": axis}
        pieces.append({"piece": "shortcut", "at": _exit(site, norm, exits, kind), "side": "after", **options})
    return pieces


def _deepnorm(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    decoders = _decoder_layers(layout)
    encoders = {site.layer for site in layout.sites} - decoders
    if decoders and not encoders:  # a decoder that reads the states of an encoder elsewhere
        of_encoder, of_decoder = (1.0, 1.0), deepnorm_constants(1, len(decoders))[1]
    else:
        of_encoder, of_decoder = deepnorm_constants(len(encoders), len(decoders))
    plan = Plan()
    for site in sites:
        if site.post_norm is None:
            reason = f"{site.norm.module} stands before the branch" if site.norm else "no norm reads the sum alone"
            raise refuse("deepnorm", site, f"it is for post-norm blocks, and {reason}", "build the model with post-norm")
        alpha, beta = of_decoder if site.layer in decoders else of_encoder
        path, side = _output(layout, site, "deepnorm")
        plan.pieces.append({"piece": "gain", "at": path, "side": side, "value": 1 / alpha})
        plan.values |= xavier_values(layout, site, beta)
    kinds = [(f"{len(part)} layers", *constants) for part, constants in ((encoders, of_encoder), (decoders, of_decoder)) if part]
    said = ", ".join(f"{layers}: alpha {alpha:.4g}, beta {beta:.4g}" for layers, alpha, beta in kinds)
    plan.words = f"{said}; norm(alpha x + f) as norm(x + f / alpha), equal up to eps. Warm-up still helps at high learning rates"
    return plan


def _refuse_output_norm(site: Site, kind: str) -> None:
    if site.output_norm is not None:
        raise refuse(kind, site, f"{site.output_norm.module} stands behind it already, as in Peri-LN", "build the model with pre-norm")


def _entry(layout: Layout, site: Site, kind: str) -> str:
    if site.norm is None or not site.is_entry:
        fix = "build the model with pre-norm" if site.post_norm is not None else ""
        raise refuse(kind, site, "no norm stands at the entry of the branch", fix)
    path = layout.norm_module(site.norm)
    if path is None:
        raise refuse(
            kind, site, f"the norm at its entry ({site.norm.module or 'in the model itself'}) is no module of its own, called once"
        )
    return path


def _refuse_several_ends(site: Site, kind: str) -> None:
    if len(site.ends) > 1:
        several = " and ".join(node.module for node in site.ends[:2])
        raise refuse(kind, site, f"its output is a sum of what {several} give", "write the block with a module at the end of each branch")


def _output(layout: Layout, site: Site, kind: str) -> tuple[str, str]:
    _refuse_several_ends(site, kind)
    place = layout.output_place(site)
    if place is None:
        raise refuse(kind, site, "its last weight layer is no module that is called, once, and no dropout of its own follows")
    return place


def _exit(site: Site, norm: str, exits: Exits, kind: str) -> str:
    if norm not in exits:
        reason = "what is added to the stream is the output of no module that is called once"
        raise refuse(kind, site, reason, "give each branch a module at its end, or switch off a dropout that branches share")
    return exits[norm].path


def _pre(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    plan = Plan(words="the norm behind each addition acts before the next branch, the last one is the final norm; warm-up matters less")
    if len(sites) != len(layout.sites):
        raise ConfigError("'pre' is placed in all blocks or none", where="place_norms", fix="call it without filter_fn")
    for site in sites:
        if site.post_norm is None:
            raise refuse("pre", site, "no norm reads the sum alone", "its blocks are not post-norm: leave them")
        path = layout.norm_module(site.post_norm)
        if path is None or path not in exits:
            reason = "what is added is not the output of a norm and of a module that is called once"
            raise refuse("pre", site, reason, "give the model a norm before its first block, and each branch a module at its end")
        end = exits[path]
        plan.pieces.append({"piece": "ahead", "at": end.path, "side": "after", "norm": end.norm, "dropout": end.dropout})
    return plan


def _hybrid(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    first = options["first_block"]
    if first not in ("pre", "hybrid"):
        raise ConfigError(f'the first block is "pre" or "hybrid", not {first!r}', fix='"pre" is HybridNorm*')
    plan = Plan(words="start the last weights of branches at 1/sqrt(2L) of the others (its authors); learning rate 3e-4 for 1.2B and 7B")
    for site in sites:
        if layout.is_parallel(site):
            raise refuse("hybrid", site, "parallel branches share one addition")
        _refuse_output_norm(site, "hybrid")
        norm, is_kept = _entry(layout, site, "hybrid"), first == "pre" and site.layer == 1
        if site.heads:
            plan.pieces += _head_norms(layout, site)
            plan.pieces += [] if is_kept else [{"piece": "idle", "at": norm}]
        elif not is_kept:
            plan.pieces.append({"piece": "on_shortcut", "at": _exit(site, norm, exits, "hybrid"), "side": "after", "norm": norm})
    return plan


def _head_norms(layout: Layout, site: Site) -> list[Piece]:
    asking, giving = attention_weights(site)
    assert site.norm is not None
    if not giving:
        raise refuse(
            "hybrid", site, "its keys and values are made of other states (cross-attention)", "give a model without cross-attention"
        )
    if len(asking) != 2 or len(giving) != 1 or asking & giving:
        raise refuse("hybrid", site, "queries, keys and values have no layer each", "build the attention with a layer for each")
    if any(norm.node in site.branch and norm is not site.norm for norm in layout.graph.norms if norm.node.index < site.last.index):
        raise refuse("hybrid", site, "its attention normalizes already", "build the attention without norms of its own")
    places = [layout.weight_module(node) for node in (*asking, *giving)]
    width = max(node.shape[-1] for node in asking) // site.heads
    if any(path is None for path in places):
        raise refuse("hybrid", site, "a layer of queries, keys or values is no module that is called, once")
    eps = _eps_of(layout, site.norm)
    return [{"piece": "head_norm", "at": path, "side": "after", "width": width, "eps": eps} for path in sorted(filter(None, places))]


def _sdd(layout: Layout, sites: list[Site], exits: Exits, options: Mapping[str, Any]) -> Plan:
    last = 1 / math.sqrt(layout.depth)
    plan = Plan(words=f"last norms of branches start at 1/sqrt({layout.depth}); learning rate 3e-4, gradients clipped at 1 (its authors)")
    for site in sites:
        asking, giving = attention_weights(site)
        _refuse_output_norm(site, "sdd")
        _refuse_several_ends(site, "sdd")
        for node in site.weights:
            path, axis = layout.weight_module(node), layout.axis(node)
            if path is None or node in asking & giving:
                why = "a layer of it is no module that is called, once" if path is None else "one layer makes queries, keys and values"
                raise refuse("sdd", site, why, "build the attention with a layer for each")
            norm = {"kind": "rms", "width": node.shape[axis], "eps": 1e-6, "axis": axis, "bias": False}
            plan.pieces.append({"piece": "norm", "at": path, "side": "after", **norm, "scale": last if node is site.last else 1.0})
    return plan


def _entry_norm(site: Site) -> Norm | None:
    return site.norm if site.is_entry else None


def _feed_forward_norm(site: Site) -> Norm | None:
    return None if site.heads else _entry_norm(site)


PLACEMENTS: dict[str, Placement] = {
    "depth_init": Placement(_depth_init),
    "deepnorm": Placement(_deepnorm),
    "lns": Placement(_lns, {"at": "auto"}),
    "mix": Placement(_mix, {"share": 0.25}, exit_norm=_entry_norm),
    "post": Placement(_post, exit_norm=_entry_norm),
    "pre": Placement(_pre, exit_norm=lambda site: site.post_norm, is_for_post_norm=True),
    "peri": Placement(_peri),
    "normformer": Placement(_normformer, {"scale_residual": False}, exit_norm=_feed_forward_norm),
    "hybrid": Placement(_hybrid, {"first_block": "pre"}, exit_norm=_feed_forward_norm),
    "sdd": Placement(_sdd),
    "head_scale": Placement(_head_gains, is_exact=True),
    "res_scale": Placement(_residual_gains, exit_norm=_feed_forward_norm, is_exact=True),
}

NOT_BY_EDITS = {"ngpt": "nGPT normalizes weights after each optimizer step, interpolates instead of adding, and scales queries and keys"}
"""Placements that no edit of submodules reaches, and why."""
