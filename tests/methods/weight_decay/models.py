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

    shape = (1, 3, 16, 224, 224) if name.startswith("mvit") else IMAGE
    return torchvision.models.get_model(name, weights=None), torch.zeros(shape)


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
    experts = {**small, "num_key_value_heads": 2, "vocab_size": 100, "num_local_experts": 4}
    if name == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**experts)), ids
    if name == "gpt_oss":
        return transformers.GptOssForCausalLM(transformers.GptOssConfig(**experts, head_dim=16)), ids
    if name == "deberta":
        relative: dict[str, Any] = {
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
        }
        sizes: dict[str, Any] = {
            "norm_rel_ebd": "layer_norm",
            "max_relative_positions": -1,
            "max_position_embeddings": 32,
            "vocab_size": 100,
        }
        return transformers.DebertaV2Model(transformers.DebertaV2Config(**small, **relative, **sizes)), ids
    if name == "siglip":
        vision = transformers.SiglipVisionConfig(**small, image_size=32, patch_size=8)
        return transformers.SiglipVisionModel(vision), torch.zeros(2, 3, 32, 32)
    if name == "perceiver":
        latents: dict[str, Any] = {"num_latents": 8, "d_latents": 32, "d_model": 24, "num_blocks": 1, "num_self_attends_per_block": 2}
        heads = {"num_self_attention_heads": 4, "num_cross_attention_heads": 4}
        return transformers.PerceiverModel(transformers.PerceiverConfig(**latents, **heads)), {"inputs": torch.zeros(2, 16, 24)}
    if name == "t5_masked":
        config = transformers.T5Config(d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=2)
        return transformers.T5EncoderModel(config), {**ids, "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    if name == "t5":
        config = transformers.T5Config(d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=1)
        return transformers.T5EncoderModel(config), ids
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4)), ids
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=100)), ids
    return transformers.ViTForImageClassification(transformers.ViTConfig(**small)), torch.zeros(IMAGE)
