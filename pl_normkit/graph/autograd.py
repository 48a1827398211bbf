"""The graph that autograd keeps of a step: nodes, what they hold, and the line of code that made them."""

from __future__ import annotations

__all__ = ["base", "behind", "forward_order", "output_dtype", "saved", "source_line", "tensors_in"]

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pl_normkit.graph.nodes import shorten

_OWN = f"{Path(__file__).parents[1]}/"
_RECIPES = f"{_OWN}recipes/"
_HIDDEN = (f"{Path(torch.__file__).parent}/", _OWN)


_PLAIN = frozenset((type(None), bool, int, float, str))


def base(node: Node) -> str:
    """Name of the operation: "Sqrt" for SqrtBackward0."""
    return _base_of(node.name())


@lru_cache(maxsize=1024)
def _base_of(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name.rsplit("::", 1)[-1])


def saved(node: Node, name: str) -> Any:
    """A value the node keeps for its backward; None where there is none, or it was freed, overwritten or packed away.

    To unpack what a hook has packed is to run its code: a checkpoint would run its part of the network again, batch norm and all.
    """
    try:
        return None if _is_packed(getattr(node, f"_raw_saved_{name}", None)) else getattr(node, f"_saved_{name}", None)
    except RuntimeError:
        return None


def _is_packed(raw: Any) -> bool:
    parts = raw if isinstance(raw, tuple) else (raw,)
    return any(getattr(part, "unpack_hook", None) is not None for part in parts)


def output_dtype(node: Node) -> torch.dtype | None:
    metadata = node._input_metadata
    return metadata[0].dtype if metadata else None


def behind(node: Node) -> list[Node]:
    """The nodes whose outputs `node` took."""
    return [following for following, _ in node.next_functions if following is not None]


def forward_order(root: Node) -> list[Node]:
    """Every node behind `root`, each after those that feed it; `root` is the last."""
    ordered: list[Node] = []
    seen: set[Node] = set()
    waiting: list[tuple[Node, bool]] = [(root, False)]
    while waiting:
        node, expanded = waiting.pop()
        if expanded:
            ordered.append(node)
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(following, False) for following in behind(node) if following not in seen]
    return ordered


def source_line(frame: FrameType | None, callers: tuple[str, ...] = ()) -> str:
    """`file.py:line` of the innermost frame outside torch and this package; its recipes count as users' code.

    Args:
        frame: where to begin, going outwards.
        callers: names of files of this package that call models: from one of them on outwards there is no line of the model's, so "".
    """
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_RECIPES):
            return f"{shorten(file)}:{frame.f_lineno}"
        if file.startswith(_OWN) and file.endswith(callers):
            return ""
        if not file.startswith(_HIDDEN) and not file.startswith("<"):
            return f"{shorten(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if type(item) not in _PLAIN:  # most arguments of an operation
                yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(list(vars(value).values()))
