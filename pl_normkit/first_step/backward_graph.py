"""Facts of the loss's autograd graph, read before its backward and without running anything."""

from __future__ import annotations

__all__ = ["dead_shares", "explained_by_zeros", "initial_loss", "silenced", "stacked_activations"]

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.first_step.autograd_nodes import RESHAPES, GraphView, output_shape, saved_tensor, through_reshapes
from pl_normkit.first_step.facts import InitialLoss, Silenced, StackedActivation
from pl_normkit.graph.autograd import base, behind, saved

_WORDS = {
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Logsumexp": "log_softmax",
    "Sigmoid": "sigmoid",
    "LogSigmoid": "logsigmoid",
    "LogSigmoidForward": "logsigmoid",
    "BinaryCrossEntropyWithLogits": "binary_cross_entropy_with_logits",
    "NllLoss": "nll_loss",
    "NllLossNd": "nll_loss",
    "NllLoss2D": "nll_loss",
    "SoftMarginLoss": "soft_margin_loss",
}
_APPLIED_BEFORE = {
    "LogSoftmax": ("Softmax", "LogSoftmax", "Sigmoid"),
    "BinaryCrossEntropyWithLogits": ("Sigmoid", "Softmax", "LogSoftmax", "LogSigmoid"),
    "LogSigmoid": ("Sigmoid", "Softmax"),
    "Logsumexp": ("Softmax",),
    "Softmax": ("Softmax",),
    "Sigmoid": ("Sigmoid",),
    "NllLoss": ("Softmax", "Sigmoid"),
    "NllLoss2D": ("Softmax", "Sigmoid"),
    "SoftMarginLoss": ("Sigmoid",),
}
_CLAMPS = frozenset(("Clamp", "ClampMin", "ClampMax"))
_NLL = frozenset(("NllLoss", "NllLoss2D", "NllLossNd"))


def stacked_activations(graph: GraphView) -> tuple[StackedActivation, ...]:
    """Softmaxes and sigmoids in the tail that run into a function which applies one itself."""
    found: dict[StackedActivation, None] = {}
    for node in graph.tail:
        second = base(node)
        first = _through_clamps(next(iter(behind(node)), None))
        if first is None or base(first) not in _APPLIED_BEFORE.get(second, ()):
            continue
        nll = any(base(user) in _NLL for user in _through_users(graph, node))
        if base(first) in ("Sigmoid", "LogSoftmax") and second == "LogSoftmax" and not nll:
            continue  # scores squashed on purpose, or a harmless repetition, in a loss of the user's own
        if _normalize_the_same(first, node):
            loss = "cross_entropy" if nll and second == "LogSoftmax" else ""
            loss = _WORDS[second] if second.endswith(("Loss", "Logits", "2D")) else loss
            found[StackedActivation(_WORDS[base(first)], _WORDS[second], loss)] = None
    return tuple(found)


def _through_clamps(node: Node | None) -> Node | None:
    """As `through_reshapes`, and past what keeps probabilities off 0 and 1."""
    node = through_reshapes(node)
    while node is not None and base(node) in _CLAMPS:
        node = through_reshapes(next(iter(behind(node)), None))
    return node


def _through_users(graph: GraphView, node: Node) -> Iterator[Node]:
    waiting = [node]
    while waiting:
        for user, _ in graph.users[waiting.pop()]:
            yield user
            if through_reshapes(user) is not user:
                waiting.append(user)


def _normalize_the_same(first: Node, second: Node) -> bool:
    """Two softmaxes over dimensions of one size; other pairs always do."""
    if "Softmax" not in base(first) or not ("Softmax" in base(second) or base(second) == "Logsumexp"):
        return True
    return _softmax_size(first) == _softmax_size(second)


def _softmax_size(node: Node) -> int:
    shape = output_shape(node) or ()
    if base(node) == "Logsumexp":
        summed, dims = saved_tensor(node, "self"), saved(node, "dim")
        return 1 if summed is None or len(dims) != 1 else summed.shape[_signed(dims[0])]
    return shape[_signed(saved(node, "dim")) % len(shape)] if shape else 1


def _signed(number: Any) -> int:
    """Autograd shows some negative integers as unsigned ones."""
    value = int(number or 0)
    return value - 2**64 if value >= 2**63 else value


def dead_shares(graph: GraphView) -> dict[str, float]:
    """For every ReLU the share of its units that were 0 for the whole batch, by the name of a parameter of the layer before it."""
    found: dict[str, float] = {}
    for node in graph.nodes:
        result = saved_tensor(node, "result") if base(node) == "Relu" else None
        name = graph.nearest_parameter(node) if result is not None else ""
        if result is not None and name:
            found.setdefault(name, _dead_share(result))
    return found


def _dead_share(result: Tensor) -> float:
    """A unit that is alive for the first samples is alive; where all are, the rest need not be read."""
    if result.dim() > 1 and bool((_largest_by_unit(result[:4]) > 0).all()):
        return 0.0
    return float((_largest_by_unit(result) <= 0).float().mean())


def _unit_dim(result: Tensor) -> int:
    return -1 if result.dim() in (1, 3) else min(1, result.dim() - 1)


def _largest_by_unit(result: Tensor) -> Tensor:
    dim = _unit_dim(result) % max(result.dim(), 1)
    others = [other for other in range(result.dim()) if other != dim]
    return result.amax(others) if others else result


def _none_is(value: Tensor, passes: Callable[[Tensor], Tensor]) -> bool:
    """Whether no element passes; the first sample alone tells it nearly always."""
    if value.dim() > 1 and bool(passes(value[:1]).any()):
        return False
    return not bool(passes(value).any())


def _relu(node: Node) -> bool | None:
    result = saved_tensor(node, "result")
    return None if result is None else _none_is(result, lambda part: part)


def _sigmoid(node: Node) -> bool | None:
    result = saved_tensor(node, "result")
    return None if result is None else _none_is(result, lambda value: value * (1 - value))


def _tanh(node: Node) -> bool | None:
    result = saved_tensor(node, "result")
    return None if result is None else _none_is(result, lambda value: 1 - value * value)


def _threshold(node: Node) -> bool | None:
    return _outside(float(saved(node, "threshold")), math.inf)(node)


def _smooth(node: Node) -> bool | None:
    """A function that is flat where its argument is far below 0, by its own derivative there."""
    value = saved_tensor(node, "self")
    return None if value is None else _none_is(value, _SMOOTH[base(node)])


def _derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def at(value: Tensor) -> Tensor:
        with torch.enable_grad():
            argument = value.detach().requires_grad_()
            return torch.autograd.grad(function(argument).sum(), argument)[0]

    return at


_SMOOTH = {"Gelu": _derivative(F.gelu), "Silu": _derivative(F.silu), "Softplus": _derivative(F.softplus), "Mish": _derivative(F.mish)}


def _softmax(node: Node) -> bool | None:
    return _sigmoid(node) if _softmax_size(node) > 1 else None


def _outside(low: float, high: float) -> Callable[[Node], bool | None]:
    def check(node: Node) -> bool | None:
        value = saved_tensor(node, "self")
        return None if value is None else _none_is(value, lambda part: (part > low) & (part < high))

    return check


def _clamp(node: Node) -> bool | None:
    low, high = (saved(node, name) for name in ("min", "max"))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    return _outside(-math.inf if low is None else float(low), math.inf if high is None else float(high))(node)


def _hardtanh(node: Node) -> bool | None:
    return _outside(float(saved(node, "min_val")), float(saved(node, "max_val")))(node)


_SATURATING: dict[str, tuple[str, Callable[[Node], bool | None]]] = {
    "Relu": ("relu", _relu),
    "Sigmoid": ("sigmoid", _sigmoid),
    "Tanh": ("tanh", _tanh),
    "Softmax": ("softmax", _softmax),
    "Clamp": ("clamp", _clamp),
    "ClampMin": ("clamp", _clamp),
    "ClampMax": ("clamp", _clamp),
    "Threshold": ("threshold", _threshold),
    "Gelu": ("gelu", _smooth),
    "Silu": ("silu", _smooth),
    "Softplus": ("softplus", _smooth),
    "Mish": ("mish", _smooth),
    "Hardtanh": ("hardtanh", _hardtanh),
    "Hardsigmoid": ("hardsigmoid", _outside(-3, 3)),
    "Hardswish": ("hardswish", _outside(-3, math.inf)),
}
_STEPS = {"Round": "round", "Floor": "floor", "Ceil": "ceil", "Sign": "sign", "Trunc": "trunc"}
_ENOUGH_UNITS = 32
"""So many units are not all dead in one batch by chance (2^-32 where signs are even); a narrow layer's may be."""


def silenced(graph: GraphView, parameters: Mapping[str, Tensor]) -> tuple[Silenced, ...]:
    """Operations that let no gradient through, and that are not so by the chance of one batch."""
    found = []
    tail = set(graph.tail)
    for node in graph.nodes:
        name = base(node)
        units = _units(node)
        op = ""
        if name in _STEPS:
            op = f"{_STEPS[name]}()"
        elif name in ("Softmax", "LogSoftmax") and node in tail and _softmax_size(node) == 1:
            op = f"{_WORDS[name]} over one value"
        elif name in _SATURATING and _SATURATING[name][1](node):
            exact = name in ("Sigmoid", "Tanh", "Softmax", *_SMOOTH)  # needs arguments beyond 9, which chance does not give
            is_sure = exact or units >= _ENOUGH_UNITS or _is_pushed(graph, node, parameters) or _is_far_outside(node)
            op = _SATURATING[name][0] if is_sure else ""
        elif name in ("Mul", "Where", "MaskedFill") and _is_zero_mask(node) and _holds_all_paths(graph, node):
            op = "a mask that removes everything"
        if op:
            found.append(Silenced(op, units, graph.parameters_behind(node)))
    return tuple(found)


def _units(node: Node) -> int:
    shape = output_shape(node) or (1,)
    return shape[-1] if len(shape) in (1, 3) else shape[1]


def _is_pushed(graph: GraphView, node: Node, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the parameters just before hold all units on one side: a shift far below 0, or weights of one sign."""
    layer = through_reshapes(next(iter(behind(node)), None))
    seen: list[Tensor] = []
    for _ in range(2):  # a norm, and the layer before it
        if layer is None:
            break
        seen += [parameters[name] for inner in behind(layer) if (name := graph.name_of(through_reshapes(inner)))]
        layer = through_reshapes(next(iter(behind(layer)), None)) if "Norm" in base(layer) else None
    return any(bool((value < (-1 if value.dim() <= 1 else 0)).all()) for value in map(Tensor.detach, seen))


def _is_far_outside(node: Node) -> bool:
    """Whether everything lies beyond one end of a clamp by twice the clamp's width."""
    value = saved_tensor(node, "self")
    ends = [saved(node, name) for name in (("min_val", "max_val") if base(node) == "Hardtanh" else ("min", "max"))]
    if value is None or base(node) not in ("Clamp", "Hardtanh") or any(isinstance(end, Tensor) or end is None for end in ends):
        return False
    low, high = (float(end) for end in ends)
    return bool((value < low - 2 * (high - low)).all() or (value > high + 2 * (high - low)).all())


def _is_zero_mask(node: Node) -> bool:
    """Whether a factor without gradient is 0 everywhere, or a selection takes nothing of its input."""
    if base(node) == "MaskedFill":
        mask = saved_tensor(node, "mask")
        return mask is not None and bool(mask.all())
    if base(node) == "Where":
        mask = saved_tensor(node, "condition")
        (first, _), (second, _) = node.next_functions[-2:]
        return mask is not None and ((second is None and not bool(mask.any())) or (first is None and bool(mask.all())))
    for edge, name in zip(node.next_functions, ("self", "other"), strict=False):
        if edge[0] is None:
            mask = saved_tensor(node, name)
            return mask is not None and not bool(mask.any())
    return False


def _holds_all_paths(graph: GraphView, node: Node) -> bool:
    """Whether everything before `node` reaches the loss through it alone: no expert beside it, no shortcut around it."""
    ahead = graph.ahead_of(node)
    around = [inner for inner in graph.without(node) if graph.name_of(inner)]
    before = graph.parameters_behind(node)
    return bool(before) and all(
        graph.name_of(inner) not in before and all(user in ahead for user, _ in _consumers(graph, inner)) for inner in around
    )


_FACTOR_AT = {
    "Mul": (0, 1), "Div": (0,), "Addmm": (1, 2), "Mm": (0, 1), "Bmm": (0, 1), "Baddbmm": (1, 2), "Mv": (0, 1), "Convolution": (1,),
    "Linear": (1,), "NativeBatchNorm": (1,), "CudnnBatchNorm": (1,), "NativeLayerNorm": (1,), "NativeGroupNorm": (1,), "FusedRmsNorm": (1,),
}  # fmt: skip


def explained_by_zeros(graph: GraphView, parameters: Mapping[str, Tensor]) -> frozenset[str]:
    """Parameters before a factor that is 0 everywhere: a zero-initialised scale, head or up-projection, which will move first."""
    real = {name: value.detach() for name, value in parameters.items() if value.numel() and not value.is_meta}
    zeros = {name for name, value in real.items() if _none_is(value, lambda part: part)}
    starts: list[Node] = []
    for node in graph.nodes:
        if graph.name_of(node) in zeros:
            starts += [user for user, position in _consumers(graph, node) if position in _FACTOR_AT.get(base(user), ())]
    return graph.parameters_behind(*starts) - zeros if starts else frozenset()


def _consumers(graph: GraphView, node: Node) -> Iterator[tuple[Node, int]]:
    """Who uses a parameter's value, seen through views, casts and functions that keep 0 at 0."""
    waiting = [node]
    while waiting:
        for user, position in graph.users[waiting.pop()]:
            if base(user) in RESHAPES | {"Expand", "Tanh"}:
                waiting.append(user)
            else:
                yield user, position


def initial_loss(graph: GraphView) -> InitialLoss | None:
    """The loss function's value in this step, beside what an untrained model gives; None for functions that are not known."""
    for node in graph.tail:
        target, output = saved_tensor(node, "target"), saved_tensor(node, "self")
        if target is None or output is None:
            continue
        if base(node) in ("NllLoss", "NllLoss2D") and output.dim() > 1 and output.shape[1] > 1:
            value = F.nll_loss(output.float(), target, ignore_index=_signed(saved(node, "ignore_index")))
            return InitialLoss("cross-entropy", float(value), math.log(output.shape[1]))
        if base(node) == "MseLoss" and target.numel() > 1:
            return InitialLoss("mse_loss", float(torch.mean((output - target) ** 2)), float(target.float().var()))
    return None
