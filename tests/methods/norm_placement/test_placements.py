"""Placements that act inside attention or turn post-norm blocks around, against blocks written by hand."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from pl_normkit import place_norms
from pl_normkit.errors import ConfigError, EditError
from pl_normkit.graph.sharing import TraceStore, shared_traces
from pl_normkit.methods.norm_placement.modules import HeadNorm, OutputNorm
from tests.methods.norm_placement.by_hand import SIZES, Part, bert, difference, doubled, gpt2, llama, output, written_by_hand
from tests.methods.norm_placement.making import Made

IDS = {"input_ids": torch.arange(16).reshape(2, 8) % 50}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def stirred(model: nn.Module, *kinds: type[nn.Module]) -> nn.Module:
    """Scales of new modules as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, kinds):
            weight: Any = module.weight
            weight.data += torch.rand(weight.shape, generator=generator, dtype=weight.dtype)
    return model


@pytest.mark.parametrize("first_block", ["pre", "hybrid"])
def test_hybrid_is_the_block_written_by_hand(first_block: str) -> None:
    made, inputs = doubled(*llama())
    model = copy.deepcopy(made)
    place_norms(model, "hybrid", inputs, retrain=True, first_block=first_block)
    stirred(model, HeadNorm)
    expected = copy.deepcopy(made)
    for own, block in zip(model.model.layers, expected.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            norm, layer = getattr(own.self_attn, name).placed_head_norm, getattr(block.self_attn, name)

            def project(x: Tensor, layer: Any = layer, norm: Any = norm) -> Tensor:
                heads = F.linear(x, layer.weight, layer.bias).unflatten(-1, (-1, 4))
                return rms(heads, norm.weight, norm.eps).flatten(-2)

            layer.forward = project

    def formula(x: Tensor, part: Part, layer: int, number: int) -> Tensor:
        norm, branch = part
        if layer == 1 and first_block == "pre":
            return x + branch(norm(x))
        return x + branch(x) if number == 0 else norm(x) + branch(norm(x))

    assert difference(output(model, inputs), output(written_by_hand(expected, formula), inputs)) < 1e-12


def test_norms_without_a_place_are_not_trained() -> None:
    model, inputs = llama()
    place_norms(model, "hybrid", inputs)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"model.layers.{number}.input_layernorm.weight" for number in (1, 2)]


@pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
def test_sdd_is_the_layers_written_by_hand(make: Callable[[], Made]) -> None:
    made, inputs = doubled(*make())
    model = copy.deepcopy(made)
    place_norms(model, "sdd", inputs, retrain=True)
    ends = ("o_proj", "down_proj", "output.dense")
    starts = {path.removesuffix(".placed_norm"): module for path, module in model.named_modules() if isinstance(module, OutputNorm)}
    for path, norm in starts.items():
        assert norm.weight.tolist() == pytest.approx([3**-0.5 if path.endswith(ends) else 1.0] * norm.width)
    layers = {path: module for path, module in made.named_modules() if isinstance(module, nn.Linear) and ".layer" in path}
    assert starts.keys() == layers.keys()
    stirred(model, OutputNorm)
    expected = copy.deepcopy(made)
    for path, norm in starts.items():
        layer: Any = expected.get_submodule(path)
        layer.forward = lambda x, layer=layer, a=norm.weight: rms(F.linear(x, layer.weight, layer.bias), a, 1e-6)
    assert difference(output(model, inputs), output(expected, inputs)) < 1e-12


def _pre_norm_bert(model: Any) -> nn.Module:
    """x + f(norm(x)), each branch with the norm that stood behind the addition before, and the last one at the end."""
    embeddings, layers = model.bert.embeddings, list(model.bert.encoder.layer)
    norms = [embeddings.LayerNorm, *(norm for layer in layers for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm))]

    def embed(self: Any, input_ids: Tensor, **_: Any) -> Tensor:
        places = torch.arange(input_ids.shape[1])
        return self.word_embeddings(input_ids) + self.position_embeddings(places) + self.token_type_embeddings.weight[0]

    def layer_forward(self: Any, stream: Tensor, *_: Any, number: int, **k: Any) -> Tensor:
        drop = embeddings.dropout if number == 0 else nn.Identity()
        mixed = self.attention.self(drop(norms[2 * number](stream)))[0]
        stream = stream + self.attention.output.dropout(self.attention.output.dense(mixed))
        stream = stream + self.output.dropout(self.output.dense(self.intermediate(norms[2 * number + 1](stream))))
        return norms[-1](stream) if number == len(layers) - 1 else stream

    embeddings.forward = types.MethodType(embed, embeddings)
    for number, layer in enumerate(layers):
        layer.forward = types.MethodType(lambda self, stream, *a, n=number, **k: layer_forward(self, stream, number=n), layer)
    return model


def _gradients(model: Any, inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**inputs).logits.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def bert_with_dropout() -> Made:
    return tf.BertForSequenceClassification(tf.BertConfig(**SIZES, hidden_dropout_prob=0.3)), IDS


@pytest.mark.parametrize("make", [bert, bert_with_dropout])
def test_pre_turns_post_norm_blocks_around(make: Callable[[], Made]) -> None:
    made, inputs = doubled(*make())
    keys = set(made.state_dict())
    model, expected = copy.deepcopy(made), _pre_norm_bert(copy.deepcopy(made))
    place_norms(model, "pre", inputs, retrain=True)
    assert set(model.state_dict()) == keys
    assert difference(output(model, inputs), output(expected, inputs)) < 1e-12
    assert difference(output(model, inputs), output(made, inputs)) > 1e-3
    torch.manual_seed(3)
    found = _gradients(model, inputs)
    torch.manual_seed(3)
    for name, gradient in _gradients(expected, inputs).items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-14), name


def test_a_checkpoint_runs_turned_blocks_again() -> None:
    model, inputs = doubled(*bert())
    place_norms(model, "pre", inputs, retrain=True)
    plain = _gradients(model, inputs)
    twin = copy.deepcopy(model)  # of a model that keeps what its last step made
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert all(torch.allclose(plain[name], gradient, rtol=1e-10) for name, gradient in _gradients(model, inputs).items())
    assert all(torch.equal(plain[name], gradient) for name, gradient in _gradients(twin, inputs).items())
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(EditError, match="use_reentrant=True cannot hold"):
        _gradients(model, inputs)


def gemma() -> Made:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=4, pad_token_id=0)), {**IDS, "use_cache": False}


def qwen() -> Made:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=4)), {**IDS, "use_cache": False}


REFUSED: list[tuple[str, Callable[[], Made], dict[str, Any], str]] = [
    ("hybrid", gpt2, {}, "queries, keys and values have no layer each"),
    ("hybrid", bert, {}, "no norm stands at the entry of the branch"),
    ("hybrid", gemma, {}, "stands behind it already, as in Peri-LN"),
    ("sdd", gemma, {}, "stands behind it already, as in Peri-LN"),
    ("post", gemma, {}, "stands behind it already, as in Peri-LN"),
    ("hybrid", qwen, {}, "its attention normalizes already"),
    ("sdd", gpt2, {}, "one layer makes queries, keys and values"),
    ("pre", llama, {}, "no norm reads the sum alone"),
    (
        "pre",
        lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False), torch.randn(3, 2, 8)),
        {},
        "is not the output of a norm",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _shared() -> Any:
    with shared_traces(TraceStore()):
        yield


@pytest.mark.parametrize(("kind", "make", "options", "reason"), REFUSED, ids=[f"{case[0]}-{n}" for n, case in enumerate(REFUSED)])
def test_what_is_refused(kind: str, make: Callable[[], Made], options: dict[str, Any], reason: str) -> None:
    model, inputs = make()
    before = repr(model)
    with pytest.raises(EditError, match=f"'{kind}' cannot be placed without rewriting forward") as refusal:
        place_norms(model, kind, inputs, **options)
    assert reason in refusal.value.evidence
    assert repr(model) == before


def test_wrong_options() -> None:
    model, inputs = llama()
    with pytest.raises(ConfigError, match='the first block is "pre" or "hybrid"'):
        place_norms(model, "hybrid", inputs, first_block="post")
    model, inputs = bert()
    with pytest.raises(ConfigError, match="'pre' is placed in all blocks or none"):
        place_norms(model, "pre", inputs, filter_fn=lambda _, path: ".0" in path)
