"""Which tensor was the first that was not finite: one re-run of one batch, watched operation by operation. Derived here."""

from __future__ import annotations

__all__ = ["Diagnosis", "diagnose"]

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import get_overridable_functions, resolve_name

from pl_normkit.graph.autograd import base, source_line, tensors_in
from pl_normkit.methods.nan_safety.diagnosis.explanations import explanation
from pl_normkit.methods.nan_safety.diagnosis.sources import SourceRecorder, notes_of, place_of
from pl_normkit.preserve import preserved

RECORD = "pl_normkit.record"
FILLS = {"masked_fill", "masked_fill_", "full", "full_like", "where", "fill_", "new_full"}
FILLS |= {"tensor", "as_tensor", "scalar_tensor", "new_tensor"}


@dataclass
class Diagnosis:
    """Where the first non-finite tensor of a step came from.

    Attributes:
        kind: "batch", "parameter", "state" (of an optimizer), "forward", "backward", "gradient", "overflow" (a gradient whose norm
            overflows), "buffer", "spike" (a finite gradient far above the median), or "unknown" (the re-run was finite, or impossible).
        module: path of the module that was running, or name of the batch entry, parameter or buffer.
        op: the operation, "" where there is none.
        source: `file.py:line`.
        detail: one line in words.
        inputs: statistics of the operation's input tensors.
        samples: indices in the batch whose rows of that tensor are not finite; empty where it has no row for each sample.
    """

    kind: str
    module: str = ""
    op: str = ""
    source: str = ""
    detail: str = ""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        op = f" {self.op}" if self.op else ""
        source = f" at {self.source}" if self.source else ""
        detail = f": {self.detail}" if self.detail else ""
        samples = f"; samples {_shortened(self.samples)} of the batch" if self.samples else ""
        return f"{self.kind}{op} in {self.module or '(the model)'}{source}{detail}{samples}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _shortened(samples: list[int], most: int = 8) -> str:
    return ", ".join(map(str, samples[:most])) + (f" and {len(samples) - most} more" if len(samples) > most else "")


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
    samples: list[int] = field(default_factory=list)


Maker = Record | tuple[str, str]


def is_bad(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta and not bool(torch.isfinite(tensor.detach()).all())


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
        self._batch_size = size_of(batch)
        self.samples: list[int] = []
        self.fills: list[Record] = []
        self.seen_in_backward: Callable[[Node], None] | None = None
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
            self.fills.append(record)
            made = [tensor for tensor in made if id(tensor) not in self._deliberate]
        record.made_bad = bool(made) and not record.bad_inputs
        self.records.append(record)
        if made and not (record.samples or self.samples):
            record.samples = self.samples = rows(made, self._batch_size) or (
                _rows_unreduced(record, self._batch_size) if record.made_bad else []
            )
        for tensor in made:
            self.maker[id(tensor)] = record
        for tensor in changed:
            if tensor.grad_fn is not None:
                notes_of(tensor.grad_fn).setdefault(RECORD, record)
                if self.seen_in_backward is not None:
                    self.seen_in_backward(tensor.grad_fn)

    def rows(self, tensors: Iterable[Tensor | None]) -> list[int]:
        """Samples whose rows of `tensors` are not finite."""
        return rows([tensor for tensor in tensors if tensor is not None], self._batch_size)


def _has_nan_or_plus_inf(tensor: Tensor) -> bool:
    return bool((tensor.isnan() | (tensor == torch.inf)).any())


def _in_place(name: str) -> bool:
    short = name.rsplit(".", 1)[-1]
    return (
        short == "__setitem__" or (short.endswith("_") and not short.endswith("__")) or (short.startswith("__i") and short.endswith("__"))
    )


def size_of(batch: Any) -> int:
    """The number of samples: the most frequent first size among the tensors of `batch`; 0 where it has none."""
    sizes = [tensor.shape[0] for _, tensor in named_tensors(batch) if tensor.dim()]
    return max(sizes, key=sizes.count, default=0)


def rows(tensors: list[Tensor], batch_size: int) -> list[int]:
    """Indices of the rows that are not finite in one of `tensors`, as far as they have one row for each sample."""
    found: set[int] = set()
    for tensor in tensors:
        if batch_size and tensor.dim() and tensor.shape[0] == batch_size and is_bad(tensor):
            bad = ~torch.isfinite(tensor.detach()).reshape(batch_size, -1).all(1)
            found |= set(torch.nonzero(bad).flatten().tolist())
    return sorted(found)


def _rows_unreduced(record: Record, batch_size: int) -> list[int]:
    """The samples behind the one number of a torch loss: what it gives with `reduction="none"`."""
    if record.kwargs.get("reduction") not in ("mean", "sum", "batchmean"):
        return []
    function = _functions().get(record.name)
    output = None if function is None else function(*record.args, **{**record.kwargs, "reduction": "none"})
    return rows([output], batch_size) if isinstance(output, Tensor) else []


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    return {str(resolve_name(function)): function for functions in get_overridable_functions().values() for function in functions}


def named_tensors(value: Any, name: str = "batch") -> Iterable[tuple[str, Tensor]]:
    """Tensors of a batch with their keys: `batch[0]["image"]`."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from named_tensors(getattr(value, part.name, None), f"{name}.{part.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{position}]")


def diagnose(run: Callable[[], Tensor | None], model: nn.Module | None = None, batch: Any = None) -> tuple[Diagnosis, Record | None]:
    """Run one step again and name the first tensor that was not finite.

    Args:
        run: computes the loss of the step, from `batch`, without stepping an optimizer.
        model: the module whose paths are reported; None for a plain function. Its buffers, gradients, attributes, and every RNG are put
            back.
        batch: the batch, for naming its entries.

    Returns:
        The diagnosis and the operation's record (None where no single operation is to blame).
    """
    model = model if model is not None else nn.Module()
    buffers_before = {name: is_bad(buffer) for name, buffer in model.named_buffers()}
    with preserved(model, buffers=True), _gradients_aside(model), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        watcher = _Watcher(model, batch)
        with watcher.watching():
            loss = run()
        if loss is not None and is_bad(loss):
            return _trace_back(watcher, loss, batch)
        if loss is not None and loss.requires_grad:
            found = _watch_backward(loss, model, watcher)
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


def _trace_back(watcher: _Watcher, loss: Tensor, batch: Any) -> tuple[Diagnosis, Record | None]:
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
        facts = [_leaf_statistics(watcher, name, kind)]
        samples = watcher.rows(tensor for key, tensor in named_tensors(batch) if key == name) if kind == "batch" else []
        return Diagnosis(kind, name, detail=f"{name} is not finite", inputs=facts, samples=samples), None
    births = births or [record for record in watcher.records if record.made_bad] or watcher.fills
    if not births:
        return Diagnosis("unknown", detail="the loss is not finite; no watched operation made it so"), None
    first = min(births, key=lambda record: record.order)
    return _blame("forward", first, explanation(first), first.samples or watcher.samples)


def _leaf_statistics(watcher: _Watcher, name: str, kind: str) -> dict[str, Any]:
    for args, kwargs, _ in watcher._alive:
        for tensor in tensors_in([args, kwargs]):
            if watcher.maker.get(id(tensor)) == (kind, name):
                return statistics(tensor)
    return {}


def _blame(kind: str, record: Record, detail: str, samples: list[int]) -> tuple[Diagnosis, Record]:
    inputs = [statistics(tensor) for tensor in tensors_in([record.args, record.kwargs])]
    return Diagnosis(kind, record.module, record.name, record.source, detail, inputs, samples), record


def _blame_buffer(watcher: _Watcher, name: str) -> tuple[Diagnosis, Record | None]:
    path = name.rpartition(".")[0]
    for record in watcher.records:
        if record.module == path and any(is_bad(tensor) for tensor in tensors_in([record.args, record.kwargs])):
            inputs = [statistics(tensor) for tensor in tensors_in([record.args, record.kwargs])]
            return Diagnosis("buffer", name, record.name, record.source, f"{name} is no longer finite", inputs), None
    return Diagnosis("buffer", name, detail=f"{name} is no longer finite"), None


def _watch_backward(loss: Tensor, model: nn.Module, watcher: _Watcher) -> tuple[Diagnosis, Record | None] | None:
    """Run the backward; the first node that turns finite gradients into others, else the first parameter whose gradient is bad.

    The nodes that a reentrant checkpoint makes while it runs its part again are watched, too.
    """
    blamed: list[tuple[Node, list[int]]] = []
    watched: set[Node] = set()
    handles = []

    def watch(root: Node | None) -> None:
        for node in _nodes(root, watched):

            def check(grad_inputs: Any, grad_outputs: Any, node: Node = node) -> None:
                if any(is_bad(g) for g in grad_inputs if g is not None) and not any(is_bad(g) for g in grad_outputs if g is not None):
                    blamed.append((node, watcher.rows(grad_inputs)))

            handles.append(node.register_hook(check))

    total = loss.sum()
    watch(total.grad_fn)
    watcher.seen_in_backward = watch
    try:
        with watcher.watching():
            _run_backward(total)
    finally:
        watcher.seen_in_backward = None
        for handle in handles:
            handle.remove()
    if blamed:
        node, samples = blamed[0]
        record = notes_of(node).get(RECORD)
        detail = f"{base(node)}'s backward turns finite gradients into non-finite ones"
        if record is None:
            place = place_of(node)
            return Diagnosis("backward", place.module, base(node), place.source, detail, samples=samples), None
        return _blame("backward", record, detail, samples)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and is_bad(parameter.grad):
            return Diagnosis("gradient", name, detail=f"the gradient of {name} is not finite", inputs=[statistics(parameter.grad)]), None
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad.norm())):
            return Diagnosis(
                "overflow", name, detail=f"the norm of the gradient of {name} overflows", inputs=[statistics(parameter.grad)]
            ), None
    return None


def _run_backward(total: Tensor) -> None:
    """`total.backward()` past torch's own function, which would take the watcher away for as long as it runs."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((total,), (torch.ones_like(total),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _nodes(root: Node | None, seen: set[Node]) -> list[Node]:
    """The nodes behind `root` that are not in `seen`, which they join."""
    found: list[Node] = []
    waiting = [root] if root is not None else []
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            found.append(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return found
