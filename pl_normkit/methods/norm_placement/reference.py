"""A plain decoder whose blocks every placement can reach."""

from __future__ import annotations

__all__ = ["CausalTransformer"]

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import ConfigError


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        found: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return found


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return found


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1, self.attn = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), _FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attn(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        else:
            x = self.norm1(x + self.attn(x))
            x = self.norm2(x + self.mlp(x))
        return x


class CausalTransformer(nn.Module):
    """A decoder of `depth` blocks with learned positions; pre-norm, or post-norm with `norm_first=False`. From tokens (N, T) to logits.

    Queries, keys and values have layers of their own, and each branch ends in a module of its own, so that `place_norms` reaches them all.
    Weights start normal with standard deviation 1/sqrt(2.5 width), biases 0.

    >>> import torch
    >>> from pl_normkit import place_norms
    >>> model = CausalTransformer(256, width=16, depth=2, heads=2, length=8)
    >>> changes = place_norms(model, "peri", torch.zeros(2, 8, dtype=torch.long))
    >>> tuple(model(torch.zeros(2, 8, dtype=torch.long)).shape)
    (2, 8, 256)
    """

    def __init__(
        self, vocab_size: int, width: int = 128, depth: int = 4, heads: int = 4, length: int = 128, norm_first: bool = True
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError("the width must be a multiple of the heads", evidence=f"{width} and {heads}")
        self.length = length
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, norm_first) for _ in range(depth)))
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.head = nn.Linear(width, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=1 / math.sqrt(2.5 * width))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
