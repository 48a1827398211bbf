"""Tiny real transformers in float64 with weights that look trained: no unit scale, no zero bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGES = {**WIDTH, "image_size": 16, "patch_size": 8, "num_labels": 5}
TIMM = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
WORDS = {**WIDTH, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.arange(14).reshape(2, 7) * 3, "use_cache": False}


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pixels() -> dict[str, Any]:
    return {"pixel_values": image()}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=1)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def timm_vit(**options: Any) -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **TIMM, **options)
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True, dropout=0.0)
    start = nn.Linear(32, 32)  # what reads the embeddings is then a module
    return nn.Sequential(start, nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False), nn.Linear(32, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "gpt2": (gpt2, tokens),
    "gpt_neox": (lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WORDS)), tokens),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WORDS)), tokens),
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES)), pixels),
    "deit": (lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**IMAGES)), pixels),
    "dinov2": (lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**IMAGES)), pixels),
    "timm_vit": (timm_vit, image),
    "timm_vit_average": (lambda: timm_vit(init_values=0.1, global_pool="avg", qk_norm=True), image),
    "timm_deit": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM), image),
    "torch": (encoder, lambda: torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**WORDS)), lambda: {"input_ids": tokens()["input_ids"]}),
}


def build(name: str) -> tuple[nn.Module, Any]:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    return trained_like(make()), inputs()


def trained_like(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.double().eval().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise * (0.3 if parameter.ndim < 2 else 0.05))
    return model


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return result if isinstance(result, Tensor) else result[0]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())
