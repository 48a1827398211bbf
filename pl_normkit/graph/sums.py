"""Additions of activations, and the values that each adds up."""

from __future__ import annotations

__all__ = ["Sum", "sum_of", "sum_of_parts"]

from collections.abc import Sequence
from dataclasses import dataclass

from pl_normkit.graph.nodes import Kind, Node
from pl_normkit.graph.paths import Dominators


@dataclass(frozen=True)
class Sum:
    """An addition of activations with nested additions flattened into one list of operands.

    Attributes:
        node: the (last) operation that adds, subtracts, interpolates, or sums a stack.
        operands: the values it adds.
        split: the last value that all of them pass through, None if they share none.
        absorbed: the nested additions.
        subtracted: operands with a minus sign.
        joins: the stack of the operands, or the concatenations whose largest parts they are.
    """

    node: Node
    operands: tuple[Node, ...]
    split: Node | None
    absorbed: frozenset[Node] = frozenset()
    subtracted: frozenset[Node] = frozenset()
    joins: tuple[Node, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements that are added."""
        return self.operands[0].numel if len(self.joins) > 1 else self.node.numel


def sum_of(node: Node, dominators: Dominators, *, is_flat: bool = True) -> Sum | None:
    """The sum that `node` is; with `is_flat` nested additions are part of it."""
    operands, subtracted = _addends(node)
    if len(operands) < 2:
        return None
    flat, absorbed = _flatten(node, operands) if is_flat else (list(operands), set())
    joins = node.inputs if len(node.inputs) == 1 else ()
    return Sum(node, tuple(flat), dominators.common(flat), frozenset(absorbed), frozenset(subtracted), joins)


def sum_of_parts(node: Node, dominators: Dominators) -> Sum | None:
    """The sum of two concatenations of values of the same sizes as one of the largest of them (tokens beside a class token)."""
    if node.kind is not Kind.ADD or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    parts = [_concatenated(join) if join.users == [node] else () for join in (first, second)]
    shapes = [[part.shape for part in side] for side in parts]
    if shapes[0] != shapes[1] or len(parts[0]) < 2 or first.argument("dim", 1, 0) != second.argument("dim", 1, 0):
        return None
    operands = max(zip(*parts, strict=True), key=lambda pair: pair[0].numel)
    return Sum(node, operands, dominators.common(operands), joins=(first, second))


def _concatenated(node: Node) -> tuple[Node, ...]:
    """What `node` concatenates, () where parameters are among it."""
    is_whole = node.op in ("cat", "concat") and len(node.target.args[0]) == len(node.inputs)  # type: ignore[arg-type]
    return node.inputs if is_whole else ()


def _addends(node: Node) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The values that `node` adds up, and those of them it subtracts; () where it is no sum of activations."""
    if node.holds_whole_numbers:
        return (), ()
    if len(node.inputs) == 1:
        return (_stacked(node), ()) if node.op in ("sum", "mean") else ((), ())
    if node.kind is Kind.ADD:
        return node.inputs, ()
    named: dict[str, Node] = {}
    for argument, source in zip(node.arguments, node.inputs, strict=True):
        named.setdefault(argument, source)
    if node.op in ("sub", "rsub") and len(node.inputs) == 2:
        return node.inputs, (named["other" if node.op == "sub" else "self"],)
    if node.op == "lerp" and {"self", "end"} <= named.keys() and ("weight" not in named or named["weight"].numel < named["end"].numel):
        return (named["self"], named["end"]), ()
    if node.op in ("addcmul", "addcdiv") and "self" in named:
        factors = [named[name] for name in ("tensor1", "tensor2") if name in named]
        return ((named["self"], max(factors, key=lambda factor: factor.numel)), ()) if factors else ((), ())
    return (), ()


def _stacked(node: Node) -> tuple[Node, ...]:
    """The operands of `torch.stack(values).sum(0)`, or of its mean."""
    stack = node.inputs[0]
    dims = node.argument("dim", 1, None)
    dims = [dims] if isinstance(dims, int) else dims
    if stack.op != "stack" or stack.users != [node] or not dims or len(dims) != 1:
        return ()
    is_stacked_along = dims[0] % len(stack.shape) == int(stack.argument("dim", 1, 0)) % len(stack.shape)
    return stack.inputs if is_stacked_along else ()


def _flatten(node: Node, operands: Sequence[Node]) -> tuple[list[Node], set[Node]]:
    flat: list[Node] = []
    absorbed: set[Node] = set()
    for operand in operands:
        if operand.kind is Kind.ADD and len(operand.inputs) > 1 and len(operand.users) == 1 and operand.shape == node.shape:
            below, absorbed_below = _flatten(operand, operand.inputs)
            flat += below
            absorbed |= {operand, *absorbed_below}
        else:
            flat.append(operand)
    return flat, absorbed
