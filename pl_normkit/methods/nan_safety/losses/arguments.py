"""The arguments of a loss as a flat list of values with names and roles, so that single ones can be replaced."""

from __future__ import annotations

__all__ = ["Arguments", "Role", "bounded", "role_of"]

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pl_normkit.errors import ConfigError, nearest

BOUNDS = "_pl_normkit_bounds"
Bounds = tuple[float, float]
Domain = Mapping[str | int, Bounds | str]
NOT_EMPTY = "not empty"


class Role(StrEnum):
    """What an argument is for, which says how far it may be moved."""

    FREE = "free"
    VALUES = "values"
    MASK = "mask"
    LABELS = "labels"
    FIXED = "fixed"


def bounded(tensor: Tensor, low: float, high: float) -> Tensor:
    """`tensor` itself, marked for `audit_loss`: as an argument of the example it is moved within [low, high] and no further.

    Raises ConfigError where the bounds are no interval.

    >>> import torch
    >>> from pl_normkit import audit_loss, bounded
    >>> audit_loss(lambda depth: depth.log().mean(), (bounded(torch.ones(4, requires_grad=True), 0.1, 80.0),)).findings
    []
    """
    if not low <= high:
        raise ConfigError("bounds are no interval", evidence=f"low={low}, high={high}")
    vars(tensor)[BOUNDS] = (float(low), float(high))
    return tensor


@dataclass(frozen=True)
class Arguments:
    """What a loss is called with.

    Attributes:
        leaves: every value in the nest, in order.
        names: how a reader calls each of them: "pred", "pair['z']".
        roles: of each.
        bounds: where a tensor must stay, by position.
        nonempty: positions of masks that must select something.
    """

    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    roles: tuple[Role, ...]
    spec: Any = field(repr=False)
    bounds: Mapping[int, Bounds] = field(default_factory=dict)
    nonempty: frozenset[int] = frozenset()

    @classmethod
    def read(
        cls, function: Callable[..., Any], positional: tuple[Any, ...], keywords: dict[str, Any], domain: Domain, fixed: Iterable[str | int]
    ) -> Arguments:
        """Flatten the arguments and give each its role. Raises ConfigError where `domain` or `fixed` name none of them."""
        with_paths, spec = pytree.tree_flatten_with_path((positional, keywords))
        names = _names(function, [path for path, _ in with_paths])
        leaves = tuple(leaf for _, leaf in with_paths)
        roles = [role_of(leaf) for leaf in leaves]
        bounds = {position: getattr(leaf, BOUNDS) for position, leaf in enumerate(leaves) if hasattr(leaf, BOUNDS)}
        nonempty = set()
        for word in fixed:
            for position in _matching(word, names):
                roles[position] = Role.FIXED
        for word, allowed in domain.items():
            for position in _matching(word, names):
                if allowed == NOT_EMPTY:
                    nonempty.add(position)
                elif isinstance(allowed, tuple) and len(allowed) == 2 and not allowed[0] > allowed[1]:
                    bounds[position] = (float(allowed[0]), float(allowed[1]))
                else:
                    raise ConfigError(
                        f"the domain of {word!r} is not known", evidence=repr(allowed), fix=f'give (low, high) or "{NOT_EMPTY}"'
                    )
        return cls(leaves, names, tuple(roles), spec, bounds, frozenset(nonempty))

    @property
    def tensors(self) -> list[int]:
        """Positions of the tensors that may be moved."""
        return [position for position, role in enumerate(self.roles) if role is not Role.FIXED]

    @property
    def batch_size(self) -> int:
        """Size that the first free tensor has first and every tensor with a first dimension shares; 0 where there is none such."""
        sizes = [leaf.shape[0] for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.dim()]
        return int(sizes[0]) if sizes and len(set(sizes)) == 1 else 0

    def tensor(self, position: int) -> Tensor:
        leaf = self.leaves[position]
        assert isinstance(leaf, Tensor)
        return leaf

    def replaced(self, changes: Mapping[int, Tensor]) -> Arguments:
        return replace(self, leaves=tuple(changes.get(position, leaf) for position, leaf in enumerate(self.leaves)))

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """Copies to call the loss with, positional and by keyword, and the leaves among them whose gradient counts."""
        copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        free = [copies[position].requires_grad_() for position, leaf in enumerate(self.leaves) if wants_gradient(leaf)]
        positional, keywords = pytree.tree_unflatten(copies, self.spec)
        return positional, keywords, free

    def plain(self) -> Any:
        """The arguments without gradients: a tuple, or a dict where all are keywords."""
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        positional, keywords = pytree.tree_unflatten(leaves, self.spec)
        return keywords if keywords and not positional else tuple(positional)


def wants_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def role_of(leaf: Any) -> Role:
    """By type: a floating tensor that needs a gradient is free, another holds values, booleans mask, integers label."""
    if not isinstance(leaf, Tensor) or leaf.numel() == 0 or leaf.is_complex() or leaf.is_sparse:
        return Role.FIXED
    if leaf.dtype == torch.bool:
        return Role.MASK
    if not leaf.is_floating_point():
        return Role.LABELS
    return Role.FREE if leaf.requires_grad else Role.VALUES


def _names(function: Callable[..., Any], paths: list[Any]) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins have none
        parameters = []
    names = []
    for kind, first, *rest in paths:
        head = str(first.key) if kind.idx else parameters[first.idx] if first.idx < len(parameters) else f"argument {first.idx}"
        names.append(head + pytree.keystr(tuple(rest)))
    return tuple(names)


def _matching(word: str | int, names: tuple[str, ...]) -> list[int]:
    """Positions of the argument `word`: a name, or the number of a flat argument. Raises ConfigError where there is none."""
    if isinstance(word, int):
        found = [word] if 0 <= word < len(names) else []
    else:
        found = [position for position, name in enumerate(names) if name == word or name.startswith((f"{word}[", f"{word}."))]
    if not found:
        raise ConfigError(f"the loss has no argument {word!r}", fix=nearest(str(word), names) or f"arguments: {', '.join(names)}")
    return found
