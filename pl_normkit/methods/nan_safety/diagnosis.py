"""Which tensor was the first that was not finite: one re-run of one batch, watched operation by operation. Derived here."""

from __future__ import annotations

__all__ = ["Diagnosis", "diagnose"]

import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import resolve_name

from pl_normkit.methods.nan_safety.ranges import base
from pl_normkit.methods.nan_safety.sources import SourceRecorder, notes_of, place_of, source_line, tensors_in
from pl_normkit.preserve import preserved

RECORD = "pl_normkit.record"
FILLS = {"masked_fill", "masked_fill_", "full", "full_like", "where", "fill_"}


@dataclass
class Diagnosis:
    """Where the first non-finite tensor of a step came from.

    Attributes:
        kind: "batch", "parameter", "forward", "backward", "gradient", "overflow" (a gradient whose norm overflows), "buffer",
            or "unknown" (the re-run was finite).
        module: path of the module that was running, or name of the batch entry, parameter or buffer.
        op: the operation, "" where there is none.
        source: `file.py:line`.
        detail: one line in words.
        inputs: statistics of the operation's input tensors.
    """

    kind: str
    module: str = ""
    op: str = ""
    source: str = ""
    detail: str = ""
    inputs: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        op = f" {self.op}" if self.op else ""
        source = f" at {self.source}" if self.source else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.kind}{op} in {self.module or '(the model)'}{source}{detail}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Record:
    """One operation of the re-run."""

    order: int
    name: str
    module: str
    source: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bad_inputs: list[Maker]
    made_bad: bool


Maker = Record | tuple[str, str]


def is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor.detach()).all())


def statistics(tensor: Tensor) -> dict[str, Any]:
    """Shape, dtype, extremes of the finite entries and counts of the others."""
    values = tensor.detach()
    facts: dict[str, Any] = {"shape": list(values.shape), "dtype": str(values.dtype).removeprefix("torch.")}
    if not values.is_floating_point() or values.numel() == 0:
        return facts
    finite = values[torch.isfinite(values)].double()
    if finite.numel():
        facts |= {"min": finite.min().item(), "max": finite.max().item()}
    counts = {"nan": values.isnan(), "+inf": values == torch.inf, "-inf": values == -torch.inf}
    return facts | {name: count for name, found in counts.items() if (count := int(found.sum()))}


class _Watcher(SourceRecorder):
    """Records every operation and, for each tensor that is not finite, which operation made it out of which bad tensors."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__(model)
        self.records: list[Record] = []
        self.maker: dict[int, Maker] = {}
        self._alive: list[Any] = []
        self._deliberate: set[int] = set()
        for name, tensor in named_tensors(batch):
            self.maker[id(tensor)] = ("batch", name)
        for name, parameter in model.named_parameters():
            self.maker[id(parameter)] = ("parameter", name)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        bad = [tensor for tensor in tensors_in([args, kwargs]) if is_bad(tensor) and not self._is_deliberate(tensor)]
        makers = [self.maker[id(tensor)] for tensor in bad if id(tensor) in self.maker]
        deliberate = any(id(tensor) in self._deliberate for tensor in tensors_in([args, kwargs]))
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        kept = (args[0].detach().clone(), *args[1:]) if _in_place(name) and args and isinstance(args[0], Tensor) else args
        output = func(*args, **kwargs)
        changed = [*tensors_in(output), *(tensors_in(args[:1]) if _in_place(name) else ())]
        if changed:
            place = (self.module if self._stack else "", source_line(sys._getframe(1)))
            record = Record(len(self.records), name, *place, kept, kwargs, makers, made_bad=False)
            self._alive.append((args, kwargs, output))
            self._note(record, changed, arrived_bad=bool(bad), deliberate=deliberate)
            self.seen(func, args, kwargs, output)
        return output

    def _is_deliberate(self, tensor: Tensor) -> bool:
        """A constant of -inf, or a mask filled with it: no mistake unless a NaN comes out of it."""
        known = id(tensor) in self._deliberate
        return (known or id(tensor) not in self.maker) and not _has_nan_or_plus_inf(tensor)

    def _note(self, record: Record, changed: list[Tensor], *, arrived_bad: bool, deliberate: bool) -> None:
        made = [tensor for tensor in changed if is_bad(tensor)]
        if made and not arrived_bad and (record.name.rsplit(".", 1)[-1] in FILLS or deliberate):
            self._deliberate |= {id(tensor) for tensor in made if not _has_nan_or_plus_inf(tensor)}
            made = [tensor for tensor in made if id(tensor) not in self._deliberate]
        record.made_bad = bool(made) and not record.bad_inputs
        self.records.append(record)
        for tensor in made:
            self.maker[id(tensor)] = record
        for tensor in changed:
            if tensor.grad_fn is not None:
                notes_of(tensor.grad_fn).setdefault(RECORD, record)


def _has_nan_or_plus_inf(tensor: Tensor) -> bool:
    return bool((tensor.isnan() | (tensor == torch.inf)).any())


def _in_place(name: str) -> bool:
    short = name.rsplit(".", 1)[-1]
    return (
        short == "__setitem__" or (short.endswith("_") and not short.endswith("__")) or (short.startswith("__i") and short.endswith("__"))
    )


def named_tensors(value: Any, name: str = "batch") -> Iterable[tuple[str, Tensor]]:
    """Tensors of a batch with their keys: `batch[0]["image"]`."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{position}]")


def diagnose(run: Callable[[], Tensor | None], model: nn.Module, batch: Any) -> tuple[Diagnosis, Record | None]:
    """Run one step again and name the first tensor that was not finite.

    Args:
        run: computes the loss of the step, from `batch`, without stepping an optimizer.
        model: the module whose paths are reported. Its buffers, gradients, attributes, and every RNG are put back.
        batch: the batch, for naming its entries.

    Returns:
        The diagnosis and the operation's record (None where no single operation is to blame).
    """
    buffers_before = {name: is_bad(buffer) for name, buffer in model.named_buffers()}
    with preserved(model, buffers=True), _gradients_aside(model), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        watcher = _Watcher(model, batch)
        with watcher.watching():
            loss = run()
        if loss is not None and is_bad(loss):
            return _trace_back(watcher, loss)
        if loss is not None and loss.requires_grad:
            found = _watch_backward(loss, model)
            if found is not None:
                return found
        polluted = [name for name, buffer in model.named_buffers() if is_bad(buffer) and not buffers_before[name]]
        if polluted:
            return _blame_buffer(watcher, polluted[0])
    return Diagnosis("unknown", detail="the re-run of this batch was finite on this rank"), None


@contextmanager
def _gradients_aside(model: nn.Module) -> Any:
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _trace_back(watcher: _Watcher, loss: Tensor) -> tuple[Diagnosis, Record | None]:
    """From the loss back along tensors that are not finite, to the earliest operation whose inputs were finite."""
    start = watcher.maker.get(id(loss))
    waiting: list[Maker] = [] if start is None else [start]
    seen: set[int] = set()
    leaves: list[tuple[str, str]] = []
    births: list[Record] = []
    while waiting:
        maker = waiting.pop()
        if id(maker) in seen:
            continue
        seen.add(id(maker))
        if isinstance(maker, tuple):
            leaves.append(maker)
        elif maker.made_bad:
            births.append(maker)
        else:
            waiting += maker.bad_inputs
    if leaves:
        kind, name = leaves[0]
        return Diagnosis(kind, name, detail=f"{name} is not finite", inputs=[_leaf_statistics(watcher, name, kind)]), None
    births = births or [record for record in watcher.records if record.made_bad]
    if not births:
        return Diagnosis("unknown", detail="the loss is not finite; no watched operation made it so"), None
    first = min(births, key=lambda record: record.order)
    arrived = any(is_bad(tensor) for tensor in tensors_in([first.args, first.kwargs]))
    detail = "an input arrived non-finite from code that cannot be watched" if arrived else "its inputs are finite, its output is not"
    return _blame("forward", first, detail)


def _leaf_statistics(watcher: _Watcher, name: str, kind: str) -> dict[str, Any]:
    for args, kwargs, _ in watcher._alive:
        for tensor in tensors_in([args, kwargs]):
            if watcher.maker.get(id(tensor)) == (kind, name):
                return statistics(tensor)
    return {}


def _blame(kind: str, record: Record, detail: str) -> tuple[Diagnosis, Record]:
    inputs = [statistics(tensor) for tensor in tensors_in([record.args, record.kwargs])]
    return Diagnosis(kind, record.module, record.name, record.source, detail, inputs), record


def _blame_buffer(watcher: _Watcher, name: str) -> tuple[Diagnosis, Record | None]:
    path = name.rpartition(".")[0]
    for record in watcher.records:
        if record.module == path and any(is_bad(tensor) for tensor in tensors_in([record.args, record.kwargs])):
            inputs = [statistics(tensor) for tensor in tensors_in([record.args, record.kwargs])]
            return Diagnosis("buffer", name, record.name, record.source, f"{name} is no longer finite", inputs), None
    return Diagnosis("buffer", name, detail=f"{name} is no longer finite"), None


def _watch_backward(loss: Tensor, model: nn.Module) -> tuple[Diagnosis, Record | None] | None:
    """Run the backward; the first node that turns finite gradients into others, else the first parameter whose gradient is bad."""
    blamed: list[Node] = []
    handles = []
    for node in _nodes(loss.grad_fn):

        def check(grad_inputs: Any, grad_outputs: Any, node: Node = node) -> None:
            if any(is_bad(g) for g in grad_inputs if g is not None) and not any(is_bad(g) for g in grad_outputs if g is not None):
                blamed.append(node)

        handles.append(node.register_hook(check))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    if blamed:
        record = notes_of(blamed[0]).get(RECORD)
        detail = f"{base(blamed[0])}'s backward turns finite gradients into non-finite ones"
        if record is None:
            place = place_of(blamed[0])
            return Diagnosis("backward", place.module, base(blamed[0]), place.source, detail), None
        return _blame("backward", record, detail)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and is_bad(parameter.grad):
            return Diagnosis("gradient", name, detail=f"the gradient of {name} is not finite", inputs=[statistics(parameter.grad)]), None
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad.norm())):
            return Diagnosis(
                "overflow", name, detail=f"the norm of the gradient of {name} overflows", inputs=[statistics(parameter.grad)]
            ), None
    return None


def _nodes(root: Node | None) -> list[Node]:
    seen: set[Node] = set()
    waiting = [root] if root is not None else []
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return list(seen)
