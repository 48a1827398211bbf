"""Run code of one rank as if there were no others, and leave its own random generators as they were. Derived here."""

from __future__ import annotations

__all__ = ["alone", "own_generators_kept", "world_size"]

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Of the default group; 1 where there is none."""
    return int(_size[-1]) if _size else 1


_size: list[int] = []


@contextmanager
def alone() -> Iterator[None]:
    """Collectives become what they are for one rank, so that no other has to take part.

    Code that took a collective out of `torch.distributed` before gets torch's error for a missing process group, and does not wait.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    from torch.distributed import distributed_c10d

    size, rank = dist.get_world_size(), dist.get_rank()
    _size.append(size)
    stand_ins: dict[str, Callable[..., Any]] = {
        "is_initialized": lambda: False,
        "get_world_size": lambda *args, **kwargs: size,
        "get_rank": lambda *args, **kwargs: rank,
        "all_gather": _fill,
        "all_gather_into_tensor": _fill_tensor,
        **dict.fromkeys(("all_reduce", "broadcast", "reduce", "barrier", "broadcast_object_list"), _nothing),
    }
    kept = {name: getattr(dist, name) for name in stand_ins}
    inner = distributed_c10d.is_initialized
    try:
        vars(dist).update(stand_ins)
        distributed_c10d.is_initialized = stand_ins["is_initialized"]
        yield
    finally:
        vars(dist).update(kept)
        distributed_c10d.is_initialized = inner
        _size.pop()


class _Done:
    """The handle of a collective that is over."""

    def wait(self) -> bool:
        return True


def _nothing(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
    return _Done() if async_op else None


def _fill(tensor_list: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    for target in tensor_list:
        target.copy_(tensor)
    return _nothing(**kwargs)


def _fill_tensor(output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    output_tensor.view(-1, *input_tensor.shape).copy_(
        input_tensor.expand(output_tensor.numel() // input_tensor.numel(), *input_tensor.shape)
    )
    return _nothing(**kwargs)


@contextmanager
def own_generators_kept(module: nn.Module) -> Iterator[None]:
    """Random generators that are attributes of `module` or its parts end as they began."""
    restorers = [restore for part in module.modules() for value in vars(part).values() if (restore := _restorer(value)) is not None]
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _restorer(value: Any) -> Callable[[], Any] | None:
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        words = value.getstate()
        return lambda: value.setstate(words)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = copy.deepcopy(value.bit_generator.state)
        return partial(_set_bits, value.bit_generator, bits)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        old = value.get_state()
        return lambda: value.set_state(old)
    return None


def _set_bits(generator: Any, bits: Any) -> None:
    generator.state = bits
