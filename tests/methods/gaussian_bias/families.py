"""A tiny model of each family: two layers, random weights everywhere (libraries start some of them at zero)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import PatchMerging, PatchMergingV2, SwinTransformer, SwinTransformerBlock, SwinTransformerBlockV2

from pl_normkit.nn import GaussianAttentionBias

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
SWIN: dict[str, Any] = {
    "img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 5, "mlp_ratio": 1.0,
}  # fmt: skip


class Logits(nn.Module):
    """A classifier of transformers as a function from images to logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).logits


def hugging_face(implementation: str) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=32, patch_size=8, num_labels=5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=implementation,
    )  # fmt: skip
    return Logits(ViTForImageClassification(config))


def torchvision_swin(version: int) -> nn.Module:
    block, merging = ((SwinTransformerBlock, PatchMerging), (SwinTransformerBlockV2, PatchMergingV2))[version - 1]
    return SwinTransformer(
        [4, 4], 16, [2, 1], [2, 4], [4, 4], mlp_ratio=1.0, stochastic_depth_prob=0.0, num_classes=5, block=block, downsample_layer=merging
    )


class PlainAttention(nn.Module):
    """Attention of a user's own, without a mask argument."""

    def __init__(self, width: int, heads: int, fused: bool, folded: bool = False) -> None:
        super().__init__()
        self.num_heads = heads
        self.fused = fused
        self.folded = folded
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.folded:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.reshape(batch, self.num_heads, length, -1).transpose(1, 2).reshape(batch, length, width))


class PlainViT(nn.Module):
    """A vision transformer of a user's own; `attention` makes its layers."""

    def __init__(self, attention: Callable[[], nn.Module], prefix: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 32))
        self.position = nn.Parameter(torch.randn(1, 16 + prefix, 32))
        self.layers = nn.ModuleList([attention() for _ in range(2)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1) + self.position
        for layer in self.layers:
            x = x + (layer(self.norm(x)) if not isinstance(layer, nn.MultiheadAttention) else self._multihead(layer, self.norm(x)))
        return self.head(self.norm(x).mean(1))

    def _multihead(self, layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
        x = x if layer.batch_first else x.transpose(0, 1)
        y = layer(x, x, x, need_weights=False)[0]
        return y if layer.batch_first else y.transpose(0, 1)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**(SWIN if "swin" in name else VIT), **options})


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": of_timm("vit_tiny_patch16_224"),
    "vit_rectangular": of_timm("vit_tiny_patch16_224", img_size=(32, 64)),
    "vit_average": of_timm("vit_tiny_patch16_224", class_token=False, global_pool="avg"),
    "vit_parallel": of_timm("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock),
    "vit_registers": of_timm("vit_small_patch14_reg4_dinov2"),
    "vit_siglip": of_timm("vit_base_patch16_siglip_224"),
    "deit_distilled": of_timm("deit_tiny_distilled_patch16_224"),
    "deit3": of_timm("deit3_small_patch16_224"),
    "beit": of_timm("beit_base_patch16_224"),
    "beit_shared": of_timm("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "eva": of_timm("eva02_tiny_patch14_224"),
    "dinov3": of_timm("vit_small_patch16_dinov3"),
    "relpos": of_timm("vit_relpos_small_patch16_224"),
    "relpos_class": of_timm("vit_relpos_base_patch16_clsgap_224"),
    "srelpos": of_timm("vit_srelpos_small_patch16_224"),
    "swin": of_timm("swin_tiny_patch4_window7_224"),
    "swin_v2": of_timm("swinv2_tiny_window8_256"),
    "torchvision_vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 32, num_classes=5),
    "torchvision_swin": lambda: torchvision_swin(1),
    "torchvision_swin_v2": lambda: torchvision_swin(2),
    "transformers_sdpa": lambda: hugging_face("sdpa"),
    "transformers_eager": lambda: hugging_face("eager"),
}
"""Models whose attention is known without a trace."""

OWN: dict[str, Callable[[], nn.Module]] = {
    "own_fused": lambda: PlainViT(lambda: PlainAttention(32, 4, fused=True)),
    "own_unfused": lambda: PlainViT(lambda: PlainAttention(32, 4, fused=False)),
    "own_multihead": lambda: PlainViT(lambda: nn.MultiheadAttention(32, 4, batch_first=True), prefix=3),
    "own_multihead_seq": lambda: PlainViT(lambda: nn.MultiheadAttention(32, 4)),
}
"""Models that need a trace."""


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model in eval mode with every weight random, and a batch of two images."""
    torch.manual_seed(0)
    model = {**FAMILIES, **OWN}[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    size = (32, 64) if name == "vit_rectangular" else (64, 64) if "swin" in name else (32, 32)
    return model, torch.randn(2, 3, *size)


def biases(model: nn.Module) -> list[GaussianAttentionBias]:
    return [module for module in model.modules() if isinstance(module, GaussianAttentionBias)]
