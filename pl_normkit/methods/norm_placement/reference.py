"""A plain decoder with every norm placement as an option, written out: what edits make of a plain block is held against it."""

from __future__ import annotations

__all__ = ["CausalTransformer"]

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, nearest
from pl_normkit.methods.norm_placement.initialisation import deepnorm_constants

_PLACEMENTS = ("pre", "post", "peri", "lns", "mix", "normformer", "hybrid", "deepnorm", "sdd", "ngpt")
_WITHOUT_FINAL_NORM = ("post", "deepnorm", "sdd", "ngpt")


class _Scale(nn.Module):
    """nGPT's learned scale: it starts at `start`, held as a parameter of the size of the weights, so that Adam moves both alike."""

    def __init__(self, size: int, start: float, held: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.full((size,), held)), start / held

    def forward(self) -> Tensor:
        return self.weight * self.factor


class _DecoupledLinear(nn.Linear):
    """SDD: a linear layer, then an RMS norm whose scale starts at `scale`."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.full((outputs,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(super().forward(x), (self.out_features,), self.gain, 1e-6)


def _linear(placement: str, inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    if placement == "sdd":
        return _DecoupledLinear(inputs, outputs, scale)
    return nn.Linear(inputs, outputs, bias=placement != "ngpt")


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, placement: str, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (_linear(placement, width, width) for _ in range(3))
        self.proj = _linear(placement, width, width, scale)
        size = width // heads
        norms = {name: nn.RMSNorm(size, eps=1e-5) for name in ("query", "key", "value")} if placement == "hybrid" else {}
        self.norms = nn.ModuleDict(norms)
        self.gains = nn.Parameter(torch.ones(heads)) if placement == "normformer" else None
        self.scale = _Scale(width, 1.0, width**-0.5) if placement == "ngpt" else None

    def forward(self, x: Tensor) -> Tensor:
        parts = {name: self._heads_of(getattr(self, name)(x), name) for name in ("query", "key", "value")}
        if self.scale is not None:
            scale = self.scale().reshape(self.heads, 1, -1)
            parts |= {name: scale * F.normalize(parts[name], dim=-1) for name in ("query", "key")}
        temperature = None if self.scale is None else math.sqrt(parts["query"].shape[-1])
        mixed = F.scaled_dot_product_attention(parts["query"], parts["key"], parts["value"], is_causal=True, scale=temperature)
        if self.gains is not None:
            mixed = mixed * self.gains[:, None, None]
        found: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return found

    def _heads_of(self, x: Tensor, name: str) -> Tensor:
        heads = x.reshape(*x.shape[:-1], self.heads, -1)
        return (self.norms[name](heads) if name in self.norms else heads).transpose(1, 2)


class _FeedForward(nn.Module):
    def __init__(self, width: int, placement: str, scale: float) -> None:
        super().__init__()
        self.is_gated = placement == "ngpt"
        self.fc1 = _linear(placement, width, (8 if self.is_gated else 4) * width)
        self.fc2 = _linear(placement, 4 * width, width, scale)
        self.norm = nn.LayerNorm(4 * width) if placement == "normformer" else None
        self.scale = _Scale(8 * width, 1.0, 1.0) if self.is_gated else None

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc1(x)
        if self.scale is not None:
            value, gate = (hidden * self.scale() * math.sqrt(x.shape[-1])).chunk(2, -1)
            hidden = value * F.silu(gate)
        else:
            hidden = F.gelu(hidden)
        found: Tensor = self.fc2(hidden if self.norm is None else self.norm(hidden))
        return found


class _Block(nn.Module):
    """`number` counts from 1. `kind` is what this block does of the placement of all blocks."""

    def __init__(self, width: int, heads: int, placement: str, number: int, depth: int, share: float) -> None:
        super().__init__()
        self.kind = {
            "mix": "post" if number <= round(share * depth) else "pre",
            "sdd": "post",
            "hybrid": "pre" if number == 1 else "hybrid",
        }.get(placement, placement)
        scale = 1 / math.sqrt(depth)
        self.attn, self.mlp = _Attention(width, heads, placement, scale), _FeedForward(width, placement, scale)
        has_norms = (self.kind != "ngpt" and self.kind != "hybrid", self.kind != "ngpt")
        self.norm1, self.norm2 = (nn.LayerNorm(width) if wanted else nn.Identity() for wanted in has_norms)
        self.out1 = nn.LayerNorm(width) if self.kind in ("peri", "normformer") else nn.Identity()
        self.out2 = nn.LayerNorm(width) if self.kind == "peri" else nn.Identity()
        self.gain = 1 / math.sqrt(number)
        self.alpha = deepnorm_constants(0, depth)[1][0] if self.kind == "deepnorm" else 1.0
        self.shortcut = nn.Parameter(torch.ones(width)) if self.kind == "normformer" else None
        rates = [_Scale(width, 0.05, width**-0.5) for _ in range(2)] if self.kind == "ngpt" else []
        self.rates = nn.ModuleList(rates)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "ngpt":
            for branch, rate in zip((self.attn, self.mlp), self.rates, strict=True):
                x = F.normalize(x + rate().abs() * (F.normalize(branch(x), dim=-1) - x), dim=-1)
        elif self.kind in ("post", "deepnorm"):
            x = self.norm1(self._amplified(x) + self.attn(x))
            x = self.norm2(self._amplified(x) + self.mlp(x))
        elif self.kind == "hybrid":
            x = self.norm2(x + self.attn(x))
            x = x + self.mlp(x)
        else:
            x = x + self.out1(self.attn(self._scaled(self.norm1(x))))
            x = self._amplified(x) + self.out2(self.mlp(self._scaled(self.norm2(x))))
        return x

    def _amplified(self, x: Tensor) -> Tensor:
        """The shortcut: times alpha in DeepNorm, times a gain for each channel in NormFormer's feed-forward."""
        if self.kind == "deepnorm":
            return self.alpha * x
        return x if self.shortcut is None else self.shortcut * x

    def _scaled(self, normed: Tensor) -> Tensor:
        return self.gain * normed if self.kind == "lns" else normed


class CausalTransformer(nn.Module):
    """A decoder of `depth` blocks with learned positions, from tokens (N, T) to logits, with its norms where `placement` says.

    Queries, keys and values have layers of their own, and each branch ends in a module of its own, so that `place_norms` reaches all it
    can. Weights start normal with standard deviation 1/sqrt(2.5 width), biases 0; "deepnorm" has its own scales, and "hybrid" divides
    the last weights of branches by sqrt(2 depth), as its authors' code.

    Args:
        vocab_size: number of tokens.
        width: channels of the stream; feed-forwards have four times as many.
        depth: number of blocks.
        heads: of each attention.
        length: most tokens it is called with.
        placement: "pre", "post", "peri", "lns", "mix", "normformer" (with gains of heads and shortcuts), "hybrid" (HybridNorm*),
            "deepnorm", "sdd" (on post-norm blocks) or "ngpt". The latter keeps its weights at length 1: give `normalize_weights` to
            the optimizer with `optimizer.register_step_post_hook(lambda *_: model.normalize_weights())`; no warm-up, no weight decay.
        share: of the blocks that are post-norm under "mix".

    Raises ConfigError for a width that heads do not divide, and for an unknown placement.

    Source: the formulas of `place_norms`, and for "ngpt" arXiv 2410.01131 and the code of NVIDIA/ngpt, but with learned positions.

    >>> from pl_normkit import place_norms
    >>> model, tokens = CausalTransformer(256, width=16, depth=2, heads=2, length=8), torch.zeros(2, 8, dtype=torch.long)
    >>> changes = place_norms(model, "peri", tokens)
    >>> built = CausalTransformer(256, width=16, depth=2, heads=2, length=8, placement="peri")
    >>> model(tokens).shape == built(tokens).shape
    True
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        length: int = 128,
        placement: str = "pre",
        share: float = 0.25,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError("the width must be a multiple of the heads", evidence=f"{width} and {heads}")
        if placement not in _PLACEMENTS:
            fix = nearest(placement, _PLACEMENTS) or f"one of {', '.join(_PLACEMENTS)}"
            raise ConfigError(f"there is no placement {placement!r}", fix=fix)
        self.length, self.placement = length, placement
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, placement, number + 1, depth, share) for number in range(depth)))
        self.norm = nn.Identity() if placement in _WITHOUT_FINAL_NORM else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.scale = _Scale(vocab_size, 1.0, width**-0.5) if placement == "ngpt" else None
        self._initialize(width, depth)

    @torch.no_grad()
    def _initialize(self, width: int, depth: int) -> None:
        beta = deepnorm_constants(0, depth)[1][1]
        for path, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=1 / math.sqrt(2.5 * width))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if self.placement == "hybrid" and path.endswith(("attn.proj", "mlp.fc2")):
                module.weight /= math.sqrt(2 * depth)
            if self.placement == "deepnorm" and path.startswith("blocks.") and isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, 1.0 if path.endswith(("query", "key")) else beta)
        if self.placement == "ngpt":
            self.normalize_weights()

    @torch.no_grad()
    def normalize_weights(self) -> None:
        """Give each row of the matrices of "ngpt" length 1; of last layers of branches, each column: always along the stream."""
        for path, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.copy_(F.normalize(module.weight, dim=0 if path.endswith(("attn.proj", "mlp.fc2")) else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        if self.scale is None:
            plain: Tensor = self.head(self.norm(self.blocks(x)))
            return plain
        logits: Tensor = self.head(self.blocks(F.normalize(x, dim=-1))) * self.scale()
        return logits
