"""Which average pools a model has, which of them stochastic pooling is meant for, and the swap."""

from __future__ import annotations

__all__ = ["DEFAULT_ROLES", "PoolRole", "is_default_pool", "pool_roles", "stochastic_pooling"]

import re
from enum import StrEnum
from typing import Any

from torch import nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.graph import ModelGraph, Node
from pl_normkit.methods.stochastic_pooling.functional import Scale, check_keep, check_scale
from pl_normkit.methods.stochastic_pooling.modules import (
    StochasticAdaptiveAvgPool1d,
    StochasticAdaptiveAvgPool2d,
    StochasticAvgPool1d,
    StochasticAvgPool2d,
)
from pl_normkit.surgery import Change, Changes, Filter, Replace, apply_edits
from pl_normkit.wrappers import unwrapped

STOCHASTIC: dict[type[nn.Module], type[nn.Module]] = {
    nn.AvgPool1d: StochasticAvgPool1d,
    nn.AvgPool2d: StochasticAvgPool2d,
    nn.AdaptiveAvgPool1d: StochasticAdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: StochasticAdaptiveAvgPool2d,
}
PLAIN = {stochastic: plain for plain, stochastic in STOCHASTIC.items()}
AVERAGE_POOLS = (*STOCHASTIC, nn.AvgPool3d, nn.AdaptiveAvgPool3d)
POOL_OPS = re.compile(r"(adaptive_)?avg_pool[123]d|mean")
_ATTENTION = re.compile(r"(^|_)c?(se|eca|ese|cbam)(_|\d|$)|sq(u)?eeze_?ex|excit|attn|attention|scse|gate|\bse(module|layer|block)")
_PYRAMID = re.compile(r"aspp|psp|ppm|pyramid")
_TRANSITION = re.compile(r"transition")


class PoolRole(StrEnum):
    """What an average pool does in its network."""

    HEAD = "head"
    TRANSITION = "transition"
    PYRAMID = "pyramid"
    SQUEEZE = "squeeze"
    OTHER = "other"


DEFAULT_ROLES = frozenset((PoolRole.HEAD, PoolRole.TRANSITION, PoolRole.PYRAMID))


def pool_roles(model: nn.Module) -> dict[str, PoolRole]:
    """The role of every average-pool module, by path.

    Read from the names and classes around the pool: the squeeze of channel attention (a gate stands beside it), a branch of
    spatial pyramid pooling (ASPP, PSP), a DenseNet transition, a global pool before the classifier, or none of these.

    >>> {path: str(role) for path, role in pool_roles(nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1))).items()}
    {'0': 'other', '1': 'head'}
    """
    return {path: _role(model, path, module) for path, module in model.named_modules() if _is_average_pool(module)}


def _is_average_pool(module: nn.Module) -> bool:
    return isinstance(module, AVERAGE_POOLS)


def _role(model: nn.Module, path: str, module: nn.Module) -> PoolRole:
    holders = [model.get_submodule(".".join(path.split(".")[:depth])) for depth in range(path.count(".") + 1)]
    words = [_words(type(holder).__name__) for holder in holders[1:]] + path.lower().split(".")
    if any(_ATTENTION.search(word) for word in words) or (holders and _holds_gate(holders[-1])):
        return PoolRole.SQUEEZE
    if any(_PYRAMID.search(word) for word in words):
        return PoolRole.PYRAMID
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        sizes = module.output_size if isinstance(module.output_size, tuple | list) else (module.output_size,)
        return PoolRole.HEAD if all(size == 1 for size in sizes) else PoolRole.OTHER
    return PoolRole.TRANSITION if any(_TRANSITION.search(word) for word in words) else PoolRole.OTHER


def _words(name: str) -> str:
    """`SEModule` as `se_module`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _holds_gate(holder: nn.Module) -> bool:
    return any(isinstance(child, nn.Sigmoid | nn.Hardsigmoid) for child in holder.children())


def is_default_pool(model: nn.Module) -> Filter:
    """The filter used where none is given: global heads, transitions and pyramid branches."""
    roles = pool_roles(model)
    return lambda _, path: roles[path] in DEFAULT_ROLES


def stochastic_pooling(
    model: nn.Module,
    keep: float = 0.5,
    filter_fn: Filter | None = None,
    *,
    scale: Scale = "sqrt",
    example_inputs: Any = None,
) -> Changes:
    """Swap average pools for stochastic ones of the same class, which average a random subset of each window while training.

    Evaluation, state_dict and output sizes stay; `changes.undo()` gives the model back. Pools that are stochastic already
    get `keep` and `scale`.

    Args:
        model: edited in place.
        keep: share of each window that stays, in (0, 1].
        filter_fn: called with (pool module, path), says whether to swap it. Default: global heads, DenseNet transitions
            and the branches of ASPP and PSP; channel attention (SE) and all other pools only where a filter asks for them.
        scale: "sqrt", "none", "match" or a number; `measure_second_moments` says which one suits a model.
        example_inputs: when given, the model is traced, and `changes.skipped` also lists pooling that is no module
            (`x.mean((2, 3))`, `F.adaptive_avg_pool2d`).

    Returns:
        What was swapped, and in `skipped` which pools were left alone and why.

    Raises:
        ConfigError: for keep or scale out of range.
        NothingMatchedError: when no pool was chosen; the message lists what is there.
        TraceError: when `example_inputs` are given and the model cannot be traced. The model is untouched in each case.

    Source: arXiv 2409.16630 for swapping pools; which ones by default is derived here.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> changes = stochastic_pooling(model, keep=0.1)
    >>> type(model[1]).__name__
    'StochasticAdaptiveAvgPool2d'
    """
    model = unwrapped(model)
    keep, scale = check_keep(keep), check_scale(scale)
    roles = pool_roles(model)
    wanted = filter_fn or is_default_pool(model)
    graph = None if example_inputs is None else ModelGraph.from_model(model, example_inputs)
    skipped = [] if graph is None else _functional_pools(model, graph)
    edits, matched = [], 0
    for path, role in roles.items():
        module = model.get_submodule(path)
        if not wanted(module, path):
            skipped.append(Change(path, f"{type(module).__name__} in the role of {role}, not chosen by the filter"))
        elif type(module) not in STOCHASTIC and type(module) not in PLAIN:
            skipped.append(Change(path, f"{type(module).__name__} has no stochastic form"))
        else:
            matched += 1
            if (getattr(module, "keep", None), getattr(module, "scale", None)) != (keep, scale):
                edits.append(Replace(path, _stochastic(module, keep, scale), f"stochastic average pooling ({role}), keep={keep}"))
    if not matched:
        raise NothingMatchedError(
            "there is no average pool to make stochastic",
            evidence="; ".join(map(str, skipped)) or "the model has no average-pool module",
            fix="pass filter_fn=lambda module, path: ... to choose others; call stochastic_adaptive_avg_pool where pooling is a function",
        )
    return apply_edits(model, edits, skipped)


def _stochastic(module: nn.Module, keep: float, scale: Scale) -> nn.Module:
    """A stochastic pool with all attributes and hooks of `module`."""
    kind = STOCHASTIC.get(type(module), type(module))
    swapped = kind.__new__(kind)
    swapped.__dict__.update(vars(module))
    swapped.keep, swapped.scale = keep, scale  # type: ignore[assignment]
    return swapped


def _functional_pools(model: nn.Module, graph: ModelGraph) -> list[Change]:
    """Average pooling that no pool module does, with the line that does it."""
    return [
        Change(node.module, f"{node.op} called as a function{f' at {node.source}' if node.source else ''}")
        for node in graph.pools
        if _averages(node) and not _is_average_pool(model.get_submodule(node.module))
    ]


def _averages(node: Node) -> bool:
    return bool(POOL_OPS.fullmatch(node.op)) and (node.op != "mean" or node.is_global_pool)
