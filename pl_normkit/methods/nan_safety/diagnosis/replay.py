"""The file a guard saves on an event, and its replay. Plain data only: loading one runs no code from it."""

from __future__ import annotations

__all__ = ["RandomState", "ReplayReport", "replay", "save_replay"]

import os
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, resolve_name

from pl_normkit.errors import DataError
from pl_normkit.graph.autograd import tensors_in
from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis, Record, diagnose, is_bad, named_tensors
from pl_normkit.preserve import preserved

FORMAT = 1


@dataclass(frozen=True)
class RandomState:
    """States of torch (CPU and CUDA), Python and numpy generators."""

    cpu: Tensor
    cuda: list[Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> RandomState:
        numpy = sys.modules.get("numpy")
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state() if numpy is not None else None)

    def use(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy is not None:
            numpy.random.set_state(self.numpy)

    def as_dict(self) -> dict[str, Any]:
        numpy = None if self.numpy is None else [self.numpy[0], [int(word) for word in self.numpy[1]], *self.numpy[2:]]
        return {"cpu": self.cpu, "cuda": self.cuda, "python": list(self.python), "numpy": numpy}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RandomState:
        version, words, gauss = state["python"]
        numpy = state["numpy"]
        if numpy is not None:
            import numpy as np

            numpy = (numpy[0], np.array(numpy[1], dtype=np.uint32), *numpy[2:])
        return cls(state["cpu"], list(state["cuda"]), (version, tuple(words), gauss), numpy)


@dataclass
class ReplayReport:
    """What a replay found.

    Attributes:
        saved: the diagnosis made during training.
        event: step, epoch, batch index and rank of the event.
        how: "batch" (the batch itself is not finite), "operation" (the one operation was run again), "step" (the whole step was), or
            "nothing" (the file holds no operation: give the module).
        reproduced: whether a non-finite tensor came out again; None for "nothing".
        again: the diagnosis of the replay, for "step".
    """

    saved: Diagnosis
    event: dict[str, Any]
    how: str
    reproduced: bool | None
    again: Diagnosis | None = None

    def __str__(self) -> str:
        verdict = {True: "reproduced", False: "NOT reproduced", None: "not replayed: give the module"}[self.reproduced]
        where = ", ".join(f"{key} {value}" for key, value in self.event.items())
        lines = [f"{self.saved}", f"  event: {where}", *(f"  input: {facts}" for facts in self.saved.inputs)]
        lines.append(f"  replay of the {self.how}: {verdict}")
        return "\n".join([*lines, f"  again: {self.again}"] if self.again else lines)


def save_replay(
    path: Path,
    diagnosis: Diagnosis,
    record: Record | None,
    batch: Any,
    random_state: RandomState,
    event: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the event to `path` as plain data: the guilty operation with its inputs, the batch, the RNG, and the weights if given.

    The file appears whole or not at all.
    """
    operation = None if record is None else {"name": record.name, "args": _plain(record.args), "kwargs": _plain(record.kwargs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT,
        "diagnosis": diagnosis.as_dict(),
        "event": dict(event),
        "operation": operation,
        "batch": _plain(batch),
        "random_state": random_state.as_dict(),
        "weights": None if weights is None else {name: value.detach().cpu() for name, value in weights.items()},
    }
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(document, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def replay(path: str | Path, module: nn.Module | None = None, step: Callable[[Any], Tensor] | None = None) -> ReplayReport:
    """Reproduce a saved event.

    Args:
        path: a file written by `NaNGuard`.
        module: the LightningModule (or any module, with `step`), with its weights loaded, to run the whole step again on the saved batch
            and RNG state; weights in the file are loaded into it for the replay and taken out again.
        step: computes the loss from the batch; default `module.training_step(batch, batch_index)`.

    Raises:
        DataError: the file is missing or no replay file.

    >>> replay("nan_guard/no_such_file.pt")
    Traceback (most recent call last):
    pl_normkit.errors.DataError: ...
    """
    document = _read(Path(path))
    saved = Diagnosis(**document["diagnosis"])
    event = document["event"]
    if module is not None:
        again = _replay_step(document, module, step)
        return ReplayReport(saved, event, "step", again.kind != "unknown", again)
    if saved.kind == "batch":
        bad = any(is_bad(tensor) for _, tensor in named_tensors(document["batch"]))
        return ReplayReport(saved, event, "batch", bad)
    if document["operation"] is None:
        return ReplayReport(saved, event, "nothing", None)
    return ReplayReport(saved, event, "operation", _replay_operation(document["operation"], backward=saved.kind == "backward"))


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}")
    except Exception as error:
        raise DataError("the replay file cannot be read", where=str(path), evidence=f"{type(error).__name__}: {error}") from error
    return document


def _replay_step(document: dict[str, Any], module: nn.Module, step: Callable[[Any], Tensor] | None) -> Diagnosis:
    batch = _restored(document["batch"])
    index = document["event"].get("batch_index", 0)
    weights = document["weights"]
    before = {name: value.detach().clone() for name, value in module.state_dict().items()} if weights else {}

    def run() -> Tensor:
        RandomState.from_dict(document["random_state"]).use()
        if step is not None:
            return step(batch)
        outcome: Any = module.training_step(batch, index)  # type: ignore[operator]
        loss: Tensor = outcome["loss"] if isinstance(outcome, Mapping) else outcome
        return loss

    try:
        if weights:
            module.load_state_dict(weights)
        with preserved(module):
            if step is None:
                for name in ("log", "log_dict"):
                    object.__setattr__(module, name, lambda *args, **kwargs: None)
            module.train()
            return diagnose(run, module, batch)[0]
    finally:
        if weights:
            module.load_state_dict(before)


def _replay_operation(operation: Mapping[str, Any], *, backward: bool) -> bool:
    """Run one torch operation again; whether its output (or, with `backward`, a gradient of its inputs) is not finite."""
    known = {resolve_name(function): function for functions in get_overridable_functions().values() for function in functions}
    function = known.get(operation["name"])
    if function is None:
        raise DataError(f"the operation {operation['name']!r} is no torch function")
    args, kwargs = _restored(operation["args"]), _restored(operation["kwargs"])
    if not backward:
        output = function(*args, **kwargs)
        return any(is_bad(tensor) for tensor in tensors_in([output, args[:1]]))
    leaves = [tensor.requires_grad_() for tensor in tensors_in([args, kwargs]) if tensor.is_floating_point()]
    outputs = [tensor for tensor in tensors_in(function(*args, **kwargs)) if tensor.requires_grad]
    found = torch.autograd.grad(outputs, leaves, [torch.ones_like(tensor) for tensor in outputs], allow_unused=True)
    return any(is_bad(gradient) for gradient in found if gradient is not None)


def _plain(value: Any) -> Any:
    """`value` in types that `torch.load(weights_only=True)` accepts; anything else becomes its repr."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone() if type(value) in (Tensor, nn.Parameter) else value.detach().as_subclass(Tensor).cpu().clone()
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, slice):
        return {"__slice__": [value.start, value.stop, value.step]}
    return "..." if value is Ellipsis else {"__repr__": repr(value)[:200]}


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__slice__"}:
            return slice(*value["__slice__"])
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_restored(item) for item in value)
    return Ellipsis if isinstance(value, str) and value == "..." else value
