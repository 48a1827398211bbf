"""Norms: those of torch, and those written out as arithmetic."""

from __future__ import annotations

__all__ = ["find_norms", "norms_that_read"]

from collections.abc import Sequence
from typing import Literal

from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.structure import PASSING, Norm

Statistics = Literal["batch", "layer", "group", "instance", "rms"]
_NORMS: dict[str, Statistics] = {
    "batch_norm": "batch",
    "layer_norm": "layer",
    "native_layer_norm": "layer",
    "group_norm": "group",
    "instance_norm": "instance",
    "rms_norm": "rms",
}
_ROOTS = frozenset(("sqrt", "rsqrt", "pow", "reciprocal"))
_LENGTHS = frozenset(("linalg_vector_norm", "norm", "linalg_norm"))
_DEVIATIONS = frozenset(("std", "std_mean"))
_VARIANCES = frozenset(("var", "var_mean"))
_MEANS = frozenset(("mean", "sum"))
_SCALARS = frozenset(("add", "mul", "div", "clamp", "clamp_min", "maximum"))
_LIMIT = 8


def find_norms(nodes: Sequence[Node]) -> list[Norm]:
    """Every normalization of activations in execution order."""
    found = [_of_torch(node) if node.kind is Kind.NORM else _written_out(node) for node in nodes]
    return [norm for norm in found if norm is not None]


def norms_that_read(node: Node, norms: Sequence[Norm]) -> set[str]:
    """Kinds of the norms that read `node`, through views and dropouts; "" where something else reads it too, or the model returns it."""
    kinds = {norm.node: norm.kind for norm in norms}
    found: set[str] = set()
    for user in node.users:
        if user in kinds:
            found.add(kinds[user])
        elif user.kind in PASSING and len(user.inputs) == 1:
            found |= norms_that_read(user, norms)
        else:
            found.add("")
    is_returned = any(user.op == "output" for user in node.target.users)
    return found | {""} if is_returned or not found else found


def _of_torch(node: Node) -> Norm:
    name_at = {read.path[-1].argument: read.parameter for read in node.reads}
    return Norm(node, _NORMS[node.op], name_at.get("weight", ""), name_at.get("bias", ""))


def _written_out(node: Node) -> Norm | None:
    """A signal divided by the standard deviation or root mean square of its own, in any spelling.

    `x * rsqrt(mean(x^2) + eps)` and `x / (norm(x) / sqrt(n) + eps)` are RMS, `(x - mean) / sqrt(var + eps)` is a layer norm. A
    division by the length of a vector without a scale per feature behind it only makes unit vectors (cosine attention).
    """
    if node.op not in ("mul", "div") or len(node.inputs) != 2:
        return None
    for root in node.inputs if node.op == "mul" else node.inputs[1:]:
        statistic = _statistic_behind(root, inverse=node.op == "mul")
        signal = next(source for source in node.inputs if source is not root)
        if statistic is None or root.numel >= signal.numel or not _is_of(statistic, signal):
            continue
        gamma, beta = _affine_around(node, signal, is_scaled_before=_measured(statistic) is signal)
        if statistic.op in _LENGTHS and not gamma:
            return None
        is_centred = statistic.op in _VARIANCES | _DEVIATIONS or _uncentred(signal) is not signal
        return Norm(node, _centred_kind(statistic) if is_centred else "rms", gamma, beta)
    return None


def _statistic_behind(root: Node, *, inverse: bool) -> Node | None:
    """The variance, mean square or length whose root `root` is (one over the root where `inverse`)."""
    node, power, is_inverse = root, 1.0, False
    for _ in range(_LIMIT):
        if node.op in _LENGTHS | _DEVIATIONS:
            return node if power == 1.0 and is_inverse is inverse else None
        if node.op in _VARIANCES or (node.op in _MEANS and _is_square(node.inputs[0])):
            return node if power == 0.5 and is_inverse is inverse else None
        if len(node.inputs) != 1:
            return None
        if node.op in _ROOTS:
            exponent = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}.get(node.op) or node.argument("exponent", 1, None)
            if not isinstance(exponent, (int, float)):
                return None
            power, is_inverse = power * abs(exponent), is_inverse is not (exponent < 0)
        elif node.op not in _SCALARS and node.kind is not Kind.VIEW:
            return None
        node = node.inputs[0]
    return None


def _is_square(node: Node) -> bool:
    if node.op == "mul":
        return len(node.inputs) == 1 and not node.reads and sum(argument is node.target.args[0] for argument in node.target.args) == 2
    return node.op == "square" or (node.op == "pow" and node.argument("exponent", 1, None) == 2)


def _is_of(statistic: Node, signal: Node) -> bool:
    """Whether the statistic is taken over the signal, centred or not."""
    return bool(_spellings(_measured(statistic)) & _spellings(signal))


def _measured(statistic: Node) -> Node:
    """The value whose statistic it is."""
    source = statistic.inputs[0]
    return source.inputs[0] if statistic.op in _MEANS else source


def _spellings(node: Node) -> set[Node]:
    """The value as it stands, without its mean taken off, in another type or shape, scaled."""
    found: set[Node] = set()
    pending = [node]
    while pending and len(found) < _LIMIT:
        current = pending.pop()
        found.add(current)
        centred = _uncentred(current)
        if centred is not current:
            pending.append(centred)
        elif len(current.inputs) == 1 and (current.kind is Kind.VIEW or (current.kind is Kind.MUL and current.parameters)):
            pending.append(current.inputs[0])
    return found


def _uncentred(node: Node) -> Node:
    """The value that `x - mean(x)` centres, any other node itself."""
    is_scaled = node.kind is Kind.MUL and node.parameters and len(node.inputs) == 1
    centred = node.inputs[0] if is_scaled else node
    if centred.op != "sub" or len(centred.inputs) != 2:
        return node
    mean = centred.inputs[1]
    while mean.kind is Kind.VIEW and len(mean.inputs) == 1:
        mean = mean.inputs[0]
    return centred.inputs[0] if mean.op in ("mean", "var_mean", "std_mean", "sum", "div", "mul") else node


def _centred_kind(statistic: Node) -> Statistics:
    dims = statistic.argument("dim", 1, None)
    dims = [dims] if isinstance(dims, int) else dims or []
    rank = len(statistic.inputs[0].shape)
    reduced = {dim % rank for dim in dims if isinstance(dim, int)} if rank else set()
    if rank > 2 and 0 in reduced:
        return "batch"
    return "instance" if rank > 3 and reduced == set(range(2, rank)) else "layer"


def _affine_around(node: Node, signal: Node, *, is_scaled_before: bool) -> tuple[str, str]:
    """Names of the scale and the shift; a product that the statistic is taken of is no scale of the norm (a modulated kernel)."""
    gamma = beta = ""
    if signal.kind is Kind.MUL and signal.parameters and len(signal.inputs) == 1 and not is_scaled_before:
        gamma = _per_feature(signal)
    for _ in range(_LIMIT):
        if len(node.users) != 1 or len(node.users[0].inputs) != 1:
            break
        node = node.users[0]
        if node.kind is Kind.MUL and node.parameters and not gamma:
            gamma = _per_feature(node)
        elif node.kind is Kind.ADD and node.parameters and gamma:
            beta = _shift(node)
            if not beta:
                break
        elif node.op == "addcmul" and len(node.parameters) == 2 and not gamma:
            named = {read.path[-1].argument: read.parameter for read in node.reads}
            gamma, beta = named.get("tensor2") or named.get("tensor1", ""), named.get("self", "")
        elif node.kind is not Kind.VIEW and not (node.kind is Kind.MUL and not node.reads):
            break
    return gamma, beta


def _shift(node: Node) -> str:
    """The parameter of a sum that has a value for each feature, "" for a table of positions."""
    return next((read.parameter for read in node.reads if len(read.path) == 1 and sum(size > 1 for size in read.path[0].shape) <= 1), "")


def _per_feature(node: Node) -> str:
    """The parameter of a product that has a value for each feature; a single factor is a temperature."""
    return next((read.parameter for read in node.reads if max(read.path[-1].shape, default=1) > 1), "")
