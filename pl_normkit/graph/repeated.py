"""Blocks that are the same code on the same shapes are traced once: the others stand in the exported graph as one call each.

The first, the second and the last block of a row are traced in full and compared. Where they differ, where a block is called with other
shapes than they were, or where anything else is unlike (hooks, attributes, in-place changes of what a block is given), all is traced.
"""

from __future__ import annotations

__all__ = ["Row", "block_operators", "find_rows", "stand_ins"]

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

MIN_BLOCKS = 8
"""Below this many blocks a row is traced as it is: three are traced in any case."""
_TRACED_CALLS = 2
_INDEX = re.compile(r"(layer|block|stage)?_?(idx|index|id|number)", re.IGNORECASE)
_PLAIN = (int, float, bool, str, type(None))
_OWN = frozenset(("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_hf_initialized"))


@dataclass
class Call:
    """One call of a block.

    Attributes:
        path: of the block.
        key: what it was called with: structure, shapes, types, plain values.
        outputs: shape, strides and type of each tensor it returns, for the calls that stand in.
    """

    path: str
    key: Any
    outputs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]] = field(default_factory=list)


@dataclass
class Row:
    """Blocks of one list that are the same but for their parameters' values."""

    blocks: dict[str, nn.Module]
    results: dict[Any, tuple[TreeSpec, list[Any]]] = field(default_factory=dict)
    traced: dict[Any, list[int]] = field(default_factory=lambda: defaultdict(list))
    refused: set[Any] = field(default_factory=set)


_calls: list[Call] = []
"""The calls of the trace that runs; the operators know them by their index."""


@cache
def block_operators() -> Any:
    """`enter` and `leave` mark what a traced block is given and returns, `repeat` stands for a block that is not traced."""
    for name in ("enter", "leave", "repeat"):
        torch.library.define(f"pl_normkit::{name}", "(Tensor[] values, int call) -> Tensor[]")
        torch.library.register_fake(f"pl_normkit::{name}", _repeat if name == "repeat" else _mark)
    return torch.ops.pl_normkit


def _mark(values: Sequence[Tensor], call: int) -> list[Tensor]:
    return [torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device) for value in values]


def _repeat(values: Sequence[Tensor], call: int) -> list[Tensor]:
    return [torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype, device in _calls[call].outputs]


def find_rows(model: nn.Module) -> list[Row]:
    """Rows of at least `MIN_BLOCKS` like blocks in the lists of the model, outermost first."""
    rows: list[Row] = []
    covered: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < MIN_BLOCKS or id(module) in covered:
            continue
        alike: dict[Any, dict[str, nn.Module]] = defaultdict(dict)
        for name, block in module.named_children():
            alike[_signature(block)][f"{path}.{name}" if path else name] = block
        for signature, blocks in alike.items():
            if signature is not None and len(blocks) >= MIN_BLOCKS and not _share_modules(blocks.values()):
                rows.append(Row(blocks))
                covered |= {id(inner) for block in blocks.values() for inner in block.modules()}
    return rows


def _share_modules(blocks: Iterable[nn.Module]) -> bool:
    """Whether two blocks hold one module (or one block stands there twice)."""
    inner = [id(module) for block in blocks for module in block.modules()]
    return len(set(inner)) < len(inner)


def _signature(block: nn.Module) -> Any:
    """What two blocks must share; None for one that nothing may stand for."""
    if not any(True for _ in block.children()):
        return None
    parts = []
    for path, module in block.named_modules():
        if _is_special(module):
            return None
        tensors = [*module._parameters.items(), *module._buffers.items()]
        shapes = [(name, None if value is None else (tuple(value.shape), value.dtype, value.requires_grad)) for name, value in tensors]
        plain = [
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, _PLAIN) and name not in _OWN and not (type(value) is int and _INDEX.fullmatch(name))
        ]
        others = [
            (name, id(value) if _is_shared(value) else repr(type(value)))
            for name, value in vars(module).items()
            if not isinstance(value, (*_PLAIN, Tensor, nn.Module)) and name not in _OWN and not name.startswith("_")
        ]
        parts.append((path, type(module), tuple(shapes), tuple(plain), tuple(others)))
    return tuple(parts)


def _is_shared(value: Any) -> bool:
    """Functions and configurations must be the very same; lists and tuples are compared by their text."""
    return callable(value) or not isinstance(value, (list, tuple, dict, set))


def _is_special(module: nn.Module) -> bool:
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(has_hooks) or "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule)


@contextmanager
def stand_ins(rows: Sequence[Row]) -> Iterator[list[Call]]:
    """Let the blocks of `rows` stand in while a model is exported; gives the calls that the operators then speak of."""
    _calls.clear()
    patched = [block for row in rows for block in row.blocks.values()]
    try:
        for row in rows:
            last = next(reversed(row.blocks))
            for path, block in row.blocks.items():
                block.forward = _Forward(row, path, block, is_last=path == last)
        yield _calls
    finally:
        for block in patched:
            del block.forward


class _Forward:
    """The forward of a block in a row."""

    def __init__(self, row: Row, path: str, block: nn.Module, *, is_last: bool) -> None:
        self.row, self.path, self.is_last = row, path, is_last
        self.original = block.forward
        self.is_called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        key = _key(leaves, spec)
        if key is None or self.is_called or key in self.row.refused:
            return self.original(*args, **kwargs)
        self.is_called = True
        traced = self.row.traced[key]
        if len(traced) < _TRACED_CALLS or self.is_last:
            return self._trace(leaves, spec, key)
        return self._stand_in(leaves, key, _calls[traced[0]])

    def _trace(self, leaves: list[Any], spec: TreeSpec, key: Any) -> Any:
        tensors = _distinct(leaves)
        number = len(_calls)
        _calls.append(Call(self.path, key))
        entered = block_operators().enter(tensors, number)
        given = [_matching(leaf, tensors, entered) for leaf in leaves]
        args, kwargs = tree_unflatten(given, spec)
        out_leaves, out_spec = tree_flatten(self.original(*args, **kwargs))
        if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in out_leaves):
            self.row.refused.add(key)
        results = [tensor for tensor in _distinct(out_leaves) if not any(tensor is other for other in entered)]
        left = block_operators().leave(results, number) if results else []
        returned = [_matching(_matching(leaf, entered, tensors), results, left) for leaf in out_leaves]
        if results:
            self.row.traced[key].append(number)
            _calls[number].outputs = [(tuple(r.size()), tuple(r.stride()), r.dtype, r.device) for r in results]
            self.row.results[key] = out_spec, [_position(leaf, entered, results) for leaf in out_leaves]
        else:
            self.row.refused.add(key)
        return tree_unflatten(returned, out_spec)

    def _stand_in(self, leaves: list[Any], key: Any, template: Call) -> Any:
        tensors = _distinct(leaves)
        number = len(_calls)
        _calls.append(Call(self.path, key, template.outputs))
        results = block_operators().repeat(tensors, number)
        out_spec, positions = self.row.results[key]
        sources = {"given": tensors, "made": results}
        return tree_unflatten([sources[where][value] if where in sources else value for where, value in positions], out_spec)


def _key(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """What a call is compared by; None for one that holds more than tensors and plain values."""
    tensors = _distinct(leaves)
    if not tensors or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    parts: list[tuple[Any, ...]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            place = next(index for index, tensor in enumerate(tensors) if tensor is leaf)
            parts.append((place, tuple(leaf.size()), tuple(leaf.stride()), leaf.dtype, leaf.device))
        else:
            parts.append((type(leaf), leaf))
    return (str(spec), tuple(parts))


def _distinct(leaves: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not any(leaf is other for other in found):
            found.append(leaf)
    return found


def _matching(leaf: Any, olds: Sequence[Tensor], news: Sequence[Tensor]) -> Any:
    return next((new for old, new in zip(olds, news, strict=True) if old is leaf), leaf)


def _position(leaf: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> tuple[str, Any]:
    for where, tensors in (("given", given), ("made", made)):
        for index, tensor in enumerate(tensors):
            if tensor is leaf:
                return where, index
    return "plain", leaf
