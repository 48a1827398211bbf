"""One trace for all who read the same network with the same inputs, as long as neither has changed."""

from __future__ import annotations

__all__ = ["TraceStore", "shared_traces", "store_in_use"]

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pl_normkit.errors import TraceError

if TYPE_CHECKING:
    from pl_normkit.graph.model import ModelGraph

_UNRELATED = frozenset(
    (
        *("training", "_trainer", "_device", "_dtype", "_current_fx_name", "_metric_attributes"),
        *("setup", "configure_model", "configure_optimizers", "on_load_checkpoint"),
        *("_parameters", "_buffers", "_modules"),
    )
)
"""Attributes that a Trainer, or a callback, changes in the course of a fit, and that no forward pass reads; and those read on their own."""
_PLAIN = (bool, int, float, str, bytes, type(None))
_CONTAINERS = (dict, list, tuple, set)


class TraceStore:
    """Graphs, and failures to trace, by network and inputs. A network counts as the same while its modules, their plain attributes, hooks,
    modes and the shapes of its parameters are; of tensors among the inputs shape and type count.

    Attributes:
        traces: how often a network was really traced.
    """

    def __init__(self) -> None:
        self.traces = 0
        self._known: dict[Hashable, tuple[weakref.ref[nn.Module], ModelGraph | TraceError]] = {}

    def graph(self, model: nn.Module, example_inputs: Any, training: bool, make: Callable[[], ModelGraph]) -> ModelGraph:
        """The graph that `make` gave for the same model and inputs, or gives now. Raises TraceError as it did."""
        key = (id(model), training, _state_of(model, training), _form_of(example_inputs))
        found = self._known.get(key)
        if found is None or found[0]() is not model:
            self.traces += 1
            try:
                found = (weakref.ref(model), make())
            except TraceError as error:
                found = (weakref.ref(model), error)
            self._known[key] = found
        if isinstance(found[1], TraceError):
            raise found[1]
        return found[1]

    def forget(self) -> None:
        self._known.clear()


_store: ContextVar[TraceStore | None] = ContextVar("store", default=None)


@contextmanager
def shared_traces(store: TraceStore) -> Iterator[None]:
    """Let `ModelGraph.from_model` use `store` within the block."""
    token = _store.set(store)
    try:
        yield
    finally:
        _store.reset(token)


def store_in_use() -> TraceStore | None:
    return _store.get()


def _state_of(model: nn.Module, training: bool) -> Hashable:
    mode_counts = model.training is training  # else the trace sets the mode of every part
    return tuple((name, *_module_state(module, mode_counts)) for name, module in model.named_modules(remove_duplicate=False))


def _module_state(module: nn.Module, mode_counts: bool) -> tuple[Any, ...]:
    own = vars(module)
    plain = tuple((name, _form_of(value)) for name, value in own.items() if name not in _UNRELATED and not name.startswith("_forward"))
    hooks = [hook for registry in ("_forward_pre_hooks", "_forward_hooks") for hook in own.get(registry, {}).values()]
    acting = tuple(id(hook) for hook in hooks if not getattr(getattr(hook, "__self__", None), "only_watches", False))
    shapes = tuple((name, _form_of(held)) for registry in ("_parameters", "_buffers") for name, held in own.get(registry, {}).items())
    return (id(module), type(module), module.training if mode_counts else None, plain, acting, shapes)


def _form_of(value: Any) -> Hashable:
    """What a trace sees of a value: shape and type of a tensor, plain values themselves, of the rest the identity."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, _CONTAINERS) and not value:  # most of a module's attributes
        return type(value), 0
    leaves, structure = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return type(value), id(value)
    return str(structure), tuple(map(_form_of, leaves))
