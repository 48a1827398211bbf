"""The architectures that `zoo_libraries.py` reads: how each is built, small and on the meta device, and what it is called with."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pl_normkit.inputs import parse_inputs
from pl_normkit.specs import build_model

LAYERS = 2
VOCABULARY = 2000
BATCH = 2
TOKENS = 16
Inputs = Any


@dataclass(frozen=True)
class Case:
    """One architecture: how to build it, and what it is called with."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]


def cases() -> Iterator[Case]:
    yield from transformers_cases()
    yield from diffusers_cases()
    yield from monai_cases()
    yield from torchaudio_cases()
    yield from torchvision_cases()


# transformers

DEPTH = re.compile(
    r"(n_layers?|num_layers|.*num_hidden_layers|num_(encoder|decoder|block|hidden|transformer)_?layers|(.*_)?(encoder|decoder)_layers"
    r"|(encoder_|decoder_)?(depth|num_blocks)|n_blocks)"
)
AXIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "ministral": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "reformer": {"axial_pos_shape": [4, 4], "attn_layers": ["local", "lsh"], "is_decoder": False},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "lfm2_moe": {
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "openai_privacy_filter": {"num_local_experts": 8, "experts_implementation": "grouped_mm"},
    "glm4v": {"text_config": {"rope_parameters": AXIAL}},
    "glm46v": {"text_config": {"rope_parameters": AXIAL}},
    "glm4v_moe": {"text_config": {"head_dim": 128, "rope_parameters": AXIAL}},
}
"""What a configuration needs beside its defaults."""
ON_CPU = frozenset(("fsmt", "longformer", "led", "glm4v_vision", "qwen3_vl_vision", "dbrx", "switch_transformers", "encodec", "mimi"))
"""Architectures that ask their inputs for values, so that they are run: the meta device has none."""


def transformers_cases() -> Iterator[Case]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for kind, names in MODEL_MAPPING_NAMES.items():
        if kind.startswith("timm_"):
            continue
        name = names if isinstance(names, str) else names[0]
        yield Case("transformers", kind, lambda kind=kind, name=name: build_transformer(kind, name), transformer_inputs)


def build_transformer(kind: str, name: str) -> nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**ARGUMENTS.get(kind, {}))
    shrink(config, set())
    if hasattr(config, "use_cache"):
        config.use_cache = False
    device = "cpu" if kind in ON_CPU else "meta"
    with torch.device(device):
        return getattr(transformers, name)(config).to(device)  # type: ignore[no-any-return]


def shrink(config: Any, seen: set[int]) -> None:
    """Two layers in every part of the configuration, and lists with an entry for each layer cut accordingly."""
    if id(config) in seen:
        return
    seen.add(id(config))
    values, depth = dict(vars(config)), 0
    for key, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value, seen)
        elif isinstance(value, int) and not isinstance(value, bool):
            if DEPTH.fullmatch(key) and value > LAYERS:
                depth = max(depth, value)
                setattr(config, key, LAYERS)
            elif key.endswith("vocab_size") and value > VOCABULARY:
                setattr(config, key, VOCABULARY)
            elif re.search(r"token_(id|index)$|_token$", key) and value >= VOCABULARY:
                setattr(config, key, VOCABULARY - 100 + value % 100)
    for key, value in values.items():
        if depth and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, key, _all_kinds(value))


def _all_kinds(values: Any) -> Any:
    """As many entries as there are layers, of different kinds where there are such."""
    different = [value for index, value in enumerate(values) if value not in values[:index]]
    return type(values)([*different, *values][:LAYERS]) if len(different) > 1 else values[:LAYERS]


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(BATCH, *shape)


def ids(length: int = TOKENS) -> torch.Tensor:
    return torch.zeros(BATCH, length, dtype=torch.long)


def transformer_inputs(model: Any) -> Inputs:
    config = model.config
    own = INPUTS.get(config.model_type)
    if own is not None:
        return own(config)
    if model.main_input_name in BY_NAME:
        known = BY_NAME[model.main_input_name](config)
        if "decoder_input_ids" in inspect.signature(model.forward).parameters:
            known["decoder_input_ids"] = ids()
        return known
    shows_images = any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index", "audio_token_id"))
    if shows_images and model.main_input_name == "input_ids":
        return {"input_ids": ids()}
    return parse_inputs([], model)


def series(config: Any) -> Inputs:
    """What a forecaster is called with: its past with every lag, its future where it decodes."""
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": zeros(past),
        "past_time_features": zeros(past, config.num_time_features),
        "past_observed_mask": zeros(past),
        "future_values": zeros(config.prediction_length),
        "future_time_features": zeros(config.prediction_length, config.num_time_features),
    }


def patches(config: Any) -> Inputs:
    """Images of different shapes as flat patches, 4 by 4 of them."""
    return {
        "pixel_values": zeros(16, config.num_channels * config.patch_size**2),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.full((BATCH, 2), 4),
    }


def packed(config: Any) -> Inputs:
    """One image of 4 by 4 patches in a sequence without a batch."""
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return {"hidden_states": torch.zeros(16, size), "grid_thw": torch.tensor([[1, 4, 4]])}


BY_NAME: dict[str, Callable[[Any], Inputs]] = {
    "input_values": lambda _: {"input_values": zeros(4000)},
    "input_features": lambda config: {"input_features": zeros(64, getattr(config, "num_mel_bins", None) or 80)},
}
INPUTS: dict[str, Callable[[Any], Inputs]] = {
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), series),
    "whisper": lambda c: {"input_features": zeros(c.num_mel_bins, 2 * c.max_source_positions), "decoder_input_ids": ids()},
    "audio-spectrogram-transformer": lambda c: {"input_values": zeros(c.max_length, c.num_mel_bins)},
    "bros": lambda _: {"input_ids": ids(), "bbox": zeros(TOKENS, 4)},
    "decision_transformer": lambda c: {
        "states": zeros(5, c.state_dim),
        "actions": zeros(5, c.act_dim),
        "returns_to_go": zeros(5, 1),
        "timesteps": ids(5),
    },
    "dia": lambda c: {"input_ids": ids(), "decoder_input_ids": torch.zeros(BATCH, 5, 9, dtype=torch.long)},
    "idefics3_vision": lambda c: {"pixel_values": zeros(3, c.image_size, c.image_size)},
    "smolvlm_vision": lambda c: {"pixel_values": zeros(3, c.image_size, c.image_size)},
    "switch_transformers": lambda _: {
        name: ids() for name in ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    },
    "canine": lambda _: {"input_ids": ids(32)},  # more positions than types of tokens
    "perceiver": lambda c: {"inputs": zeros(20, c.d_model)},
    # the base model takes what its prenets make of speech or text
    "speecht5": lambda c: {"input_values": zeros(20, c.hidden_size), "decoder_input_values": zeros(20, c.hidden_size)},
    "siglip2": lambda c: {"input_ids": ids(), **patches(c.vision_config)},
    "siglip2_vision_model": patches,
    **dict.fromkeys(("glm4v_vision", "qwen3_vl_vision"), packed),
    "patchtst": lambda c: {"past_values": zeros(c.context_length, c.num_input_channels)},
    **dict.fromkeys(("dac", "encodec", "mimi"), lambda _: {"input_values": zeros(1, 4000)}),
    "timesfm": lambda c: {"past_values": zeros(4 * c.patch_length), "past_values_padding": zeros(4 * c.patch_length), "freq": ids(1)},
    **dict.fromkeys(
        ("timesformer", "videomae", "vivit"), lambda c: {"pixel_values": zeros(c.num_frames, c.num_channels, c.image_size, c.image_size)}
    ),
    "vjepa2": lambda c: {"pixel_values_videos": zeros(c.frames_per_clip, 3, c.crop_size, c.crop_size)},
    "wav2vec2-bert": lambda c: {"input_features": zeros(64, c.feature_projection_input_dim)},
    "patchtsmixer": lambda c: {"past_values": zeros(c.context_length, c.num_input_channels)},
}


# diffusers


def diffusers_cases() -> Iterator[Case]:
    for name, (arguments, inputs) in DIFFUSERS.items():
        yield Case("diffusers", name, lambda name=name, arguments=arguments: _build("diffusers", name, arguments), lambda _, i=inputs: i())


def _build(module: str, name: str, arguments: Mapping[str, Any], device: str = "meta") -> nn.Module:
    kind = getattr(importlib.import_module(module), name)
    with torch.device(device):
        return kind(**arguments)  # type: ignore[no-any-return]


def times() -> torch.Tensor:
    return torch.zeros(BATCH, dtype=torch.long)


UNET = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
}
CROSSED = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
DIFFUSERS: dict[str, tuple[dict[str, Any], Callable[[], Inputs]]] = {
    "UNet2DModel": (
        {**UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": zeros(3, 16, 16), "timestep": times()},
    ),
    "UNet2DConditionModel": (
        {**UNET, **CROSSED, "cross_attention_dim": 32},
        lambda: {"sample": zeros(4, 16, 16), "timestep": times(), "encoder_hidden_states": zeros(5, 32)},
    ),
    "UNet3DConditionModel": (
        {
            **UNET,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        lambda: {"sample": zeros(4, 3, 16, 16), "timestep": times(), "encoder_hidden_states": zeros(5, 32)},
    ),
    "ControlNetModel": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": CROSSED["down_block_types"],
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        lambda: {
            "sample": zeros(4, 16, 16),
            "timestep": times(),
            "encoder_hidden_states": zeros(5, 32),
            "controlnet_cond": zeros(3, 128, 128),
        },
    ),
    "AutoencoderKL": (VAE, lambda: zeros(3, 32, 32)),
    "VQModel": ({**VAE, "num_vq_embeddings": 16, "vq_embed_dim": 4}, lambda: zeros(3, 32, 32)),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 2),
            "num_decoder_blocks": (2, 1),
        },
        lambda: zeros(3, 32, 32),
    ),
    "DiTTransformer2DModel": (
        {**ATTENTION, "in_channels": 4, "sample_size": 8, "norm_num_groups": 8},
        lambda: {"hidden_states": zeros(4, 8, 8), "timestep": times(), "class_labels": times()},
    ),
    "PixArtTransformer2DModel": (
        {
            **ATTENTION,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "norm_num_groups": 8,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": zeros(4, 8, 8),
            "encoder_hidden_states": zeros(5, 24),
            "timestep": times(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": (
        {
            **ATTENTION,
            "sample_size": 8,
            "in_channels": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 16,
        },
        lambda: {
            "hidden_states": zeros(4, 8, 8),
            "encoder_hidden_states": zeros(5, 24),
            "pooled_projections": zeros(16),
            "timestep": times(),
        },
    ),
    "FluxTransformer2DModel": (
        {
            **ATTENTION,
            "num_single_layers": 2,
            "in_channels": 16,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda: {
            "hidden_states": zeros(9, 16),
            "encoder_hidden_states": zeros(5, 24),
            "pooled_projections": zeros(16),
            "timestep": torch.zeros(BATCH),
            "img_ids": torch.zeros(9, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "SanaTransformer2DModel": (
        {
            **ATTENTION,
            "in_channels": 4,
            "out_channels": 4,
            "sample_size": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
        },
        lambda: {"hidden_states": zeros(4, 8, 8), "encoder_hidden_states": zeros(5, 24), "timestep": times()},
    ),
    "WanTransformer3DModel": (
        {**ATTENTION, "in_channels": 4, "out_channels": 4, "text_dim": 24, "ffn_dim": 64, "freq_dim": 32},
        lambda: {"hidden_states": zeros(4, 2, 8, 8), "encoder_hidden_states": zeros(5, 24), "timestep": times()},
    ),
    "PriorTransformer": (
        {**ATTENTION, "embedding_dim": 24, "num_embeddings": 5, "additional_embeddings": 4},
        lambda: {
            "hidden_states": zeros(24),
            "timestep": times(),
            "proj_embedding": zeros(24),
            "encoder_hidden_states": zeros(5, 24),
        },
    ),
    "Transformer2DModel": (
        {**ATTENTION, "in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 24},
        lambda: {"hidden_states": zeros(32, 8, 8), "encoder_hidden_states": zeros(5, 24)},
    ),
}


# monai


def monai_cases() -> Iterator[Case]:
    for key, (arguments, shape) in MONAI.items():
        name = key.partition("/")[0]
        yield Case(
            "monai",
            key,
            lambda name=name, arguments=arguments: _build("monai.networks.nets", name, arguments, _device_of(name)),
            lambda _, s=shape: zeros(*s),
        )


def _device_of(name: str) -> str:
    """SwinUNETR computes its rates of stochastic depth while it is built."""
    return "cpu" if name == "SwinUNETR" else "meta"


PLAIN = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
RESAMPLED = {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
MONAI: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "UNet": ({**PLAIN, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}, (1, 32, 32)),
    "UNet/plain": ({**PLAIN, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 0}, (1, 32, 32)),
    "AttentionUnet": ({**PLAIN, "channels": (8, 16, 32), "strides": (2, 2)}, (1, 32, 32)),
    "BasicUNet": ({**PLAIN, "features": (8, 8, 16, 32, 64, 8)}, (1, 32, 32)),
    "BasicUNetPlusPlus": ({**PLAIN, "features": (8, 8, 16, 32, 64, 8)}, (1, 32, 32)),
    "DynUNet": (
        {
            **PLAIN,
            "kernel_size": (3, 3, 3),
            "strides": (1, 2, 2),
            "upsample_kernel_size": (2, 2),
            "filters": (8, 16, 32),
            "res_block": True,
        },
        (1, 32, 32),
    ),
    "SegResNet": ({**PLAIN, "init_filters": 8}, (1, 32, 32)),
    "SegResNetDS": ({**PLAIN, "init_filters": 8}, (1, 64, 64)),
    "SegResNetVAE": ({**PLAIN, "init_filters": 8, "input_image_size": (32, 32)}, (1, 32, 32)),
    "VNet": ({**PLAIN, "act": "relu"}, (1, 32, 32)),
    "HighResNet": (PLAIN, (1, 32, 32)),
    "UNETR": ({**PLAIN, "img_size": 32, "feature_size": 8, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}, (1, 32, 32)),
    "SwinUNETR": ({**PLAIN, "feature_size": 12}, (1, 64, 64)),
    "ViT": (
        {
            "in_channels": 1,
            "img_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "mlp_dim": 64,
            "num_layers": 2,
            "num_heads": 4,
            "classification": True,
            "spatial_dims": 2,
        },
        (1, 32, 32),
    ),
    "ViTAutoEnc": (
        {
            "in_channels": 1,
            "img_size": 32,
            "patch_size": 4,
            "hidden_size": 48,
            "mlp_dim": 64,
            "num_layers": 2,
            "num_heads": 4,
            "spatial_dims": 2,
        },
        (1, 32, 32),
    ),
    "DenseNet121": (PLAIN, (1, 64, 64)),
    "SEResNet50": ({"spatial_dims": 2, "in_channels": 3, "num_classes": 3}, (3, 64, 64)),
    "ResNet": (
        {
            "block": "basic",
            "layers": (2, 2, 2, 2),
            "block_inplanes": (8, 16, 32, 64),
            "spatial_dims": 2,
            "n_input_channels": 1,
            "num_classes": 3,
        },
        (1, 64, 64),
    ),
    "EfficientNetBN": (
        {"model_name": "efficientnet-b0", "spatial_dims": 2, "in_channels": 3, "num_classes": 3, "pretrained": False},
        (3, 64, 64),
    ),
    "FlexibleUNet": ({"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"}, (3, 64, 64)),
    "AHNet": ({"layers": (2, 2, 2, 2), "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "psp_block_num": 2}, (1, 64, 64)),
    "AutoEncoder": ({**PLAIN, "channels": (8, 16), "strides": (2, 2), "num_res_units": 1}, (1, 32, 32)),
    "VarAutoEncoder": (
        {"spatial_dims": 2, "in_shape": (1, 32, 32), "out_channels": 1, "latent_size": 4, "channels": (8, 16), "strides": (2, 2)},
        (1, 32, 32),
    ),
    "Regressor": ({"in_shape": (1, 32, 32), "out_shape": (2,), "channels": (8, 16), "strides": (2, 2)}, (1, 32, 32)),
    "Classifier": ({"in_shape": (1, 32, 32), "classes": 3, "channels": (8, 16), "strides": (2, 2)}, (1, 32, 32)),
    "Discriminator": ({"in_shape": (1, 32, 32), "channels": (8, 16), "strides": (2, 2)}, (1, 32, 32)),
    "Generator": ({"latent_shape": (12,), "start_shape": (8, 4, 4), "channels": (8, 1), "strides": (2, 2)}, (12,)),
    "FullyConnectedNet": ({"in_channels": 8, "out_channels": 2, "hidden_channels": (16, 16), "dropout": 0.1}, (8,)),
    "MedNeXtS": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, (1, 64, 64)),
    "VoxelMorphUNet": (
        {"spatial_dims": 2, "in_channels": 2, "unet_out_channels": 8, "channels": (8, 16, 16, 8), "final_conv_channels": (8,)},
        (2, 32, 32),
    ),
    "AutoencoderKL": (
        {
            **PLAIN,
            "out_channels": 1,
            "channels": (8, 16),
            "num_res_blocks": (1, 1),
            "attention_levels": (False, True),
            "latent_channels": 4,
            "norm_num_groups": 4,
        },
        (1, 32, 32),
    ),
    "VQVAE": (
        {**PLAIN, "out_channels": 1, "channels": (8, 16), "num_res_layers": 1, "num_res_channels": (8, 16), **RESAMPLED},
        (1, 32, 32),
    ),
    "PatchDiscriminator": ({"spatial_dims": 2, "channels": 8, "in_channels": 1}, (1, 64, 64)),
}


# torchaudio


def torchaudio_cases() -> Iterator[Case]:
    for name, (arguments, inputs) in TORCHAUDIO.items():
        yield Case(
            "torchaudio",
            name,
            lambda name=name, arguments=arguments: _build("torchaudio.models", name, arguments, "cpu"),
            lambda _, i=inputs: i(),
        )


def lengths(value: int) -> torch.Tensor:
    return torch.full((BATCH,), value)


def _waves(**options: Any) -> dict[str, Any]:
    return {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [(32, 10, 5), (32, 3, 2)],
        "extractor_conv_bias": False,
        "encoder_embed_dim": 32,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": 64,
        "encoder_ff_interm_dropout": 0.1,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
        **options,
    }


TORCHAUDIO: dict[str, tuple[dict[str, Any], Callable[[], Inputs]]] = {
    "Conformer": (
        {"input_dim": 32, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "depthwise_conv_kernel_size": 5},
        lambda: (zeros(20, 32), lengths(20)),
    ),
    "ConvTasNet": ({"enc_num_feats": 16, "msk_num_feats": 8, "msk_num_hidden_feats": 16}, lambda: zeros(1, 400)),
    "DeepSpeech": ({"n_feature": 20, "n_hidden": 16}, lambda: zeros(1, 30, 20)),
    "Emformer": (
        {"input_dim": 32, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "segment_length": 4, "right_context_length": 1},
        lambda: (zeros(17, 32), lengths(17)),
    ),
    "Wav2Letter": ({"input_type": "mfcc", "num_features": 20, "num_classes": 10}, lambda: zeros(20, 100)),
    "WaveRNN": (
        {"upsample_scales": [2, 2], "n_classes": 8, "hop_length": 4, "n_freq": 10, "n_rnn": 16, "n_fc": 16},
        lambda: (zeros(1, 24), zeros(1, 10, 10)),
    ),
    "wav2vec2_model": (_waves(aux_num_out=None), lambda: zeros(800)),
    "hubert_pretrain_model": (
        _waves(
            mask_prob=0.8,
            mask_selection="static",
            mask_other=0.0,
            mask_length=2,
            no_mask_overlap=False,
            mask_min_space=1,
            mask_channel_prob=0.0,
            mask_channel_selection="static",
            mask_channel_other=0.0,
            mask_channel_length=2,
            no_mask_channel_overlap=False,
            mask_channel_min_space=1,
            skip_masked=False,
            skip_nomask=False,
            num_classes=10,
            final_dim=8,
            feature_grad_mult=0.1,
        ),
        lambda: (zeros(800), ids(79)),
    ),
    "hdemucs_low": ({"sources": ["a", "b"]}, lambda: zeros(2, 44100)),
    "squim_objective_base": ({}, lambda: zeros(16000)),
    "squim_subjective_base": ({}, lambda: (zeros(16000), zeros(16000))),
    "Tacotron2": ({}, lambda: (ids(12), lengths(12), zeros(80, 4), lengths(4))),
}


# torchvision

TORCHVISION = {
    "r3d_18": (3, 8, 56, 56),
    "mc3_18": (3, 8, 56, 56),
    "r2plus1d_18": (3, 8, 56, 56),
    "s3d": (3, 16, 112, 112),
    "mvit_v1_b": (3, 16, 224, 224),
    "mvit_v2_s": (3, 16, 224, 224),
    "swin3d_t": (3, 8, 64, 64),
    "fasterrcnn_resnet50_fpn": (),
    "fasterrcnn_mobilenet_v3_large_fpn": (),
    "retinanet_resnet50_fpn_v2": (),
    "fcos_resnet50_fpn": (),
    "ssd300_vgg16": (),
    "ssdlite320_mobilenet_v3_large": (),
    "maskrcnn_resnet50_fpn": (),
    "keypointrcnn_resnet50_fpn": (),
    "raft_small": (3, 128, 128),
}


def torchvision_cases() -> Iterator[Case]:
    for name, shape in TORCHVISION.items():
        device = "meta" if shape else "cpu"
        yield Case(
            "torchvision",
            name,
            lambda name=name, device=device: build_model(f"torchvision:{name}", device=device),
            lambda _, n=name: _pictures(n),
        )


def _pictures(name: str) -> Inputs:
    shape = TORCHVISION[name]
    if name.startswith("raft"):
        return (zeros(*shape), zeros(*shape))
    return zeros(*shape) if shape else ([torch.rand(3, 96, 96), torch.rand(3, 96, 96)],)
