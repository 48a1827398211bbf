"""Why one operation gave NaN, in words: masked rows, empty inputs, ignored targets. Derived here."""

from __future__ import annotations

__all__ = ["explanation"]

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = "a row is fully masked (every entry is -inf), so its softmax is 0/0"
EMPTY = "its input is empty (nothing was selected), and the mean of nothing is 0/0"
IGNORED = "every target is ignored, and the mean of nothing is 0/0"
ATTENTIONS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "multi_head_attention_forward": F.multi_head_attention_forward,
}


class Operation(Protocol):
    """An operation that was run, as the diagnosis records it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def explanation(operation: Operation) -> str:
    """Why the output of `operation` is not finite, as far as its inputs show it."""
    short = operation.name.rsplit(".", 1)[-1]
    tensors = list(_tensors([operation.args, operation.kwargs]))
    if ("softmax" in short and any(_has_masked_row(tensor, operation) for tensor in tensors)) or _attends_to_nothing(short, operation):
        return MASKED
    if short in ("cross_entropy", "nll_loss", "nll_loss2d") and _all_ignored(operation):
        return IGNORED
    if any(tensor.numel() == 0 for tensor in tensors):
        return EMPTY
    bad = [tensor for tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if any(bool((tensor.isnan() | (tensor == torch.inf)).any()) for tensor in bad):
        return "an input arrived non-finite from code that cannot be watched"
    return "-inf in its input (a mask) became NaN here" if bad else "its inputs are finite, its output is not"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _has_masked_row(tensor: Tensor, operation: Operation) -> bool:
    if not tensor.is_floating_point() or not tensor.dim() or not tensor.numel():
        return False
    given = operation.kwargs.get("dim", operation.args[1] if len(operation.args) > 1 else -1)
    dim = given if isinstance(given, int) and -tensor.dim() <= given < tensor.dim() else -1
    return bool((tensor == -torch.inf).all(dim).any())


def _attends_to_nothing(short: str, operation: Operation) -> bool:
    function = ATTENTIONS.get(short)
    if function is None:
        return False
    given = _arguments(function, operation)
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    keeps_true = short == "scaled_dot_product_attention"  # where True takes part; in multi-head attention True is masked out
    hidden = [_hidden(mask, keeps_true), _hidden(padding, False)]
    return any(found is not None and bool(found.all(-1).any()) for found in hidden)


def _hidden(mask: Any, keeps_true: bool) -> Tensor | None:
    if not isinstance(mask, Tensor) or not mask.numel():
        return None
    if mask.dtype == torch.bool:
        return ~mask if keeps_true else mask
    return mask == -torch.inf


def _arguments(function: Callable[..., Any], operation: Operation) -> dict[str, Any]:
    names = (
        ["query", "key", "value", "attn_mask"]
        if function is F.scaled_dot_product_attention
        else list(inspect.signature(function).parameters)
    )
    return dict(zip(names, operation.args, strict=False)) | operation.kwargs


def _all_ignored(operation: Operation) -> bool:
    given = dict(zip(["input", "target", "weight", "size_average", "ignore_index"], operation.args, strict=False)) | operation.kwargs
    target, ignored = given.get("target"), given.get("ignore_index", -100)
    return isinstance(target, Tensor) and not target.is_floating_point() and target.numel() > 0 and bool((target == ignored).all())
