"""Small models of libraries, and the forward of their blocks written by hand for each placement."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers as tf
from torch import Tensor, nn

Part = tuple[nn.Module, Callable[[Tensor], Tensor]]
Formula = Callable[[Tensor, Part, int, int], Tensor]
"""(stream, (norm, branch), number of the layer from 1, number of the branch in it from 0) -> stream."""

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}


def gpt2() -> tuple[nn.Module, Any]:
    config = tf.GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return tf.GPT2LMHeadModel(config), {"input_ids": torch.arange(16).reshape(2, 8) % 50, "use_cache": False}


def llama() -> tuple[nn.Module, Any]:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2))
    return model, {"input_ids": torch.arange(16).reshape(2, 8) % 50, "use_cache": False}


def bert() -> tuple[nn.Module, Any]:
    config = tf.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return tf.BertForSequenceClassification(config), {"input_ids": torch.arange(16).reshape(2, 8) % 50}


def hf_vit(dropout: float = 0.0) -> tuple[nn.Module, Any]:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = tf.ViTConfig(**sizes, image_size=16, patch_size=8, hidden_dropout_prob=dropout)
    return tf.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def timm_vit(**options: Any) -> tuple[nn.Module, Any]:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 4, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options), torch.randn(2, 3, 16, 16)


def rich_timm_vit() -> tuple[nn.Module, Any]:
    return timm_vit(init_values=0.1, drop_path_rate=0.2, proj_drop_rate=0.2)


def swin() -> tuple[nn.Module, Any]:
    sizes: dict[str, Any] = {"img_size": 28, "depths": (2, 1), "embed_dim": 8, "num_heads": (1, 2), "window_size": 7, "num_classes": 3}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes), torch.randn(2, 3, 28, 28)


def mixer() -> tuple[nn.Module, Any]:
    return timm.models.mlp_mixer.MlpMixer(img_size=16, patch_size=8, embed_dim=16, num_blocks=2, num_classes=3), torch.randn(2, 3, 16, 16)


def falcon() -> tuple[nn.Module, Any]:
    config = tf.FalconConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return tf.FalconForCausalLM(config), {"input_ids": torch.arange(16).reshape(2, 8) % 50, "use_cache": False}


def convnext(**options: Any) -> tuple[nn.Module, Any]:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3, **options)
    return model, torch.randn(2, 3, 32, 32)


def torch_encoder(norm_first: bool = True) -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(2, 6, 16)


PRE_NORM = {"gpt2": gpt2, "llama": llama, "timm": timm_vit, "rich timm": rich_timm_vit, "swin": swin, "torch": torch_encoder}


def doubled(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """In float64 and with values as after training: no scale of 1, no shift of 0. RMS norms that compute in float32 get torch's."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(16, eps=1e-6)
            model.get_submodule(path.rpartition(".")[0])._modules[path.rpartition(".")[2]] = norm
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    if isinstance(inputs, Tensor):
        return model, inputs.double()
    return model, {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in inputs.items()
    }


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    result: Tensor = found if isinstance(found, Tensor) else found.logits
    return result


def _parts(block: nn.Module, keywords: dict[str, Any]) -> list[Part] | None:
    b: Any = block
    match type(block).__name__:
        case "GPT2Block":
            return [(b.ln_1, lambda h: b.attn(h, attention_mask=keywords.get("attention_mask"))[0]), (b.ln_2, b.mlp)]
        case "LlamaDecoderLayer":
            return [(b.input_layernorm, lambda h: b.self_attn(hidden_states=h, **keywords)[0]), (b.post_attention_layernorm, b.mlp)]
        case "Block":
            return [(b.norm1, lambda h: b.drop_path1(b.ls1(b.attn(h)))), (b.norm2, lambda h: b.drop_path2(b.ls2(b.mlp(h))))]
        case "SwinTransformerBlock":
            return [(b.norm1, lambda h: b.drop_path1(b._attn(h))), (b.norm2, lambda h: b.drop_path2(b.mlp(h)))]
        case "TransformerEncoderLayer":
            return [(b.norm1, lambda h: b._sa_block(h, None, None)), (b.norm2, b._ff_block)]
    return None


def written_by_hand(model: nn.Module, formula: Formula) -> nn.Module:
    """The model, whose blocks now run `formula` for each of their branches."""
    layer = 0
    for block in model.modules():
        if _parts(block, {}) is None:
            continue
        layer += 1

        def forward(self: nn.Module, x: Tensor, *_: Any, _layer: int = layer, **keywords: Any) -> Tensor:
            for number, part in enumerate(_parts(self, keywords) or []):
                x = formula(x, part, _layer, number)
            return x

        block.forward = types.MethodType(forward, block)
    return model


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())
