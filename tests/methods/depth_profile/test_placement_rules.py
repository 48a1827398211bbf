"""NK906 to NK908 at what they name, and quiet on real networks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR
from transformers import BertConfig, BertModel, T5Config, T5Model

from pl_normkit import audit
from pl_normkit.graph import ModelGraph
from pl_normkit.rules import Subject, load_rules
from tests.methods.depth_profile.networks import GPT2, LLAMA, tokens

WIDTH = 16
X = torch.linspace(-1.0, 1.0, 2 * 5 * WIDTH).reshape(2, 5, WIDTH).sin()


class DeepNormBlock(nn.Module):
    """x <- norm(alpha x + f(x)) with the gain beta of values, outputs and feed-forward weights."""

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2, self.alpha = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), alpha
        for layer in (self.q, self.k):
            nn.init.xavier_normal_(layer.weight)
        for layer in (self.v, self.out, self.up, self.down):
            nn.init.xavier_normal_(layer.weight, beta)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = self.norm1(x * self.alpha + attended)
        return self.norm2(x * self.alpha + self.down(self.up(x).relu()))


def deepnorm(depth: int, alpha: float | None = None, exponent: float = -0.25, trained: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [DeepNormBlock((2 * depth) ** 0.25 if alpha is None else alpha, (8 * depth) ** exponent) for _ in range(depth)]
    if trained:
        nn.init.uniform_(blocks[0].norm1.weight, 0.5, 1.5)
    return nn.Sequential(*blocks)


@functools.cache
def graph_of_deepnorm(alpha: float) -> ModelGraph:
    return ModelGraph.from_model(deepnorm(2, alpha), X)


def found(code: str, model: nn.Module, inputs: Any, graph: ModelGraph) -> list[Any]:
    return list(load_rules()[code].judge(Subject(model, example_inputs=inputs, graph=graph)))


DEEPNORMS: dict[str, tuple[Callable[[], nn.Sequential], list[str]]] = {
    "right": (lambda: deepnorm(2), []),
    "the constant of 32 layers": (lambda: deepnorm(2, alpha=2.828), ["The shortcut is multiplied by 2.828, where"]),
    "inverted exponent": (lambda: deepnorm(2, exponent=0.25), ["DeepNorm's scale of the weights has its exponent inverted"]),
    "no scale": (lambda: deepnorm(2, exponent=0.0), ["DeepNorm's scale of the weights is off"]),
    "both": (
        lambda: deepnorm(2, alpha=2.828, exponent=0.25),
        ["The shortcut is multiplied by 2.828, where", "DeepNorm's scale of the weights has its exponent inverted"],
    ),
    "trained": (lambda: deepnorm(2, exponent=0.25, trained=True), []),
    "plain post-norm": (lambda: deepnorm(2, alpha=1.0, exponent=0.0), []),
}


@pytest.mark.parametrize("case", DEEPNORMS)
def test_constants_of_deepnorm(case: str) -> None:
    build, expected = DEEPNORMS[case]
    model = build()
    messages = [finding.message for finding in found("NK906", model, X, graph_of_deepnorm(model[0].alpha))]
    assert [message.startswith(start) for message, start in zip(messages, expected, strict=True)] == [True] * len(expected)


def without_norms(build: Callable[[], nn.Module], ending: str) -> nn.Module:
    model = build()
    for path, _ in [(path, module) for path, module in model.named_modules() if path.endswith(ending)]:
        model.set_submodule(path, nn.Identity())
    return model


class Placed(nn.Module):
    """A block of attention that adds what a layer says of positions to what its norm gave, as CSATv2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.places, self.attention = nn.LayerNorm(8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        placed = normed + self.places(normed).relu()
        return x + self.attention(placed, placed, placed, need_weights=False)[0]


class Added(nn.Module):
    """x + f(x) of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).relu()


def pooled(adds: int) -> nn.Module:
    """Attention behind other residual blocks, as CLIP's ResNet pools."""
    return nn.Sequential(nn.Embedding(32, 8), *(Added() for _ in range(adds)), Placed())


def placed() -> nn.Module:
    return nn.Sequential(nn.Embedding(32, 8), Placed(), Placed())


UNNORMED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "gpt2": (lambda: without_norms(GPT2.build, "ln_1"), ["transformer.h.1.attn", "transformer.h.2.attn"]),
    "llama": (lambda: without_norms(LLAMA.build, "input_layernorm"), ["model.layers.1.self_attn"]),
    "positions added behind the norm": (placed, []),
    "positions added in its place": (lambda: without_norms(placed, "norm"), ["2.attention"]),
    "positions alone": (lambda: without_norms(lambda: pooled(0), "norm"), []),
    "once, behind another block": (lambda: without_norms(lambda: pooled(1), "norm"), ["2.attention"]),
    "only the norms of the feed-forward part": (lambda: without_norms(GPT2.build, "ln_2"), []),
}


@pytest.mark.parametrize("case", UNNORMED)
def test_attention_without_a_norm_before_it(case: str) -> None:
    build, places = UNNORMED[case]
    model = build()
    inputs = tokens()["input_ids"] if isinstance(model, nn.Sequential) else tokens()
    graph = ModelGraph.from_model(model, inputs)
    assert [place.module for finding in found("NK907", model, inputs, graph) for place in finding.places] == places


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=32, max_position_embeddings=16,
            initializer_range=0.3,
        )
    )  # fmt: skip


def small(model: nn.Module) -> nn.Module:
    for path, module in model.named_modules():
        if path.endswith("output.dense"):
            module.weight.data *= 0.05
    return model


def constant(model: nn.Module, rate: float) -> Optimizer:
    optimizer = AdamW(model.parameters(), rate)
    LambdaLR(optimizer, lambda step: 0.99**step)
    return optimizer


def warmed(model: nn.Module, rate: float) -> Optimizer:
    optimizer = AdamW(model.parameters(), rate)
    LinearLR(optimizer, 0.1)
    return optimizer


def one_cycle(model: nn.Module, rate: float) -> Optimizer:
    optimizer = AdamW(model.parameters(), rate)
    OneCycleLR(optimizer, rate, total_steps=10)
    return optimizer


def stepped(model: nn.Module, rate: float) -> Optimizer:
    optimizer = AdamW(model.parameters(), rate)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Optimizer], int]] = {
    "no scheduler": (bert, lambda m: AdamW(m.parameters(), 3e-3), 1),
    "a scheduler that only falls": (bert, lambda m: constant(m, 3e-3), 1),
    "at a low rate": (bert, lambda m: AdamW(m.parameters(), 1e-3), 0),
    "warm-up": (bert, lambda m: warmed(m, 3e-2), 0),
    "warm-up of one cycle": (bert, lambda m: one_cycle(m, 3e-2), 0),
    "after a step": (bert, lambda m: stepped(m, 3e-3), 0),
    "RAdam": (bert, lambda m: RAdam(m.parameters(), 3e-3), 0),
    "SGD, whose rates are others": (bert, lambda m: SGD(m.parameters(), 0.1), 0),
    "small branches": (lambda: small(bert()), lambda m: AdamW(m.parameters(), 3e-3), 0),
    "small branches at a high rate": (lambda: small(bert()), lambda m: AdamW(m.parameters(), 1e-2), 1),
    "pre-norm": (GPT2.build, lambda m: AdamW(m.parameters(), 3e-2), 0),
}


@pytest.fixture(scope="module")
def graph_of_bert() -> ModelGraph:
    return ModelGraph.from_model(bert(), tokens())


@pytest.mark.parametrize("case", RUNS)
def test_post_norm_without_warmup(case: str, graph_of_bert: ModelGraph) -> None:
    build, optimizer, expected = RUNS[case]
    model = build()
    graph = graph_of_bert if isinstance(model, BertModel) else ModelGraph.from_model(model, tokens())
    subject = Subject(model, example_inputs=tokens(), graph=graph, optimizers=[optimizer(model)])
    assert len(list(load_rules()["NK908"].judge(subject))) == expected


QUIET: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "gpt2": (GPT2.build, tokens),
    "bert": (bert, tokens),
    "t5": (
        lambda: T5Model(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32)),
        lambda: {**tokens(), "decoder_input_ids": tokens()["input_ids"]},
    ),
}


@pytest.mark.parametrize("name", QUIET)
def test_real_networks_are_quiet(name: str) -> None:
    build, batch = QUIET[name]
    model = build()
    report = audit(model, batch(), select=["NK906", "NK907", "NK908"], optimizers=[AdamW(model.parameters(), 1e-3)])
    assert [finding.code for finding in report.findings] == []
    assert [str(note) for note in report.notes] == []
