"""Attention entropy in the profile, against the attention weights that transformers gives and a loop over queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from pl_normkit.methods.depth_profile import measure_depth_profile
from pl_normkit.methods.depth_profile.entropy import normalized_entropy
from tests.methods.depth_profile.networks import GPT2, LLAMA, VIT, tokens


def by_loop(weights: Tensor, kept: Tensor, *, is_causal: bool) -> tuple[float, float]:
    """Mean and lowest head of the entropies, query by query; `kept` (N, T) are the tokens that are no padding."""
    heads: list[list[float]] = [[] for _ in range(weights.shape[1])]
    for sample, head, query in torch.cartesian_prod(*map(torch.arange, weights.shape[:3])).tolist():
        seen = int(kept[sample, : query + 1].sum()) if is_causal else int(kept[sample].sum())
        if kept[sample, query] and seen > 1:
            row = [float(value) for value in weights[sample, head, query] if value > 0]
            heads[head].append(-math.fsum(value * math.log(value) for value in row) / math.log(seen))
    means = [math.fsum(head) / len(head) for head in heads]
    return math.fsum(means) / len(means), min(means)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("network", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_it_is_that_of_the_weights(network: Any, kind: str) -> None:
    torch.manual_seed(0)
    model: GPT2LMHeadModel | LlamaForCausalLM = network.build().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 20  # so that attention is not even
    batch = tokens() | {"attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}
    model.set_attn_implementation("eager")
    weights = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation(kind)
    rows = measure_depth_profile(model, batch, entropy=True).additions
    expected = [pytest.approx(by_loop(layer.detach(), batch["attention_mask"], is_causal=True), abs=1e-5) for layer in weights]
    assert [(row.entropy, row.entropy_lowest) for row in rows[::2]] == expected
    assert [(row.entropy, row.entropy_lowest) for row in rows[1::2]] == [(None, None)] * len(weights)
    assert 0.05 < rows[0].entropy_lowest < rows[0].entropy < 0.95  # type: ignore[operator]


def test_even_attention_has_entropy_one_and_it_is_measured_only_when_asked() -> None:
    model = VIT.build()
    for path, module in model.named_modules():
        if path.endswith("qkv"):
            nn.init.zeros_(module.weight)
    asked, not_asked = (measure_depth_profile(model, VIT.batch(), entropy=entropy).additions for entropy in (True, False))
    assert [row.entropy for row in asked] == [pytest.approx(1.0, abs=1e-5), None] * 2
    assert {row.entropy for row in not_asked} == {None}


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 3.0},
    "boolean mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(-1) | torch.eye(5, dtype=torch.bool)},
    "added mask": {"attn_mask": torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(2), torch.finfo().min)},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("case", CALLS)
def test_fused_attention_by_its_own_weights(case: str) -> None:
    torch.manual_seed(0)
    call = CALLS[case]
    query, key = torch.randn(2, 4, 5, 3), torch.randn(2, 2 if "enable_gqa" in call else 4, 5, 3)
    eye = torch.eye(5).expand(*key.shape[:2], 5, 5)
    weights = F.scaled_dot_product_attention(query, key, eye, **call)  # of unit values, attention gives its weights
    found = normalized_entropy(F.scaled_dot_product_attention, (query, key, eye), call)
    assert found is not None
    assert (found.shape, float(found.nan_to_num(0.0).max()) <= 1.0 + 1e-6) == ((2, 4, 5), True)
    if "mask" in case:
        seen = (weights[0, 0] > 0).sum(-1)
        assert found[0, 0].isnan().tolist() == (seen < 2).tolist()
    else:
        expected = by_loop(weights, torch.ones(2, 5), is_causal="is_causal" in call)
        heads = found.nanmean((0, 2))
        assert (float(heads.mean()), float(heads.min())) == pytest.approx(expected, abs=1e-5)


def test_a_softmax_over_channels_is_no_attention() -> None:
    assert normalized_entropy(F.softmax, (torch.randn(2, 3, 4, 5),), {"dim": 1}) is None
    assert normalized_entropy(F.softmax, (torch.randn(3, 5),), {"dim": -1}) is None
