"""What goes into a `kl_div`: it takes log-probabilities, and a target of probabilities."""

from __future__ import annotations

__all__ = ["misread_divergences"]

from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.first_step.autograd_nodes import WEIGHT_OPS, GraphView, output_shape, saved_tensor, through_reshapes
from pl_normkit.first_step.facts import StackedActivation
from pl_normkit.graph.autograd import base, behind

_INPUTS = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
_E, _TOLERANCE = 2.7183, 1e-3


def misread_divergences(graph: GraphView) -> tuple[StackedActivation, ...]:
    """The `kl_div`s of a loss whose input or target is of the wrong kind.

    torch computes it as xlogy(target, target) - target * input, and with `log_target` as exp(target) * (target - input).
    """
    found: dict[StackedActivation, None] = {}
    for node in graph.tail:
        seen = _plain(graph, node) if base(node) == "Sub" else _of_log_target(node) if base(node) == "Mul" else None
        if seen is not None:
            found[seen] = None
    return tuple(found)


def _plain(graph: GraphView, node: Node) -> StackedActivation | None:
    entropy, product = _operands(node)
    if product is None or base(product) != "Mul" or not all(base(user) in ("Sum", "Mean") for user, _ in graph.users[node]):
        return None
    is_by_torch = entropy is not None and base(entropy) == "Xlogy"
    if (entropy is not None and not is_by_torch) or output_shape(node) != output_shape(product):
        return None
    source, target = _factors(product)
    if source is None or target is None:
        return None
    if base(source) == "LogSoftmax" and not is_by_torch and bool((target < 0).any()):
        return _seen("target of logarithms" if bool((target <= 0).all()) else "target of scores")
    if not (is_by_torch or _are_probabilities(target)):
        return None
    if base(source) in _INPUTS:
        return _seen(_INPUTS[base(source)])
    is_raw = base(source) in WEIGHT_OPS and bool(graph.nearest_parameter(source))
    is_normalized_later = any(base(other) == "Logsumexp" for other in graph.tail)
    return _seen("scores") if is_raw and not is_normalized_later else None


def _seen(first: str) -> StackedActivation:
    return StackedActivation(first, "kl_div", "kl_div")


def _factors(product: Node) -> tuple[Node | None, Tensor | None]:
    """What made the input of the divergence, and its target: torch multiplies in this order."""
    _, second = _operands(product)
    return (through_reshapes(second) if second is not None else None), saved_tensor(product, "self")


def _operands(node: Node) -> tuple[Node | None, Node | None]:
    """What made the two operands; None for a constant, as for the number that `aten::mul.Scalar` takes, which has no edge of its own."""
    first, second, *_ = *(made for made, _ in node.next_functions), None, None
    return first, second


def _are_probabilities(target: Tensor) -> bool:
    """Along the classes, wherever they stand."""
    if target.dim() == 0 or not bool((target >= 0).all()):
        return False
    return any(bool(((target.sum(dim) - 1).abs() < _TOLERANCE).all()) for dim in {-1, min(1, target.dim() - 1)} if target.shape[dim] > 1)


def _of_log_target(node: Node) -> StackedActivation | None:
    """The exp of log-probabilities is at most 1; of probabilities it lies between 1 and e."""
    constant, difference = _operands(node)
    target = saved_tensor(node, "self")
    if constant is not None or target is None or difference is None or base(difference) != "Sub" or not target.is_floating_point():
        return None
    source = through_reshapes(next(iter(behind(difference)), None))
    if source is None or _operands(difference)[0] is not None or base(source) not in ("LogSoftmax", "Softmax"):
        return None
    if bool(((target >= 1) & (target <= _E)).all()) and bool((target > 1).any()) and _are_probabilities(target.log()):
        return _seen("target of probabilities")
    if base(source) == "Softmax" and _are_probabilities(target):
        return _seen("softmax")
    return None
