"""`tune_norms_only` trains what normalizes, whatever it is called, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.norm_operators import swap_norms
from pl_normkit.methods.norm_training import tune_norms_only
from pl_normkit.methods.norm_training.find import find_norm_parameters, head_parameters

WORDS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "pad_token_id": 0,
}
TOKENS = {"input_ids": torch.tensor([[1, 2, 3]]), "use_cache": False}
IMAGE = torch.zeros(2, 3, 32, 32)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=1)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def llama(kind: str = "Llama") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**WORDS, **({"head_dim": 8} if kind == "Gemma" else {}))
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


def swapped() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    swap_norms(model, to="dyt")
    return model


class ByHand(nn.Module):
    """A norm written out in a forward pass; `mix` scales something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.mix = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = torch.relu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain) + torch.tanh(x * self.mix)
        return result


LLAMA = {"model.norm.weight"} | {f"model.layers.{i}.{name}_layernorm.weight" for i in range(2) for name in ("input", "post_attention")}
TRUTH: dict[str, tuple[Any, Any, set[str]]] = {
    "llama": (llama, None, LLAMA),
    "gemma": (lambda: llama("Gemma"), TOKENS, LLAMA),
    "gpt2": (gpt2, None, {f"transformer.{norm}.{kind}" for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f") for kind in ("weight", "bias")}),
    "by_hand": (ByHand, torch.randn(2, 4), {"gain"}),
    "swapped": (swapped, None, {"1.weight", "1.bias", "1.alpha"}),
    "numbered": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4)), None, {"1.weight", "1.bias"}),
}


@pytest.mark.parametrize("name", TRUTH)
def test_norms_and_nothing_else_are_trained(name: str) -> None:
    make, inputs, expected = TRUTH[name]
    model = make()
    tune_norms_only(model, inputs)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize("kind", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_step_moves_norms_alone(kind: str) -> None:
    model = timm.create_model(kind, num_classes=3, **({"img_size": 32, "depth": 2} if "vit" in kind else {}))
    norms = {id(held) for module in model.modules() if "Norm" in type(module).__name__ for held in module.parameters(recurse=False)}
    tune_norms_only(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert {name for name, parameter in model.named_parameters() if id(parameter) not in norms} <= still
    assert len(before) - len(still) > len(norms) / 2


def test_where_also_and_undo() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    changes = tune_norms_only(model, where=lambda norm, path: isinstance(norm, nn.LayerNorm), also=["3.weight", "1"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]
    changes.undo()
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_what_may_be_a_norm_is_named_and_bad_input_touches_nothing() -> None:
    model = llama("Gemma")
    with pytest.raises(NothingMatchedError, match="GemmaRMSNorm is not known as a norm; pass example_inputs"):
        tune_norms_only(model)
    with pytest.raises(ConfigError, match="no parameter at 'lm_haed'"):
        tune_norms_only(model, TOKENS, also=["lm_haed"])
    with pytest.raises(NothingMatchedError, match="where took none"):
        tune_norms_only(model, TOKENS, where=lambda norm, path: False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert find_norm_parameters(model, TOKENS).unread == []


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 2), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.body(x)))
        return result


HEADS: dict[str, tuple[Any, Any, set[str]]] = {
    "resnet": (lambda: timm.create_model("resnet18", num_classes=3), IMAGE, {"fc.weight", "fc.bias"}),
    "features": (lambda: timm.create_model("resnet18", num_classes=0), IMAGE, set()),
    "nfnet": (lambda: timm.create_model("nf_resnet26", num_classes=3), IMAGE, {"head.fc.weight", "head.fc.bias"}),
    "distilled": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=3),
        IMAGE,
        {f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")},
    ),
    "tied": (gpt2, TOKENS, {"transformer.wte.weight"}),
    "not_last": (HeadFirst, torch.zeros(2, 4), {"head.weight", "head.bias"}),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_found_by_its_place(name: str) -> None:
    make, inputs, expected = HEADS[name]
    assert head_parameters(ModelGraph.from_model(make(), inputs)) == expected
