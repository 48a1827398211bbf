"""Moves of a loss's arguments to the border of what they can be: zeros, ones, large, equal to another, one sample, empty masks."""

from __future__ import annotations

__all__ = ["Move", "batch_moves", "pairs", "single_moves"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product

import torch
from torch import Tensor

from pl_normkit.methods.nan_safety.losses.arguments import Arguments, Role

FILLS = (0.0, 1.0, -1.0, 0.5, 20.0, -20.0, 200.0, -200.0, 1e3, -1e3, 6e4, -6e4)
FACTORS = (-1.0, 100.0, -100.0, 1e4)
CERTAIN = 200.0  # a logit that every floating type rounds to probability 0 or 1
LABELS_TRIED = 6


@dataclass(frozen=True)
class Move:
    """A change of the arguments.

    Attributes:
        words: what is changed, for a reader.
        apply: from arguments to the changed ones; raises whatever torch does where it does not fit.
        positions: the arguments it changes.
        arguable: it leaves the values seen in the example, for an argument that the network does not make.
        strong: worth combining with others.
    """

    words: tuple[str, ...]
    apply: Callable[[Arguments], Arguments]
    positions: frozenset[int]
    arguable: bool = False
    strong: bool = False

    def joined(self, other: Move) -> Move:
        return Move(
            (*self.words, *other.words),
            lambda arguments: other.apply(self.apply(arguments)),
            self.positions | other.positions,
            self.arguable or other.arguable,
        )


Make = Callable[[Tensor], Tensor]


def _move(arguments: Arguments, position: int, words: str, make: Make, *, arguable: bool = False, strong: bool = False) -> Move:
    def apply(current: Arguments) -> Arguments:
        old = current.tensor(position)
        new = make(old.detach())
        if position in current.bounds:
            new = new.clamp(min=current.bounds[position][0], max=current.bounds[position][1])
        moved: Tensor = new.to(old.dtype).contiguous()
        return current.replaced({position: moved.requires_grad_(old.requires_grad)})

    return Move((f"{arguments.names[position]} {words}",), apply, frozenset({position}), arguable, strong)


def single_moves(arguments: Arguments, ignored: Sequence[tuple[int, bool]]) -> list[Move]:
    """One argument at a time; what stays within the values seen first. `ignored` are label values with whether they are arguable."""
    makers: dict[Role, Callable[[Arguments, int], Iterator[Move]]] = {
        Role.FREE: _free,
        Role.VALUES: _values,
        Role.MASK: _mask,
        Role.LABELS: partial(_labels, ignored=ignored),
    }
    moves = [move for position in arguments.tensors for move in makers[arguments.roles[position]](arguments, position)]
    return sorted([*moves, *batch_moves(arguments)], key=lambda move: move.arguable)


def _free(arguments: Arguments, position: int) -> Iterator[Move]:
    tensor = arguments.tensor(position)
    bounds = arguments.bounds.get(position)
    largest = torch.finfo(tensor.dtype).max
    fills = (*bounds, sum(bounds) / 2) if bounds else [value for value in FILLS if abs(value) <= largest]
    for value in fills:
        words = f":= {value:g}"
        yield _move(arguments, position, words, lambda t, v=value: torch.full_like(t, v), strong=value in (*fills[:2], 200.0, -200.0))  # type: ignore[misc]
    yield from _equal_to_others(arguments, position)
    for factor in FACTORS:
        if abs(factor) * float(tensor.detach().abs().max()) <= largest:
            yield _move(arguments, position, f"times {factor:g}", lambda t, f=factor: t * f, strong=factor == -1)  # type: ignore[misc]
    yield _move(arguments, position, ":= -|itself| - 1", lambda t: -t.abs() - 1)
    yield _move(arguments, position, ":= |itself| + 1", lambda t: t.abs() + 1)
    yield _move(arguments, position, ":= its mean", lambda t: t.mean().expand_as(t), strong=True)
    if tensor.dim() > 1:
        yield _move(arguments, position, ":= its first row, repeated", lambda t: t[:1].expand_as(t), strong=True)
        yield _move(arguments, position, "row 0 := 0", lambda t: torch.cat([torch.zeros_like(t[:1]), t[1:]]))
        yield _move(arguments, position, "column 0 := 0", lambda t: torch.cat([torch.zeros_like(t[:, :1]), t[:, 1:]], 1))
        if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]:
            yield _move(arguments, position, ":= the identity", lambda t: torch.eye(len(t), dtype=t.dtype))
    yield from _agreeing_with_labels(arguments, position)


def _equal_to_others(arguments: Arguments, position: int) -> Iterator[Move]:
    tensor = arguments.tensor(position)
    for other, leaf in enumerate(arguments.leaves):
        if other != position and isinstance(leaf, Tensor) and leaf.shape == tensor.shape and leaf.is_floating_point():
            for sign, words in ((1, ":="), (-1, ":= -")):

                def apply(current: Arguments, other: int = other, sign: int = sign) -> Arguments:
                    source = current.tensor(other).detach()
                    return _move(current, position, "", lambda _: sign * source).apply(current)

                name = f"{arguments.names[position]} {words} {arguments.names[other]}"
                yield Move((name,), apply, frozenset({position}), strong=sign == 1)


def _agreeing_with_labels(arguments: Arguments, position: int) -> Iterator[Move]:
    """Logits that are certain of the labels, and certain of their contrary."""
    for other, leaf in enumerate(arguments.leaves):
        if other == position or not isinstance(leaf, Tensor):
            continue
        for sign, words in ((1, "certain of"), (-1, "certain against")):

            def apply(current: Arguments, other: int = other, sign: int = sign) -> Arguments:
                logits = _signs(current.tensor(position), current.tensor(other)) * (sign * CERTAIN)
                return _move(current, position, "", lambda _: logits).apply(current)

            if _has_signs(arguments.tensor(position), leaf):
                name = f"{arguments.names[position]} := logits {words} {arguments.names[other]}"
                yield Move((name,), apply, frozenset({position}))


def _has_signs(logits: Tensor, labels: Tensor) -> bool:
    if labels.is_floating_point():
        return labels.shape == logits.shape and _within(labels, 0.0, 1.0)
    return logits.dim() == labels.dim() + 1 and logits.shape[0] == labels.shape[0] and logits.shape[2:] == labels.shape[1:]


def _signs(logits: Tensor, labels: Tensor) -> Tensor:
    """+1 where the labels want the logit high, -1 elsewhere."""
    if labels.is_floating_point():
        return 2 * (labels.detach() > 0.5).to(logits.dtype) - 1
    classes = torch.arange(logits.shape[1]).view(1, -1, *([1] * (labels.dim() - 1)))
    return 2 * (labels.unsqueeze(1) == classes).to(logits.dtype) - 1


def _within(tensor: Tensor, low: float, high: float) -> bool:
    smallest, largest = tensor.detach().aminmax()
    return float(smallest) >= low and float(largest) <= high


def _values(arguments: Arguments, position: int) -> Iterator[Move]:
    """A floating tensor without a gradient: the ends of its range are sure, 0 and 1 and -1 arguable where it never had them."""
    tensor = arguments.tensor(position).detach()
    low, high = arguments.bounds.get(position) or tuple(float(value) for value in tensor.aminmax())
    for value in dict.fromkeys((0.0, 1.0, low, high, -1.0)):
        inside = low <= value <= high
        if inside or (position not in arguments.bounds and not (value < 0 <= low)):
            fill = f":= {value:g}"
            yield _move(arguments, position, fill, lambda t, v=value: torch.full_like(t, v), arguable=not inside, strong=value in (0, 1))  # type: ignore[misc]
    if low < 0 < high:
        yield _move(arguments, position, "times -1", lambda t: -t, arguable=not _within(-tensor, low, high))
    if tensor.dim() > 1:
        yield _move(arguments, position, ":= its first row, repeated", lambda t: t[:1].expand_as(t))
        yield _move(arguments, position, "row 0 := 0", lambda t: torch.cat([torch.zeros_like(t[:1]), t[1:]]), arguable=not low <= 0 <= high)
    if _within(tensor, 0.0, 1.0) and bool(((tensor == 0) | (tensor == 1)).all()):
        yield _move(arguments, position, ":= 1 in one place, else 0", _one_place)
    for other, leaf in enumerate(arguments.leaves):
        if other < position and arguments.roles[other] is Role.VALUES and leaf.shape == tensor.shape:

            def apply(current: Arguments, other: int = other) -> Arguments:
                source = current.tensor(other).detach()
                return _move(current, position, "", lambda _: source).apply(current)

            arguable = not _within(leaf, low, high)
            yield Move((f"{arguments.names[position]} := {arguments.names[other]}",), apply, frozenset({position}), arguable)


def _one_place(tensor: Tensor) -> Tensor:
    new = torch.zeros_like(tensor)
    new.view(-1)[0] = 1
    return new


def _mask(arguments: Arguments, position: int) -> Iterator[Move]:
    if position not in arguments.nonempty:
        yield _move(arguments, position, ":= nothing", torch.zeros_like, strong=True)
        if arguments.tensor(position).dim() > 1:
            yield _move(arguments, position, "row 0 := nothing", lambda t: torch.cat([torch.zeros_like(t[:1]), t[1:]]))
    yield _move(arguments, position, ":= one place", _one_place, strong=True)
    yield _move(arguments, position, ":= everything", torch.ones_like)
    yield _move(arguments, position, ":= all but one place", lambda t: ~_one_place(t))


def _labels(arguments: Arguments, position: int, ignored: Sequence[tuple[int, bool]]) -> Iterator[Move]:
    """Values seen, and the index that the loss itself ignores; any other could be out of range, which ends the process in C++."""
    tensor = arguments.tensor(position)
    low, high = arguments.bounds.get(position, (-float("inf"), float("inf")))
    for value in [int(value) for value in torch.unique(tensor) if low <= value <= high][:LABELS_TRIED]:
        yield _move(arguments, position, f":= {value}", lambda t, v=value: torch.full_like(t, v), strong=True)  # type: ignore[misc]
    for value, arguable in ignored if position not in arguments.bounds else ():
        known = arguable and not bool((tensor == value).any())
        yield _move(arguments, position, f":= {value} (ignored)", lambda t, v=value: torch.full_like(t, v), arguable=known, strong=True)  # type: ignore[misc]
        if tensor.dim():

            def first_row(t: Tensor, v: int = value) -> Tensor:
                return torch.cat([torch.full_like(t[:1], v), t[1:]])

            yield _move(arguments, position, f"row 0 := {value} (ignored)", first_row, arguable=known)
    if tensor.dim() and len(tensor) > 1:
        yield _move(arguments, position, ":= its first row, repeated", lambda t: t[:1].expand_as(t))


def batch_moves(arguments: Arguments) -> Iterator[Move]:
    """All arguments that have the batch dimension at once: one sample, or one sample repeated."""
    positions = _batched(arguments)
    if not positions:
        return

    def apply(current: Arguments, make: Make) -> Arguments:
        made = {p: make(current.tensor(p).detach()).contiguous().requires_grad_(current.tensor(p).requires_grad) for p in positions}
        return current.replaced(made)

    yield Move(("one sample",), lambda current: apply(current, lambda t: t[:1]), positions, strong=True)
    yield Move(("one sample, repeated",), lambda current: apply(current, lambda t: t[:1].expand_as(t).clone()), positions)
    yield Move(("two samples",), lambda current: apply(current, lambda t: t[:2]), positions)


def _batched(arguments: Arguments) -> frozenset[int]:
    """Arguments as long as the first free one; none where one of them is fixed, which would be changed too."""
    free = [leaf for leaf, role in zip(arguments.leaves, arguments.roles, strict=True) if role is Role.FREE and leaf.dim()]
    if not free or len(free[0]) < 2:
        return frozenset()
    long = {i for i, leaf in enumerate(arguments.leaves) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(free[0])}
    return frozenset(long) if long <= set(arguments.tensors) else frozenset()


def pairs(moves: Sequence[Move]) -> list[Move]:
    """Two strong moves of different arguments; what stays within the values seen first."""
    strong = [move for move in moves if move.strong]
    batch = [move for move in strong if len(move.positions) > 1]
    alone = [move for move in strong if len(move.positions) == 1]
    joined = [left.joined(right) for left, right in combinations(alone, 2) if not left.positions & right.positions]
    joined += [left.joined(right) for left, right in product(alone, batch)]
    return sorted(joined, key=lambda move: move.arguable)
