"""Sees the operations of a forward pass: which parameters it reads, where gradients end, what norms and first layers get."""

from __future__ import annotations

__all__ = ["ForwardWatch", "Seen"]

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from pl_normkit.findings import Place
from pl_normkit.first_step import operations
from pl_normkit.first_step.autograd_nodes import GraphView
from pl_normkit.first_step.drop_masks import DropMasks
from pl_normkit.first_step.facts import Cut, Dropout, FirstInput, ForwardFacts, NormCall, ReverseRead
from pl_normkit.first_step.tensor_notes import TensorNotes
from pl_normkit.graph.autograd import source_line, tensors_in
from pl_normkit.preserve import global_generators

_CALLERS = ("recorder.py", "measure.py", "auditing.py")


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (nn.Module, str, bytes, int, float, type(None), type)


@dataclasses.dataclass(frozen=True)
class Seen:
    """One operation: its name, result, and where it ran."""

    op: str
    result: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    place: Place


class _Cut:
    """A cut as seen, with what leads to it; the names are looked up only when asked for."""

    def __init__(self, how: str, place: Place, sources: Sequence[Tensor], parameters: frozenset[str]) -> None:
        self.how, self.place, self.parameters = how, place, parameters
        self.nodes = [tensor.grad_fn for tensor in sources if tensor.grad_fn is not None]


class ForwardWatch(TorchFunctionMode):
    """While `watching`, every operation is looked at; nothing is changed, and the operations compute what they would without.

    It costs Python time per operation: for one step or a probe, not for training.

    Args:
        model: the module whose paths and parameter names are told.
        inputs: what the model is called with, to follow what its outputs depend on; None takes them from its first call.
        each: called with every operation that gives tensors, for probes that look at values; it makes the place known each time.

    Attributes:
        failure: what went wrong in watching, which then ended; the model's own call goes on. None else.
    """

    def __init__(self, model: nn.Module, inputs: Any = None, *, each: Callable[[Seen], None] | None = None) -> None:
        super().__init__()
        self._paths = {module: path for path, module in model.named_modules()}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._model, self._each = model, each
        self._stack: list[str] = []
        self._called: set[str] = set()
        self._read: set[str] = set()
        self._written: set[str] = set()
        self._data_of: TensorNotes[str] = TensorNotes()
        self._cuts: list[_Cut] = []
        self._norms: list[NormCall] = []
        self._dropouts: list[Dropout] = []
        self._masks = DropMasks(lambda tensor: id(tensor) in self._names)
        self._generators: Any = None
        self._draws_numbers = False
        self._masked: list[tuple[int, Dropout]] = []
        self._silent_dropouts: dict[str, None] = {}
        self._reverse: TensorNotes[int] = TensorNotes()
        self._reverse_reads: list[ReverseRead] = []
        self._first_inputs: list[FirstInput] = []
        self._switched_off = ""
        self._marks: TensorNotes[frozenset[int]] = TensorNotes()
        self._raw: TensorNotes[bool] = TensorNotes()
        self._mark_inputs(inputs)
        self._used: set[int] = set()
        self._outputs: list[Any] = []
        self._inner_outputs: list[tuple[str, list[Tensor]]] = []
        self._is_on = False
        self._handles: list[Any] = []
        self.failure: Exception | None = None

    # Switching it on and off.

    def start(self) -> None:
        """Begin to watch: from now on each outermost call of the model, or of a part of it, until `stop`."""
        self._is_on = True
        before = torch_module.register_module_forward_pre_hook(self._enter)
        after = torch_module.register_module_forward_hook(self._leave, always_call=True)
        self._handles = [before, after]
        if not self._marks:
            self._handles.append(self._model.register_forward_pre_hook(self._take_inputs, with_kwargs=True))

    def stop(self) -> None:
        """Watch no more; inside a call of the model the hooks stay, idle, until it ends."""
        self._is_on = False
        if not self._stack:
            self._remove_hooks()

    def _give_up(self, error: Exception) -> None:
        self.failure, self._is_on = error, False

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def watching(self) -> Iterator[ForwardWatch]:
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def _take_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._marks and self._is_on:
            try:
                self._mark_inputs((args, kwargs))
            except Exception as error:
                self._give_up(error)

    def _mark_inputs(self, inputs: Any) -> None:
        for position, tensor in enumerate(tensors_in(inputs)):
            self._marks[tensor] = self._marks.get(tensor, frozenset()) | {position}
            self._raw[tensor] = not tensor.is_floating_point()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._paths:
            if not self._stack:
                self._generators = global_generators()
                self.__enter__()  # type: ignore[no-untyped-call]
            self._stack.append(self._paths[module])
            self._called.add(self._paths[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._paths:
            self._stack.pop()
            if not self._stack:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._draws_numbers |= self._generators != global_generators()
                if not self._is_on:
                    self._remove_hooks()
                    return
            if self._is_on:
                try:
                    self._keep_output(module, output)
                except Exception as error:
                    self._give_up(error)

    def _keep_output(self, module: nn.Module, output: Any) -> None:
        if not self._stack:
            self._outputs.append(output)
        elif not isinstance(output, Tensor):
            self._inner_outputs.append((self._paths[module], list(tensors_in(output))))
        if isinstance(module, nn.RNNBase) and module.bidirectional:
            for tensor in list(tensors_in(output))[:1]:
                self._reverse[tensor] = (1 if module.batch_first else 0) if tensor.dim() == 3 else 0

    # What it sees.

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not self._is_on:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            self._switched_off = "" if args[0] else _line(2)
            return func(*args, **kwargs)
        wants_gradient = torch.is_grad_enabled()
        if func is torch.autograd.grad:  # a model that gives the derivative of its energy has used the energy
            self._outputs += [args, tuple(kwargs.values())]
        output = func(*args, **kwargs)
        try:  # here and not in a method of its own, since places are told by the depth of the stack
            name = operations.name_of(func)
            sources = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))] if kwargs else list(tensors_in(args))
            results = list(tensors_in(output))
            if not results:
                self._see_value_read(name, args, sources, output)
                return output
            self._see_mask(name, args, kwargs, sources, results[0])
            if name not in operations.SHAPE_ONLY:
                self._see(name, args, kwargs, sources, results, wants_gradient)
        except Exception as error:
            self._give_up(error)
            return output
        if self._each is not None and name not in operations.SHAPE_ONLY:
            self._each(Seen(name, output, args, kwargs, self._place()))
        return output

    def _see(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], sources: list[Tensor], results: list[Tensor], wants: bool
    ) -> None:
        parameters = frozenset(self._names[id(tensor)] for tensor in sources if id(tensor) in self._names)
        self._read |= parameters
        self._see_write(name, args, results)
        self._follow(name, sources, results, bool(parameters))
        ends = any(tensor.requires_grad for tensor in sources) and not any(tensor.requires_grad for tensor in results)
        if ends and not all(tensor is source for tensor in results for source in sources):
            self._see_cut(name, sources, parameters, wants)
        if parameters and name in operations.WEIGHT_LAYERS and args and isinstance(args[0], Tensor) and args[0] in self._raw:
            self._see_first_input(args[0])
        if name in operations.NORMS:
            self._see_norm(name, args, kwargs)
        elif name in operations.DROPOUTS:
            probability = operations.drop_probability(name, args, kwargs)
            if probability > 0:
                self._dropouts.append(Dropout(self._place(), name, probability))
            elif operations.is_switched_off(name, args, kwargs):
                self._silent_dropouts[self._stack[-1] if self._stack else ""] = None
        elif name in ("__getitem__", "select") and operations.reads_last(name, args, kwargs, self._reverse.get(args[0])):
            self._reverse_reads.append(ReverseRead(self._place()))

    def _see_mask(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], sources: Sequence[Tensor], result: Tensor) -> None:
        """Dropout by hand."""
        drop = self._masks.see(name, args, kwargs, sources, result)
        if drop is not None:
            self._masked.append((drop[0], Dropout(self._place(), "a mask by hand", drop[1])))

    def _see_write(self, name: str, args: Sequence[Any], results: Sequence[Tensor]) -> None:
        """A forward pass that moves a parameter itself: a codebook or a teacher by moving average."""
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is None:
            return
        own = self._names.get(id(target)) or self._data_of.get(target)
        if own is None:
            return
        if name in ("data", "detach"):
            self._data_of[results[0]] = own
        elif operations.is_in_place(name):
            self._written.add(own)

    def _place(self) -> Place:
        return Place(self._stack[-1] if self._stack else "", _line(3))

    def _follow(self, name: str, sources: Sequence[Tensor], results: Sequence[Tensor], reads_parameter: bool) -> None:
        """Which of the model's inputs a result depends on, and whether it still is an input that no layer has touched."""
        marks = frozenset().union(*(self._marks.get(tensor, frozenset()) for tensor in sources))
        if marks:
            changed = [sources[0], *_bases(sources[0])] if operations.is_in_place(name) and sources else []
            for tensor in (*results, *changed):
                self._marks[tensor] = self._marks.get(tensor, frozenset()) | marks
        if not reads_parameter and name not in operations.NORMS and name not in operations.LOOKUPS:
            raw = [self._raw[tensor] for tensor in sources if tensor in self._raw]
            if raw and not any(tensor.requires_grad for tensor in results):
                for tensor in results:
                    if tensor.is_floating_point():
                        self._raw[tensor] = all(raw) and (name in operations.CASTS or name in operations.VIEWS)

    def _see_value_read(self, name: str, args: Sequence[Any], sources: Sequence[Tensor], output: Any) -> None:
        if name in ("__setitem__", "__set__"):
            self._see_in_place(name, args, sources)
        elif name in operations.VALUE_READS:
            self._read |= {self._names[id(tensor)] for tensor in sources if id(tensor) in self._names}
            for tensor in sources:
                self._used |= self._marks.get(tensor, frozenset())
            if any(tensor.requires_grad for tensor in sources):
                self._see_cut(name, sources, frozenset(self._names[id(t)] for t in sources if id(t) in self._names), True)

    def _see_in_place(self, name: str, args: Sequence[Any], sources: Sequence[Tensor]) -> None:
        self._see_write("__setitem__", args, ())
        self._read |= {self._names[id(tensor)] for tensor in sources if id(tensor) in self._names}
        if name == "__setitem__":
            self._follow(name, sources, (), False)
            self._see_mask(name, args, {}, sources, sources[0])

    def _see_cut(self, name: str, sources: Sequence[Tensor], parameters: frozenset[str], wants: bool) -> None:
        if wants:
            place = Place(self._stack[-1] if self._stack else "", _line(4))
            self._cuts.append(_Cut(operations.as_written(name), place, sources, parameters))
        else:
            place = Place(self._stack[-1] if self._stack else "", self._switched_off or _line(4))
            self._cuts.append(_Cut("torch.no_grad()", place, sources, parameters))

    def _see_norm(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        call = operations.norm_call(name, args, kwargs, Place(self._stack[-1] if self._stack else "", _line(4)))
        if call is not None:
            self._norms.append(call)

    def _see_first_input(self, value: Tensor) -> None:
        if value.is_floating_point() and value.numel() > 1 and not value.is_meta and len(self._first_inputs) < 8:
            place = Place(self._stack[-1] if self._stack else "", _line(4))
            self._first_inputs.append(operations.first_input(value, place, is_cast=self._raw[value]))

    # What it tells.

    def _offered(self, reached: frozenset[str]) -> frozenset[str]:
        """Parameters behind one of several outputs of an inner module whose other outputs are used: the pooler of a language model."""
        found: frozenset[str] = frozenset()
        for path, tensors in self._inner_outputs:
            own = {name for name in GraphView.of(tensors, self._names).parameters if name.startswith(f"{path}.")}
            if own & reached:
                found |= own
        return found

    def facts(self) -> ForwardFacts:
        """All that was seen; what the outermost modules returned counts as the output, and before they return nothing is lost yet.

        Raises `failure` where watching failed.
        """
        if self.failure is not None:
            raise self.failure
        ends = [*_reachable(self._outputs, 4), *(tensor for module in self._paths for tensor in tensors_in(_left_in(module)))]
        used = frozenset().union(*(self._marks.get(tensor, frozenset()) for tensor in ends)) | self._used
        meant = self._masks.origins_in(ends)
        reached = frozenset(self._read) if self._stack else GraphView.of(ends, self._names).parameters
        return ForwardFacts(
            called=frozenset(self._called),
            read=frozenset(self._read),
            written=frozenset(self._written),
            reached=reached | self._offered(reached) if self._read - reached else reached,
            cuts=tuple(Cut(cut.how, cut.place, cut.parameters | _behind(cut, self._names)) for cut in self._cuts[:200]),
            norms=tuple(self._norms),
            first_inputs=tuple(self._first_inputs),
            dropouts=(*self._dropouts, *(dropout for origin, dropout in self._masked if origin not in meant)),
            silent_dropouts=tuple(self._silent_dropouts),
            reverse_reads=tuple(self._reverse_reads),
            inputs_used=used,
            draws_numbers=self._draws_numbers or self._masks.has_drawn_a_number,
        )


def _reachable(value: Any, depth: int) -> Iterator[Tensor]:
    """As `tensors_in`, and into the attributes of objects: a model may return a distribution."""
    if isinstance(value, (Tensor, *_PLAIN)) or depth == 0:
        yield from tensors_in(value)
        return
    items = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, (list, tuple))
        else vars(value).values()
        if hasattr(value, "__dict__")
        else ()
    )
    for item in items:
        yield from _reachable(item, depth - 1)


def _left_in(module: nn.Module) -> list[Any]:
    """Tensors a forward pass left in attributes, for a loss to take up."""
    return [
        value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE and isinstance(value, (Tensor, list, tuple, dict))
    ]


def _behind(cut: _Cut, names: dict[int, str]) -> frozenset[str]:
    return GraphView(tuple(cut.nodes), names).parameters


def _bases(tensor: Tensor) -> list[Tensor]:
    return [] if tensor.is_inference() or tensor._base is None else [tensor._base]


def _line(depth: int) -> str:
    return source_line(sys._getframe(depth), _CALLERS)
