"""Real models on the meta device, with inputs; `lib:name`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

IMAGE = (1, 3, 224, 224)


def build(spec: str) -> tuple[nn.Module, Any]:
    library, name = spec.split(":")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return {"tv": _torchvision, "timm": _timm, "smp": _smp, "hf": _transformers}[library](name)


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.get_model(name, weights=None), torch.zeros(IMAGE)


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name)
    return model, torch.zeros(1, *model.pretrained_cfg.get("input_size", IMAGE[1:]))


def _smp(name: str) -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder_weights=None), torch.zeros(1, 3, 128, 128)


def _transformers(name: str) -> tuple[nn.Module, Any]:
    import transformers

    ids = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    small: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    if name == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**small)), ids
    if name == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**small)), ids
    if name == "t5":
        config = transformers.T5Config(d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=1)
        return transformers.T5EncoderModel(config), ids
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4)), ids
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=100)), ids
    return transformers.ViTForImageClassification(transformers.ViTConfig(**small)), torch.zeros(IMAGE)
