"""Is a step finite: one small vector of answers per optimizer step, made on the device and the same on every rank. Derived here."""

from __future__ import annotations

__all__ = ["Verdict", "gradient_norm", "gradients", "has_values", "local", "measure", "shared", "total_of", "values_in"]

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer


class Verdict(NamedTuple):
    """What of a step is not finite; `norm` is the Euclidean norm of all gradients."""

    loss: bool = False
    gradient: bool = False
    buffer: bool = False
    parameter: bool = False
    state: bool = False
    norm: float = 0.0

    @classmethod
    def of(cls, answers: Tensor) -> Verdict:
        """From the vector that `measure` makes. Waits for the device."""
        loss, gradient, buffer, parameter, state, norm = answers.tolist()
        return cls(bool(loss), bool(gradient), bool(buffer), bool(parameter), bool(state), norm)

    @property
    def bad(self) -> bool:
        return self.loss or self.gradient or self.buffer or self.stays

    @property
    def stays(self) -> bool:
        """Whether every later step would be bad, too: what is not finite is not of this batch."""
        return self.parameter or self.state


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients `optimizer` would use: local shards of sharded ones, values of sparse ones."""
    return [local(parameter.grad) for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]


def has_values(tensor: Tensor) -> bool:
    """Not so for what a lazy module makes in its first forward, and on the meta device."""
    return not tensor.is_meta and not isinstance(tensor, (UninitializedBuffer, UninitializedParameter))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, as a dense tensor without a graph."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    tensor = tensor.detach()
    if tensor.layout == torch.strided:
        return tensor
    return tensor.values() if tensor.layout != torch.sparse_coo else tensor._values()


def values_in(value: Any) -> list[Tensor]:
    """The tensors in a nest of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in values_in(item)] if isinstance(value, (list, tuple)) else []


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients as a float32 scalar, not finite if and only if that of one of them is not.

    A gradient whose squares overflow (entries above 1.8e19 in float32) counts as not finite: it would make Adam's second moment infinite.
    One read of every gradient and nothing else; on an accelerator nothing waits for the result.
    """
    grads = [gradient for gradient in grads if gradient.numel()]
    if not grads:
        return torch.zeros(())
    norms = [norm.abs() for norm in _norms(grads, 2.0)]
    finite = torch.stack([torch.isfinite(norm).to(grads[0].device) for norm in norms]).all()
    norm = torch.stack([norm.float().to(grads[0].device) for norm in norms]).double().square().sum().sqrt().float()
    return torch.where(finite, torch.nan_to_num(norm), torch.nan)


def total_of(tensors: Sequence[Tensor]) -> Tensor:
    """A scalar that is finite if and only if every entry of `tensors` is."""
    tensors = [tensor for tensor in tensors if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex())]
    if not tensors:
        return torch.zeros(())
    if all(tensor.device.type == "cpu" for tensor in tensors):  # there the Euclidean norm is much faster, but squares can overflow
        norms = _norms(tensors, 2.0)
        doubtful = [tensor for tensor, norm in zip(tensors, norms, strict=True) if not math.isfinite(norm.item())]
        return torch.tensor(0.0 if all(bool(torch.isfinite(tensor).all()) for tensor in doubtful) else torch.nan)
    return torch.stack([(norm.abs() * 0).float().to(tensors[0].device) for norm in _norms(tensors, math.inf)]).sum()


def _norms(tensors: Sequence[Tensor], order: float) -> Sequence[Tensor]:
    """One norm per tensor, those of half precision in float32, so that a sum over many entries does not overflow."""
    half = [tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors]
    if not any(half):
        return torch._foreach_norm(list(tensors), order)
    found: list[Tensor | None] = [None] * len(tensors)
    for chosen, options in ((True, {"dtype": torch.float32}), (False, {})):
        places = [index for index, is_half in enumerate(half) if is_half is chosen]
        norms = torch._foreach_norm([tensors[index] for index in places], order, **options) if places else ()
        for index, norm in zip(places, norms, strict=True):
            found[index] = norm
    return [norm for norm in found if norm is not None]


def measure(
    losses: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers_bad: Tensor,
    parameters: Sequence[Tensor],
    states: Sequence[Tensor],
    device: torch.device | str = "cpu",
) -> Tensor:
    """The fields of a `Verdict` as one float32 vector on `device`. Nothing waits for it."""
    norm = gradient_norm(grads).to(device)
    bad_losses = [(~torch.isfinite(loss)).any().to(device) for loss in losses]
    answers = [
        torch.stack(bad_losses).any() if bad_losses else torch.zeros((), dtype=torch.bool, device=device),
        ~torch.isfinite(norm),
        buffers_bad.to(device),
        ~torch.isfinite(total_of(parameters)).to(device),
        ~torch.isfinite(total_of(states)).to(device),
        torch.nan_to_num(norm, 0.0, 0.0, 0.0),
    ]
    return torch.stack([answer.float() for answer in answers])


def shared(vector: Tensor, *, distributed: bool) -> Tensor:
    """The largest answer of all ranks, on every rank. Called on all of them at once; without `distributed` on this one alone.

    One collective of a few numbers per optimizer step. Gradients alone would not do: a loss, a buffer or a parameter outside the
    reduction can be bad on one rank with finite gradients everywhere, and then one rank would skip and the others would not.
    """
    if distributed:
        dist.all_reduce(vector, dist.ReduceOp.MAX)
    return vector
