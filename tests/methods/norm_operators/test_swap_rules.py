"""NK926 to NK929 and NK935 fire where running the model shows what they say, and are quiet beside it."""

from __future__ import annotations

import pytest
import torch
import transformers
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit import audit, norm_inputs, swap_norms, to_rmsnorm
from tests.methods.norm_operators.tiny_models import build, difference, output


def codes(model: nn.Module, inputs: object, code: str, **options: object) -> set[str]:
    report = audit(model, inputs, select=[code], **options)
    assert not report.notes
    return {finding.code for finding in report.findings}


@pytest.mark.parametrize(("name", "expected"), [("gpt2", {"NK926"}), ("timm_vit", {"NK926"}), ("bert", set()), ("llama", set())])
def test_models_whose_layer_norms_are_rms_norms_for_free(name: str, expected: set[str]) -> None:
    model, inputs = build(name)
    assert codes(model, inputs, "NK926") == expected
    if name == "timm_vit":
        assert codes(model.train(), inputs, "NK926") == set()
        before = output(model.eval(), inputs)
        to_rmsnorm(model, inputs)
        assert difference(output(model, inputs), before) < 1e-12
        assert codes(model, inputs, "NK926") == set()


def llama(alpha: float, width: int = 1024) -> nn.Module:
    config = transformers.LlamaConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=8, intermediate_size=8, vocab_size=10)
    model: nn.Module = transformers.LlamaModel(config)
    swap_norms(model, "dyt", alpha=alpha)
    return model


@pytest.mark.parametrize(
    ("alpha", "width", "expected"), [(0.25, 1024, {"NK927"}), (0.5, 1024, set()), (3.0, 1024, {"NK927"}), (0.25, 64, set())]
)
def test_alphas_of_language_models_far_from_the_published_ones(alpha: float, width: int, expected: set[str]) -> None:
    assert codes(llama(alpha, width), None, "NK927") == expected


def test_trained_alphas_and_models_without_words_are_left_alone() -> None:
    model = llama(0.25)
    with torch.no_grad():
        for number, module in enumerate(model.modules()):
            if hasattr(module, "alpha"):
                module.alpha.fill_(0.1 + number / 1000)
    assert codes(model, None, "NK927") == set()
    image = nn.Sequential(nn.Conv2d(3, 1024, 1), nn.Flatten(2), nn.Linear(4, 1024), nn.LayerNorm(1024))
    swap_norms(image, "dyt", alpha=0.01)
    assert codes(image, None, "NK927") == set()


def test_a_modulation_that_starts_at_zero() -> None:
    """diffusers' DiT: the norms have no scale of their own, one linear layer makes six vectors for each block."""
    options = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 2, "num_layers": 1, "sample_size": 4, "norm_num_groups": 1}
    model = DiTTransformer2DModel(**options, num_embeds_ada_norm=3)
    assert codes(model, None, "NK927") == set()
    modulation = model.transformer_blocks[0].norm1.linear
    nn.init.zeros_(modulation.weight)
    nn.init.zeros_(modulation.bias)
    assert codes(model, None, "NK927") == set()  # layer norms start so on purpose
    swap_norms(model, "dyt")
    assert codes(model, None, "NK927") == {"NK927"}
    nn.init.xavier_uniform_(modulation.weight)
    assert codes(model, None, "NK927") == set()


@pytest.mark.parametrize(
    ("to", "batch", "expected"), [("prepbn", 8, {"NK928"}), ("unified", 8, {"NK928"}), ("prepbn", 64, set()), ("dyt", 8, set())]
)
def test_few_tokens_for_batch_statistics(to: str, batch: int, expected: set[str]) -> None:
    """32 channels and 5 tokens an image: 8 images are 1.25 tokens a channel."""
    model, inputs = build("timm_vit")
    swap_norms(model, to)
    loader = DataLoader(TensorDataset(torch.randn(64, 3, 16, 16)), batch_size=batch)
    assert codes(model, inputs, "NK928", loaders=(loader, None)) == expected
    assert codes(model, inputs, "NK928") == set()


def test_time_without_effect() -> None:
    model, inputs = build("timm_vit")
    swap_norms(model, "tdln")
    assert codes(model.train(), None, "NK929") == set()
    assert codes(model.eval(), None, "NK929") == {"NK929"}

    def at(time: float) -> Tensor:
        with norm_inputs(model, time=torch.full((2,), time).double()):
            return output(model, inputs)

    assert torch.equal(at(-2.0), at(2.0))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "other_weight"):
                module.other_weight.mul_(1.5)
    assert codes(model, None, "NK929") == set()
    assert difference(at(-2.0), at(2.0)) > 1e-3


def first_token(factor: float) -> tuple[nn.Module, object]:
    """GPT-2 whose first position is `factor` times as large as the others."""
    model, inputs = build("gpt2")
    with torch.no_grad():
        model.get_parameter("transformer.wpe.weight")[0].mul_(factor)
    return model, inputs


@pytest.mark.parametrize(("factor", "expected"), [(1.0, set()), (60.0, {"NK935"})])
def test_a_position_that_one_constant_does_not_fit(factor: float, expected: set[str]) -> None:
    model, inputs = first_token(factor)
    assert codes(model, inputs, "NK935") == set()
    swap_norms(model, "fixed_std")
    assert codes(model, inputs, "NK935") == expected
