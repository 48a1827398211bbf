"""Dropout and stochastic depth written by hand: a mask drawn by a constant chance, and multiplied onto features."""

from __future__ import annotations

__all__ = ["DropMasks"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pl_normkit.first_step.tensor_notes import TensorNotes


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNIFORM = _words("rand rand_like uniform_")
_BERNOULLI = _words("bernoulli bernoulli_")
_SHIFTS = _words("add radd iadd sub isub")
_LOW, _HIGH = _words("lt le less less_equal"), _words("gt ge greater greater_equal")
_STEPS = _words("floor")
_NEGATIONS = _words("logical_not invert bitwise_not rsub")
_KEPT = _words("""to float double half bfloat16 type type_as bool view reshape unsqueeze squeeze expand expand_as repeat clone contiguous
    getitem div truediv true_divide idiv itruediv mul rmul imul multiply detach""")
_PRODUCTS = _words("mul rmul imul multiply")
_FILLS = _words("masked_fill")


@dataclass(frozen=True)
class _Draw:
    """A random tensor: uniform numbers with something added, or what is 1 with some chance."""

    origin: int
    is_mask: bool
    chance: float = 0.0


@dataclass
class DropMasks:
    """Follows random tensors, and the features that layers compute, through a forward pass.

    Attributes:
        is_parameter: whether a tensor is one of the model's parameters.
        has_drawn_a_number: whether a random tensor had a single element.
    """

    is_parameter: Callable[[Tensor], bool]
    has_drawn_a_number: bool = False
    _drawn: TensorNotes[_Draw] = field(default_factory=TensorNotes)
    _features: TensorNotes[bool] = field(default_factory=TensorNotes)
    _tokens: set[int] = field(default_factory=set)
    _count: int = 0

    def see(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], sources: Sequence[Tensor], result: Tensor
    ) -> tuple[int, float] | None:
        """The mask (by number) and its drop probability, where this operation puts one onto features."""
        if name in _UNIFORM or name in _BERNOULLI:
            self._draw(name, args, kwargs, result)
            return None
        drawn = next((source for source in sources if source in self._drawn), None) if self._drawn else None
        is_feature = self._is_made_by_layers(sources)
        if is_feature:
            self._features[result] = True
        if drawn is None:
            return None
        draw, others = self._drawn[drawn], [source for source in sources if source is not drawn]
        name = name.strip("_")
        if draw.is_mask and 0 < draw.chance < 1 and self._is_product(name, args, kwargs, drawn, others):
            return draw.origin, 1 - draw.chance
        following = None if is_feature or any(map(self.is_parameter, others)) else self._following(name, args, draw, drawn)
        if following is not None:
            self._drawn[result] = following
        return None

    def _is_made_by_layers(self, sources: Sequence[Tensor]) -> bool:
        """Whether a source is, or a parameter meets something that is none."""
        if any(source in self._features for source in sources):
            return True
        own = [self.is_parameter(source) for source in sources]
        return any(own) and not all(own)

    def origins_in(self, outputs: Sequence[Tensor]) -> frozenset[int]:
        """Masks that the model gives out, or fills with a learned token: then the loss is about what was masked."""
        return frozenset(self._drawn[tensor].origin for tensor in outputs if tensor in self._drawn) | self._tokens

    def _draw(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        self._count += 1
        self.has_drawn_a_number |= result.numel() == 1
        if name in _UNIFORM:
            is_unit = name != "uniform_" or (args[1:] in ((), (0, 1)) and not kwargs)
            if is_unit:
                self._drawn[result] = _Draw(self._count, is_mask=False)
            return
        chances = kwargs.get("p", args[1] if len(args) > 1 else 0.5 if name == "bernoulli_" else args[0])
        chance = _number(chances)
        if chance is not None:
            self._drawn[result] = _Draw(self._count, is_mask=True, chance=chance)

    def _is_product(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], mask: Tensor, others: Sequence[Tensor]) -> bool:
        if name in _PRODUCTS and any(self.is_parameter(other) for other in others):
            self._tokens.add(self._drawn[mask].origin)
            return False
        if not any(other in self._features for other in others):
            return False
        if name == "setitem":
            return args[1] is mask and _is_zero(args[2])
        if name in _FILLS:
            return _is_zero(kwargs.get("value", args[2] if len(args) > 2 else None))
        if name == "where":
            return args[0] is mask and any(map(_is_zero, args[1:]))
        return name in _PRODUCTS

    def _following(self, name: str, args: Sequence[Any], draw: _Draw, drawn: Tensor) -> _Draw | None:
        if draw.is_mask:
            if name in _NEGATIONS:
                return replace(draw, chance=1 - draw.chance)
            return draw if name in _KEPT else None
        number = next((_number(arg) for arg in args if arg is not drawn and _number(arg) is not None), None)
        if name in _STEPS:
            return replace(draw, is_mask=True, chance=draw.chance)
        if number is None:
            return draw if name in _KEPT - _PRODUCTS and "div" not in name else None
        if name in _SHIFTS:
            return replace(draw, chance=draw.chance + (-number if "sub" in name else number))
        if name in _LOW | _HIGH and draw.chance == 0:
            below = number if args[0] is drawn else 1 - number
            return replace(draw, is_mask=True, chance=below if name in _LOW else 1 - below)
        return None


def _number(value: Any) -> float | None:
    """A number, or the one that a tensor holds everywhere: a chance that hangs on data or was learned differs between elements."""
    if isinstance(value, Tensor):
        is_even = value.numel() > 0 and value.dtype is not torch.bool and not value.is_meta and bool((value == value.flatten()[0]).all())
        return float(value.flatten()[0]) if is_even else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _is_zero(value: Any) -> bool:
    return value is not None and (not bool(value.any()) if isinstance(value, Tensor) else value == 0)
