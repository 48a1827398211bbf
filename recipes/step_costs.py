"""What a training step costs: its time, and the memory it takes above what was there before it."""

from __future__ import annotations

__all__ = ["PeakMemory", "StepClock"]

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StepClock:
    """Times of the steps that follow one another; what comes in between, a validation, is left out."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds: list[float] = []

    def pause(self) -> None:
        """The next step has none before it."""
        self._last = None

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    @property
    def seconds(self) -> float:
        """Of the median step, its batch included; NaN before two steps have followed one another."""
        return median(self._seconds) if self._seconds else float("nan")


class PeakMemory:
    """Bytes that are taken at most within a block, above those that were taken before it.

    On a GPU its allocator counts. Elsewhere the tensors that operations return are counted, without what an operation needs inside.

    >>> with PeakMemory(torch.device("cpu")) as peak:
    ...     _ = (torch.ones(256, 1024) + 1).sum()
    >>> peak.bytes
    2097152
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._before = 0
        self._made = _MadeTensors()
        self._open = ExitStack()

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._open.enter_context(self._made)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()
        is_cuda = self._device.type == "cuda"
        self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before if is_cuda else self._made.most


class _MadeTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, and for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._meet(tensor, None)
        return result

    def _meet(self, tensor: Any, size: int | None) -> None:
        """Count the storage of a tensor that was not seen before, as nothing where it was there before."""
        if not isinstance(tensor, Tensor) or tensor.is_sparse:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes() if size is None else size
            self._known.add(key)
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size
