"""How the bias reaches the logits of an attention module: hooks on its call, and methods of its class."""

from __future__ import annotations

__all__ = [
    "CHILD",
    "AddToLogits",
    "AddToMask",
    "AddToMultiheadMask",
    "BiasedBias",
    "BiasedCall",
    "BiasedRelPosBias",
    "BiasedRelativePositionBias",
]

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pl_normkit.errors import ConfigError
from pl_normkit.methods.gaussian_bias.modules import GaussianAttentionBias

CHILD = "gaussian_bias"
"""Name of the child that holds the bias; "bias" in it keeps weight decay off in trainers that go by names."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _child(host: nn.Module) -> GaussianAttentionBias:
    """The bias of the host itself; of a copy it is the copy's."""
    return cast(GaussianAttentionBias, host.get_submodule(CHILD))


def _bias(host: nn.Module, num_tokens: int, like: Tensor) -> Tensor:
    """The bias in the dtype of the tokens."""
    return _child(host).bias_for(num_tokens).to(like.dtype)


def _get(arguments: Arguments, name: str, position: int, default: Any = None) -> Any:
    args, kwargs = arguments
    return args[position] if 0 <= position < len(args) else kwargs.get(name, default)


def _set(arguments: Arguments, name: str, position: int, value: Any) -> Arguments:
    args, kwargs = arguments
    if 0 <= position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _first(arguments: Arguments) -> Any:
    args, kwargs = arguments
    return args[0] if args else next(iter(kwargs.values()))


def _join(bias: Tensor, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
    """`bias` with what the call itself masks: an additive mask, a boolean one (True = attend), or the future."""
    if is_causal:
        length = bias.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
        return bias.masked_fill(future, float("-inf"))
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask


@dataclass(frozen=True)
class AddToMask:
    """Pre-hook: add the bias to the argument that attention adds to its logits, shape (N or 1, heads or 1, L, L).

    Attributes:
        argument: its name, and `position` its place among the positional arguments.
        causal_position: place of `is_causal`, which would drop the mask and is merged into it; -1 where there is none.
    """

    argument: str
    position: int
    causal_position: int = -1

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        arguments = args, kwargs
        if not _child(host).enabled:
            return arguments
        tokens = _first(arguments)
        is_causal = bool(self.causal_position >= 0 and _get(arguments, "is_causal", self.causal_position, False))
        bias = _bias(host, tokens.shape[1], tokens)[None]
        mask = _join(bias, _get(arguments, self.argument, self.position), is_causal=is_causal)
        arguments = _set(arguments, self.argument, self.position, mask)
        return _set(arguments, "is_causal", self.causal_position, False) if is_causal else arguments


@dataclass(frozen=True)
class AddToMultiheadMask:
    """Pre-hook of `nn.MultiheadAttention`: a float `attn_mask`, (L, L) or (N * heads, L, L). Masks that are boolean become additive."""

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        arguments = args, kwargs
        if not _child(host).enabled:
            return arguments
        query, key = _get(arguments, "query", 0), _get(arguments, "key", 1)
        if query.shape != key.shape:
            raise ConfigError(
                "the Gaussian bias needs self-attention", where=type(host).__name__, evidence=f"{tuple(query.shape)}, {tuple(key.shape)}"
            )
        num_tokens, batch = _lengths(cast(nn.MultiheadAttention, host), query)
        bias, mask = _bias(host, num_tokens, query), _get(arguments, "attn_mask", 5)
        if mask is not None and mask.dtype == torch.bool:
            mask = _blocked(mask, bias)
        bias = bias[0] if bias.shape[0] == 1 else bias.repeat(batch, 1, 1)
        arguments = _set(arguments, "attn_mask", 5, bias if mask is None else bias + mask)
        padding = _get(arguments, "key_padding_mask", 3)
        if padding is not None and padding.dtype == torch.bool:
            arguments = _set(arguments, "key_padding_mask", 3, _blocked(padding, bias))
        return _set(arguments, "is_causal", 7, False)


def _lengths(host: nn.MultiheadAttention, query: Tensor) -> tuple[int, int]:
    """Number of tokens and batch size."""
    if query.dim() == 2:
        return query.shape[0], 1
    return (query.shape[1], query.shape[0]) if host.batch_first else (query.shape[0], query.shape[1])


def _blocked(mask: Tensor, like: Tensor) -> Tensor:
    """An additive mask from torch's boolean one for `nn.MultiheadAttention`, where True is left out."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


@dataclass(frozen=True)
class AddToLogits:
    """Pre-hook of a softmax module: add the bias to its input (N, heads, L, L)."""

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if not _child(host).enabled:
            return args, kwargs
        logits = _first((args, kwargs))
        biased = logits + _bias(host, logits.shape[-1], logits)
        return ((biased, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): biased})


class _Biased(nn.Module):
    """Mix-in before a class whose method gives a position bias (1, heads, L, L) or (heads, L, L) on its own `window_size`."""

    def _add_gaussian(self, bias: Tensor) -> Tensor:
        child = _child(self)
        if not child.enabled:
            return bias
        rows, columns = self.window_size  # type: ignore[misc]
        gaussian: Tensor = child((rows, columns))
        return bias + gaussian.to(bias.dtype)


class BiasedBias(_Biased):
    """For timm's relative position modules."""

    def get_bias(self) -> Tensor:
        return self._add_gaussian(super().get_bias())  # type: ignore[misc]


class BiasedRelPosBias(_Biased):
    """For the window attention of timm's Swin."""

    def _get_rel_pos_bias(self) -> Tensor:
        return self._add_gaussian(super()._get_rel_pos_bias())  # type: ignore[misc]


class BiasedRelativePositionBias(_Biased):
    """For the window attention of torchvision's Swin, both versions."""

    def get_relative_position_bias(self) -> Tensor:
        return self._add_gaussian(super().get_relative_position_bias())  # type: ignore[misc]


class BiasedCall(nn.Module):
    """Mix-in for attention that takes no mask: while its forward runs, the one attention in it is given the bias."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not _child(self).enabled:
            return super().forward(*args, **kwargs)
        with _BiasedAttention(self):
            return super().forward(*args, **kwargs)


class _BiasedAttention(TorchFunctionMode):
    """Adds the host's bias to the mask of `F.scaled_dot_product_attention`, or to the input of a softmax over (L, L)."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self._host = host
        self._is_done = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        arguments = args, kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = _get(arguments, "query", 0)
            bias = self._bias(query.shape[-2], query)
            is_causal = bool(_get(arguments, "is_causal", 5, False))
            arguments = _set(arguments, "attn_mask", 3, _join(bias, _get(arguments, "attn_mask", 3), is_causal=is_causal))
            arguments = _set(arguments, "is_causal", 5, False)
        elif func in (torch.softmax, torch.Tensor.softmax, F.softmax):
            logits = _first(arguments)
            if logits.dim() >= 3 and logits.shape[-1] == logits.shape[-2]:
                biased = logits + self._bias(logits.shape[-1], logits)
                arguments = _set(arguments, "input", 0, biased)
        return func(*arguments[0], **arguments[1])

    def _bias(self, num_tokens: int, like: Tensor) -> Tensor:
        if self._is_done:
            raise ConfigError("its forward runs several attentions, of which one was to get the bias", where=type(self._host).__name__)
        self._is_done = True
        bias = _bias(self._host, num_tokens, like)
        if bias.shape[0] > 1 and like.dim() < 4:
            raise ConfigError("heads are folded into the batch here, so a bias per head has no axis", where=type(self._host).__name__)
        return bias
