"""What a mask of attention says: whether it lets all pass, and how far it is from the causal pattern."""

from __future__ import annotations

__all__ = ["CausalDeparture", "departure_from_causal", "lets_all_pass"]

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

_BLOCKING = -1e4  # additive masks block with -inf or with a number that softmax turns into 0


class CausalDeparture(NamedTuple):
    """How a mask differs from the causal one: by the values it adds to pairs that both allow, and by the share of pairs blocked in one."""

    largest: float
    share: float


def lets_all_pass(mask: Any) -> bool:
    """Whether an operand of the exported graph is the same all-true (or all-zero) mask in every call: computed from constants alone."""
    value = _constant(mask) if isinstance(mask, fx.Node) else None
    return value is not None and bool(value.all() if value.dtype == torch.bool else not value.any())


def _constant(node: fx.Node) -> Tensor | None:
    """The value of a node that depends on no input, parameter or buffer; None for any other."""
    known: dict[fx.Node, Any] = {}
    for step in _before(node):
        if step.op != "call_function" or not isinstance(step.target, torch._ops.OpOverload) or _is_random(step.target):
            return None
        args, kwargs = fx.map_arg((step.args, step.kwargs), lambda arg: known[arg])
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))  # the meta device has no values
        known[step] = step.target(*args, **kwargs)
    return known[node] if isinstance(known[node], Tensor) else None


def _before(node: fx.Node) -> list[fx.Node]:
    """The node and all it is made of, in order of execution."""
    found, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return [step for step in node.graph.nodes if step in found]


def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in target.tags


def departure_from_causal(mask: Tensor, module: nn.Module) -> CausalDeparture | None:
    """How far a mask (..., L, L) that `module` was called with is from the causal one; None where they are the same.

    A boolean mask blocks where it is True in `nn.MultiheadAttention`, and where it is False in `F.scaled_dot_product_attention` and all
    that hands its mask on to it.
    """
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return None
    mask = mask.detach()
    if mask.dtype == torch.bool:
        blocked, added = (mask if isinstance(module, nn.MultiheadAttention) else ~mask), torch.zeros((), device=mask.device)
    elif mask.is_floating_point():
        blocked, added = mask <= _BLOCKING, mask.float()
    else:
        return None
    future = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    open_in_both = ~blocked & ~future
    largest = float(torch.where(open_in_both, added.abs(), 0.0).max())
    share = float((blocked != future).float().mean())
    return CausalDeparture(largest, share) if largest > 0 or share > 0 else None
