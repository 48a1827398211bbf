"""Entropy of attention weights, from the call that made them: the softmax, or queries and keys of the fused kernel."""

from __future__ import annotations

__all__ = ["ATTENDING", "normalized_entropy"]

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SOFTMAXES = frozenset((F.softmax, torch.softmax, Tensor.softmax))
ATTENDING = _SOFTMAXES | {F.scaled_dot_product_attention}
"""Functions that may make attention weights."""
_HIDDEN = 1e4
"""A score that lies this far below the largest of its row is masked."""


@torch.no_grad()
def normalized_entropy(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Entropy of each query's weights over the logarithm of the number of keys it sees: (N, heads, queries), between 0 and 1.

    NaN for a query that sees fewer than two keys; None where the call is not over the last axis of a tensor with four.
    """
    scores = _softmax_scores(args, kwargs) if func in _SOFTMAXES else _fused_scores(*args, **kwargs)
    if scores is None or scores.dim() != 4:
        return None
    visible = (scores > scores.amax(-1, keepdim=True) - _HIDDEN).sum(-1)
    logs = scores.log_softmax(-1)
    entropy = torch.special.entr(logs.exp()).sum(-1)
    return torch.where(visible > 1, entropy / visible.log(), math.nan)


def _softmax_scores(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    scores: Tensor = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return _wide(scores) if dim is not None and dim % scores.dim() == scores.dim() - 1 else None


def _fused_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As the documentation of torch writes them out."""
    query, key = _wide(query), _wide(key)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
    return scores


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
