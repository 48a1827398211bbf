"""Sees the residual additions of a forward pass as they run, and can leave out the branch of one."""

from __future__ import annotations

__all__ = ["Step", "watched_additions"]

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pl_normkit.graph.nodes import shorten
from pl_normkit.methods.depth_profile.entropy import ATTENDING, normalized_entropy
from pl_normkit.methods.depth_profile.find import Addition, Call

_TORCH = f"{Path(torch.__file__).parent}/"
_ADDS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__))


@dataclass(frozen=True)
class Step:
    """One residual addition as it ran: shortcut + branch = stream, and the entropies of its attentions where they were watched."""

    addition: Addition
    shortcut: Tensor
    branch: Tensor
    stream: Tensor
    entropies: tuple[Tensor, ...] = ()


class _Watch(TorchFunctionMode):
    """Recognizes additions by their source line and their count there."""

    def __init__(
        self, model: nn.Module, additions: Sequence[Addition], visit: Callable[[Step], None], skipped: Addition | None, attends: bool
    ) -> None:
        super().__init__()
        self._model = model
        self._ends: dict[tuple[str, int], Addition] = {(add.call.source, add.call.number): add for add in additions}
        self._entries = {(add.shortcut_call.source, add.shortcut_call.number): add for add in additions}
        self._sources = {call.source for add in additions for call in (add.call, add.shortcut_call)}
        self._visit, self._skipped, self._attends = visit, skipped, attends
        self._entropies: list[Tensor] = []
        self._shortcuts: dict[Addition, Tensor] = {}
        self.counts: defaultdict[str, int] = defaultdict(int)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._attends and func in ATTENDING and (entropy := normalized_entropy(func, args, kwargs or {})) is not None:
            self._entropies.append(entropy)
        source = _calling_line(self._model) if func in _ADDS and _is_sum_of_two(args, kwargs) else None
        if source is None or source not in self._sources:
            return func(*args, **kwargs or {})
        key = (source, self.counts[source])
        self.counts[source] += 1
        entered, ended = self._entries.get(key), self._ends.get(key)
        operands = (args[0], args[1] if len(args) > 1 else (kwargs or {})["other"])
        writes = func in (Tensor.add_, Tensor.__iadd__)
        if entered is not None:
            shortcut = operands[entered.shortcut_operand]
            self._shortcuts[entered] = shortcut.clone() if writes and entered.shortcut_operand == 0 else shortcut
        first = operands[0].clone() if writes and ended is not None else operands[0]
        stream = func(*args, **kwargs or {})
        return stream if ended is None else self._end(ended, entered, (first, operands[1]), stream)

    def _end(self, ended: Addition, entered: Addition | None, operands: tuple[Tensor, Tensor], stream: Tensor) -> Tensor:
        entropies: tuple[Tensor, ...] = ()
        if ended.attentions or not ended.is_nested:
            entropies, self._entropies = tuple(self._entropies), []
        shortcut = self._shortcuts.pop(ended, None)
        if shortcut is None:  # the operands are not where the trace saw them
            return stream
        branch = operands[1 - ended.shortcut_operand] if entered is ended else stream - shortcut
        self._visit(Step(ended, shortcut, branch, stream, entropies if len(entropies) == ended.attentions else ()))
        return shortcut if ended is self._skipped else stream


def _is_sum_of_two(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    other = args[1] if len(args) > 1 else (kwargs or {}).get("other")
    return bool(args) and isinstance(args[0], Tensor) and isinstance(other, Tensor)


def _calling_line(model: nn.Module) -> str:
    """The innermost line of a `forward` outside torch that led here, as the graph writes it: "" where all of the model is torch's.

    The trace keeps no line of the functions that a forward calls, such as the `dropout_add` of BLOOM and Falcon.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_name != "forward"):
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is model:
            return ""
        frame = frame.f_back
    return f"{shorten(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""


@contextmanager
def watched_additions(
    model: nn.Module,
    additions: Sequence[Addition],
    visit: Callable[[Step], None],
    *,
    skipped: Addition | None = None,
    attends: bool = False,
) -> Iterator[Callable[[], list[Addition]]]:
    """Calls `visit` at each of `additions` that runs inside the block, leaves out the branches of `skipped`; `attends` adds entropies.

    Gives a function that lists, after the block, additions that cannot be told apart: their lines ran another number of times than when
    the model was traced.
    """
    watch = _Watch(model, additions, visit, skipped, attends)

    def is_off(call: Call) -> bool:
        return watch.counts[call.source] != call.total

    with watch:
        yield lambda: [add for add in additions if is_off(add.call) or is_off(add.shortcut_call)]
