"""Layers as people count them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from pl_normkit.methods.norm_placement.find import read_layout
from tests.methods.norm_placement.by_hand import bert, mixer, swin, torch_encoder


def t5() -> tuple[nn.Module, Any]:
    config = tf.T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=4, d_kv=4, vocab_size=50)
    return tf.T5EncoderModel(config), {"input_ids": torch.arange(16).reshape(2, 8)}


def whole_t5() -> tuple[nn.Module, Any]:
    config = tf.T5Config(d_model=16, d_ff=32, num_layers=1, num_decoder_layers=2, num_heads=4, d_kv=4, vocab_size=50)
    tokens = torch.arange(16).reshape(2, 8)
    return tf.T5ForConditionalGeneration(config), {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}


class Twin(nn.Module):
    """Attention, then positions by a convolution that is added, as in Twins; two heads on the stream, as in VOLO."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.positions = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.positions(x.transpose(1, 2)).transpose(1, 2)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm, self.head, self.tokens = nn.Sequential(Twin(), Twin()), nn.LayerNorm(16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(x))
        scores: Tensor = self.head(x[:, 0]) + 0.5 * self.tokens(x[:, 1:]).amax(1)
        return scores


@pytest.mark.parametrize(
    ("make", "layers", "heads"),
    [
        (t5, [1, 1, 2, 2], [4, 0, 4, 0]),
        (whole_t5, [1, 1, 2, 2, 2, 3, 3, 3], [4, 0, 4, 4, 0, 4, 4, 0]),
        (bert, [1, 1, 2, 2, 3, 3], [4, 0, 4, 0, 4, 0]),
        (swin, [1, 1, 2, 2, 3, 3], [1, 0, 1, 0, 2, 0]),
        (lambda: (nn.TransformerEncoderLayer(16, 4, 32), torch.randn(6, 2, 16)), [1, 1], [4, 0]),
        (mixer, [1, 1, 2, 2], [0, 0, 0, 0]),
        (lambda: (TwoHeads(), torch.randn(2, 6, 16)), [1, 2], [4, 4]),
    ],
    ids=["t5", "whole t5", "bert", "swin", "one layer", "mixer", "positions and two heads"],
)
def test_layers_and_heads(make: Callable[[], tuple[nn.Module, Any]], layers: list[int], heads: list[int]) -> None:
    layout = read_layout(*make())
    assert [site.layer for site in layout.sites] == layers
    assert [site.heads for site in layout.sites] == heads


@pytest.mark.parametrize("norm_first", [True, False])
def test_where_the_norms_stand(norm_first: bool) -> None:
    sites = read_layout(*torch_encoder(norm_first=norm_first)).sites
    assert [site.is_entry for site in sites] == [norm_first] * 6
    assert [site.post_norm.module if site.post_norm else "" for site in sites[:2]] == (
        [""] * 2 if norm_first else ["layers.0.norm1", "layers.0.norm2"]
    )
