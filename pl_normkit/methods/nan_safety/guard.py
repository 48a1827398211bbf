"""The decision of the guard as plain functions: is a step finite, how do all ranks agree, what is put back. No Lightning.

All derived here. The order in a step: `poison` the loss before its backward, test `gradients_are_finite` before the optimizer
step, then `BufferShadow.accept` or `BufferShadow.restore`.
"""

from __future__ import annotations

__all__ = [
    "BufferShadow",
    "SkipBudget",
    "Snapshot",
    "Transaction",
    "accepts_device_flag",
    "gradient_total",
    "gradients",
    "gradients_are_finite",
    "poison",
    "steps_once",
]

import copy
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients `optimizer` would use: local shards of sharded ones, values of sparse ones."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                found.append(_local(parameter.grad))
    return found


def _local(gradient: Tensor) -> Tensor:
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    gradient = gradient.detach()
    return gradient._values() if gradient.is_sparse else gradient


def gradient_total(grads: Sequence[Tensor]) -> Tensor:
    """A float32 scalar that is finite if and only if the Euclidean norm of each gradient is, in the gradient's own precision.

    A gradient whose squares overflow (entries above 1.8e19 in float32) counts as not finite: it would make Adam's second moment infinite.
    One read of every gradient and nothing else; on an accelerator nothing waits for the result.
    """
    if not grads:
        return torch.zeros(())
    if len({gradient.device for gradient in grads}) > 1:
        return torch.stack([norm.float().to(grads[0].device) for norm in torch._foreach_norm(list(grads))]).sum()
    norms = torch._foreach_norm(list(grads))
    if len({norm.dtype for norm in norms}) > 1:
        norms = tuple(torch.where(torch.isfinite(norm), norm.clamp(max=1.0), norm).float() for norm in norms)
    return torch.stack(norms).float().sum() if norms[0].dtype != torch.float64 else (torch.stack(norms) * 0).sum().float()


def gradients_are_finite(grads: Sequence[Tensor], *, sharded: bool = False) -> bool:
    """Whether the step may be made. Waits for the device.

    Args:
        grads: the gradients after their reduction over ranks.
        sharded: each rank holds another part (FSDP): one flag is all-reduced. Replicated gradients (DDP) need no collective,
            because the all-reduce of the gradients has carried every NaN and infinity to every rank already.
    """
    total = gradient_total(grads)
    if sharded and dist.is_available() and dist.is_initialized():
        flag = (~torch.isfinite(total)).float()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return float(flag) == 0
    return math.isfinite(total.item())


def poison(loss: Tensor, buffers: Sequence[Tensor] = ()) -> None:
    """Make every gradient of `loss` NaN if the loss or one of `buffers` is not finite; change nothing, bit for bit, if they are.

    The loss is multiplied by 0 and added to its own incoming gradient. So a bad loss with finite gradients, or bad batch-norm statistics
    on one rank, reach every rank through the reduction of the gradients, without a collective and without waiting.
    """
    if not loss.requires_grad:
        return
    mark = loss.detach() * 0
    if buffers:
        norms = torch._foreach_norm(list(buffers), math.inf)
        mark = mark + (torch.stack([norm.to(mark.device, mark.dtype) for norm in norms]) * 0).sum()
    loss.register_hook(lambda gradient: gradient + mark.to(gradient.dtype))  # type: ignore[no-untyped-call]


def steps_once(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` is known to evaluate its closure once and to leave alone what has no gradient."""
    return type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, LBFGS)


def accepts_device_flag(optimizer: Optimizer) -> bool:
    """Whether the fused kernel of `optimizer` takes `found_inf` and then changes nothing.

    SGD with momentum that has made no step yet is excluded: its kernel would leave the new momentum uninitialized.
    """
    if not isinstance(optimizer, (Adam, AdamW, SGD, Adagrad)) or not all(group.get("fused") for group in optimizer.param_groups):
        return False
    fresh = isinstance(optimizer, SGD) and not optimizer.state
    return not (fresh and any(group["momentum"] for group in optimizer.param_groups))


class BufferShadow:
    """The last good values of a module's buffers, on their own device.

    Only what changes is copied: statistics of norm layers (their kernels do not count versions) and buffers whose version counter moved.
    Buffers that are not finite at the start (masks of -inf) are left out.
    """

    def __init__(self, module: nn.Module) -> None:
        self._slots: list[tuple[nn.Module, str, bool]] = []
        self._kept: list[Tensor] = []
        self._versions: list[int] = []
        self._names: list[str] = []
        seen: set[int] = set()
        for path, owner in module.named_modules():
            is_norm = isinstance(owner, nn.modules.batchnorm._NormBase)
            for name, buffer in owner._buffers.items():
                if buffer is None or buffer.is_meta or id(buffer) in seen or not _is_finite(buffer):
                    continue
                seen.add(id(buffer))
                self._slots.append((owner, name, is_norm))
                self._kept.append(buffer.detach().clone())
                self._versions.append(buffer._version)
                self._names.append(f"{path}.{name}" if path else name)

    def _current(self, index: int) -> Tensor:
        owner, name, _ = self._slots[index]
        buffer = owner._buffers[name]
        assert buffer is not None
        return buffer

    def _changed(self) -> list[int]:
        return [
            index for index, (_, _, is_norm) in enumerate(self._slots) if is_norm or self._current(index)._version != self._versions[index]
        ]

    def watched(self) -> list[Tensor]:
        """Floating buffers that may have changed since the last `accept`."""
        return [buffer for index in self._changed() if (buffer := self._current(index)).is_floating_point()]

    def accept(self) -> None:
        """Take the current values as good. The caller knows that they are finite."""
        changed = self._changed()
        if changed:
            self._copy([self._kept[index] for index in changed], [self._current(index) for index in changed])
        self._note(changed)

    def accept_finite(self) -> None:
        """Take what changed outside the steps (a teacher's average, say), as far as it is finite."""
        changed = [i for i in range(len(self._slots)) if not self._slots[i][2] and self._current(i)._version != self._versions[i]]
        good = [index for index in changed if _is_finite(self._current(index))]
        self._copy([self._kept[index] for index in good], [self._current(index) for index in good])
        self._note(good)

    def restore(self) -> None:
        """Put the last good values back."""
        changed = self._changed()
        if changed:
            self._copy([self._current(index) for index in changed], [self._kept[index] for index in changed])
        self._note(changed)

    def bad_names(self) -> list[str]:
        """Buffers that are not finite now. Waits for the device."""
        return [self._names[index] for index in self._changed() if not _is_finite(self._current(index))]

    def settle(self, bad: Tensor) -> None:
        """`restore` where the device scalar `bad` is not 0, `accept` where it is 0, without reading it."""
        for index in self._changed():
            current, kept = self._current(index), self._kept[index]
            kept.copy_(torch.where(bad.to(kept.device) > 0, kept, current.detach()))
            with torch.no_grad():
                current.copy_(kept)
            self._versions[index] = current._version

    def _note(self, changed: Iterable[int]) -> None:
        for index in changed:
            self._versions[index] = self._current(index)._version

    @staticmethod
    def _copy(to: list[Tensor], source: list[Tensor]) -> None:
        with torch.no_grad():
            for target, value in zip(to, source, strict=True):
                target.copy_(value)


def _is_finite(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


class Transaction:
    """Parameters and state of an optimizer as they were, for optimizers that move parameters before they know the gradient.

    Costs a copy of both on their device, for LBFGS, SAM and other optimizers that are not known to step once.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizers = [optimizer, *(held for held in vars(optimizer).values() if isinstance(held, Optimizer))]
        parameters = (p for found in self._optimizers for group in found.param_groups for p in group["params"])
        self._parameters = list(dict.fromkeys(parameters))
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._states = [self._copied(dict(found.state)) for found in self._optimizers]

    def holds(self) -> bool:
        """Whether parameters and state are finite now. Waits for the device."""
        tensors = [parameter.detach() for parameter in self._parameters]
        tensors += [value for found in self._optimizers for entry in found.state.values() for value in _tensors(entry)]
        return all(_is_finite(tensor) for tensor in tensors)

    def take_back(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._values, strict=True):
                parameter.copy_(value)
        for found, state in zip(self._optimizers, self._states, strict=True):
            found.state.clear()
            found.state.update(state)

    def _copied(self, state: dict[Any, Any]) -> dict[Any, Any]:
        """A deep copy that keeps the parameters themselves as keys and values."""
        return copy.deepcopy(state, {id(parameter): parameter for parameter in self._parameters})


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


@dataclass
class SkipBudget:
    """How many skipped steps are tolerated.

    Attributes:
        in_a_row: most skips without a good step between them; None sets no limit.
        per_1000: most skips among the last 1,000 steps; None sets no limit.
        steps: steps seen.
        skips: skips seen.
    """

    in_a_row: int | None = None
    per_1000: int | None = None
    steps: int = 0
    skips: int = 0
    row: int = 0
    recent: deque[int] = field(default_factory=deque)

    def count(self, *, skipped: bool) -> None:
        self.steps += 1
        self.row = self.row + 1 if skipped else 0
        if skipped:
            self.skips += 1
            self.recent.append(self.steps)
        while self.recent and self.recent[0] <= self.steps - 1000:
            self.recent.popleft()

    def exceeded(self) -> str:
        """Which limit is passed, in words; "" while none is."""
        if self.in_a_row is not None and self.row > self.in_a_row:
            return f"{self.row} steps in a row were skipped; max_skips is {self.in_a_row}"
        if self.per_1000 is not None and len(self.recent) > self.per_1000:
            return f"{len(self.recent)} of the last 1,000 steps were skipped; max_skips_per_1000 is {self.per_1000}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "skips": self.skips, "row": self.row, "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.skips, self.row = state["steps"], state["skips"], state["row"]
        self.recent = deque(state["recent"])


class Snapshot:
    """Parameters, buffers, optimizers and schedulers, copied to the CPU, to go back to."""

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any] = (), step: int = 0) -> None:
        self.step = step
        self._tensors = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*module.parameters(), *module.buffers())]
        self._optimizers = [(optimizer, _to_cpu(optimizer.state_dict())) for optimizer in optimizers]
        self._schedulers = [(scheduler, copy.deepcopy(scheduler.state_dict())) for scheduler in schedulers]

    def restore(self, lr_factor: float = 1.0) -> None:
        """Go back. `lr_factor` multiplies every learning rate and those the schedulers start from, in the snapshot too."""
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)
        if lr_factor != 1.0:
            self._scale(lr_factor)
        for optimizer, state in self._optimizers:
            optimizer.load_state_dict(copy.deepcopy(state))
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(copy.deepcopy(state))

    def _scale(self, factor: float) -> None:
        for _, state in self._optimizers:
            for group in state["param_groups"]:
                for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if key in group:
                        group[key] = group[key] * factor
        for _, state in self._schedulers:
            for key in ("base_lrs", "_last_lr"):
                if key in state:
                    state[key] = [rate * factor for rate in state[key]]


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value
