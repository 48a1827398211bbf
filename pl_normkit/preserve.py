"""Reading or measuring a model must change nothing: save what a forward pass may touch, and put it back."""

from __future__ import annotations

__all__ = ["global_generators", "is_generator", "objects_kept", "preserved", "random_states"]

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})


@contextmanager
def preserved(model: nn.Module, *, buffers: bool = False) -> Iterator[None]:
    """Restore training flags, plain attributes, the states of the global random generators and of those that modules hold, and, with
    `buffers`, buffer values when the block ends.

    Args:
        model: the module whose state is kept.
        buffers: also copy and restore the values of buffers, and of frozen parameters that are no larger than a codebook is, which
            forward passes write to as well; needed when real data runs through the model, not for tracing.
    """
    with ExitStack() as stack:
        for restore in (_attributes(model), random_states()):
            stack.callback(restore)
        if buffers:
            stack.callback(_buffer_values(model))
        yield


@contextmanager
def objects_kept(*roots: object) -> Iterator[None]:
    """Restore plain Python objects that hang on `roots` (data sets, transforms, counters of a module's own) when the block ends.

    Their attributes, their lists, dicts and sets, and the state of random generators they hold; tensors and arrays, which may be
    as large as the data, are not copied.
    """
    restorers: list[Callable[[], None]] = []
    empty: list[Any] = []  # most of a module's containers
    seen: set[int] = set()
    waiting = deque(roots)
    while waiting and len(seen) < _MOST_OBJECTS:
        found = waiting.popleft()
        if id(found) not in seen:
            seen.add(id(found))
            if isinstance(found, (list, dict, set, deque)) and not found:
                empty.append(found)
                continue
            restorers += _object_restorers(found)
            waiting.extend(_held_by(found))
    try:
        yield
    finally:
        for restore in restorers:
            restore()
        _clear(empty)


_MOST_FROZEN = 2**19
"""Entries of a frozen parameter that is copied: codebooks and centres are smaller, matrices of large backbones larger."""
_MOST_OBJECTS = 10_000
_LONG = 1_000
_NOT_PLAIN = (
    *("builtins", "io", "logging", "threading", "multiprocessing", "concurrent", "asyncio"),
    *("torch.nn", "torch._C", "lightning", "pytorch_lightning", "lightning_fabric", "numpy", "pandas", "pyarrow", "PIL"),
)


def _held_by(found: object) -> list[object]:
    """Objects to look into next; not each entry of a long container, and nothing of the Trainer."""
    held: list[object] = []
    if isinstance(found, (list, tuple, set, deque)):
        held = list(found) if len(found) <= _LONG else []
    elif isinstance(found, dict):
        held = list(found.values()) if len(found) <= _LONG else []
    elif isinstance(found, nn.Module) or _is_plain(found):
        held = list(vars(found).values())
    return [value for value in held if isinstance(value, (list, tuple, set, deque, dict)) or _is_plain(value) or is_generator(value)]


def _is_plain(found: object) -> bool:
    if not hasattr(found, "__dict__") or isinstance(found, (type, nn.Module, Tensor, ModuleType, FunctionType, MethodType)):
        return False
    home = type(found).__module__
    return not any(home == name or home.startswith(f"{name}.") for name in _NOT_PLAIN)


def _object_restorers(found: object) -> list[Callable[[], None]]:
    if isinstance(found, (list, dict, set, deque)):
        return [_container_content(found)]
    if is_generator(found):
        return [_generator_state(found)]
    if not _is_plain(found):
        return []
    attributes = vars(found)
    return [_container_content(attributes)]


def is_generator(found: object) -> bool:
    """Whether it is a random generator of Python, torch or numpy."""
    numpy = sys.modules.get("numpy")
    own = isinstance(found, (random.Random, torch.Generator))
    return own or (numpy is not None and isinstance(found, (numpy.random.Generator, numpy.random.RandomState)))


def _generator_state(generator: Any) -> Callable[[], None]:
    """The state of a random generator of Python, torch or numpy."""
    if isinstance(generator, random.Random):
        state = generator.getstate()
        return lambda: generator.setstate(state)
    if hasattr(generator, "bit_generator"):
        bits = copy.deepcopy(generator.bit_generator.state)

        def restore_bits() -> None:
            generator.bit_generator.state = bits

        return restore_bits
    state = generator.get_state()
    restore: Callable[[Any], None] = generator.set_state
    return lambda: restore(state)


def _attributes(model: nn.Module) -> Callable[[], None]:
    """Forward passes set plain attributes (caches, counters) and `train()` sets flags; both live in `vars(module)`."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    seen: set[int] = set()
    empty: list[Any] = []  # most of a module's containers; a restorer for each would cost more than the rest of the audit
    contents = [restore for module, attributes in before for restore in _module_contents(attributes, seen, empty)]

    def restore_all() -> None:
        for restore in contents:
            restore()
        _clear(empty)
        for module, attributes in before:
            current = vars(module)
            for name in current.keys() - attributes.keys():
                del current[name]
            current.update(attributes)

    return restore_all


def _module_contents(attributes: dict[str, Any], seen: set[int], empty: list[Any]) -> Iterator[Callable[[], None]]:
    """Restorers of what the attributes hold; of the registries only the entries, since their tensors may be large."""
    for name, value in attributes.items():
        if name in _REGISTRIES:
            if isinstance(value, dict):  # TorchScript keeps views of its own there, which nothing can put back
                if value:
                    yield _container_content(value)
                else:
                    empty.append(value)
        elif is_generator(value):
            yield _generator_state(value)
        elif isinstance(value, (Tensor, list, dict, set, deque, tuple)):
            yield from _contents(value, seen, empty)


def _contents(value: Any, seen: set[int], empty: list[Any]) -> Iterator[Callable[[], None]]:
    if id(value) in seen or not isinstance(value, (Tensor, list, dict, set, deque, tuple)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield _tensor_value(value)
        return
    if not isinstance(value, tuple):
        if not value:
            empty.append(value)
            return
        yield _container_content(value)
    for inner in value.values() if isinstance(value, dict) else value:
        yield from _contents(inner, seen, empty)


def _clear(containers: list[Any]) -> None:
    """Empty those that were empty."""
    for container in containers:
        if container:
            container.clear()


def _container_content(container: Any) -> Callable[[], None]:
    ids = _ids(container)
    content = dict(container) if isinstance(container, dict) else list(container)

    def restore() -> None:
        if _ids(container) != ids:
            container.clear()
            fill = container.update if isinstance(container, (dict, set)) else container.extend
            fill(content)

    return restore


def _ids(container: Any) -> list[int]:
    """Which objects it holds, in order; the saved content keeps them alive, so an id stands for its object."""
    if isinstance(container, dict):
        return [id(part) for item in container.items() for part in item]
    return [id(item) for item in container]


def _tensor_value(tensor: Tensor) -> Callable[[], None]:
    """Puts the value back where it changed. Neither an untouched nor a restored tensor looks modified to a pending backward
    pass: `.data` keeps the version. Batch norm writes its running statistics without a new version, so values are compared.
    """
    if tensor.is_inference():  # cannot be written to outside inference mode
        return _nothing
    value = tensor.detach().clone()

    def restore() -> None:
        if not tensor.is_meta and not torch.equal(tensor, value):
            tensor.data.copy_(value)

    return restore


def random_states() -> Callable[[], None]:
    """Keep the states of the global generators of Python, torch (CUDA's too) and numpy; calling the result puts them back."""
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return restore


def global_generators() -> tuple[Any, ...]:
    """The states of Python's and numpy's generators, to be compared with later ones."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    _, words, position, *_ = numpy.random.get_state()
    return random.getstate(), words.tobytes(), position


def _nothing() -> None:
    return


def _buffer_values(model: nn.Module) -> Callable[[], None]:
    frozen = [p for p in model.parameters() if not p.requires_grad and p.numel() <= _MOST_FROZEN and type(p) is nn.Parameter]
    restorers = [_tensor_value(tensor) for tensor in [*model.buffers(), *frozen]]

    def restore_all() -> None:
        for restore in restorers:
            restore()

    return restore_all
