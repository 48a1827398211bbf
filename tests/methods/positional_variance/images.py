"""Images with the statistics of natural ones, made here, and the small models that read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
SIZE = 64
_HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 16,
}


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A timm vision transformer of one block on 64 x 64 images."""
    return timm.create_model(name, **{"img_size": SIZE, "depth": 1, **options})


# name -> (model, positional parameter, prefix tokens among those that it is added to)
MODELS: dict[str, tuple[Any, str, int]] = {
    "vit": (vit, "pos_embed", 1),
    "average pooling": (lambda: vit(class_token=False, global_pool="avg"), "pos_embed", 0),
    "registers": (lambda: vit(reg_tokens=4), "pos_embed", 5),
    "registers, positions before": (lambda: vit("vit_small_patch14_reg4_dinov2", patch_size=16), "pos_embed", 0),
    "distilled": (lambda: vit("deit_tiny_distilled_patch16_224"), "pos_embed", 2),
    "deit3": (lambda: vit("deit3_small_patch16_224"), "pos_embed", 0),
    "beit": (lambda: vit("beit_base_patch16_224", use_abs_pos_emb=True), "pos_embed", 1),
    "eva": (lambda: vit("eva02_tiny_patch14_224", patch_size=16), "pos_embed", 1),
    "torchvision": (lambda: torchvision.models.VisionTransformer(SIZE, 16, 1, 2, 32, 64), "encoder.pos_embedding", 1),
    "transformers": (lambda: ViTModel(ViTConfig(**_HF)), "embeddings.position_embeddings", 1),
    "transformers clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**_HF)), "embeddings.position_embedding.weight", 1),
    "transformers dinov2": (lambda: Dinov2Model(Dinov2Config(**_HF)), "embeddings.position_embeddings", 1),
}


def normal_images(count: int, size: int | tuple[int, int] = SIZE) -> Tensor:
    """White noise of zero mean and unit variance: independent images under a normalization that fits them."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width)


def pictures(count: int = 32, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """8-bit images whose spectrum falls as 1 / f, with ImageNet's mean and standard deviation per channel, (H, W, 3)."""
    numbers = np.random.default_rng(seed)
    frequency = np.fft.fftfreq(SIZE)
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = np.inf
    waves = np.fft.ifft2(np.fft.fft2(numbers.standard_normal((count, 3, SIZE, SIZE))) / radius).real
    waves /= waves.std((2, 3), keepdims=True)
    scaled = waves * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    return list((scaled.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


PICTURES = pictures()


class Pictures(Dataset[Any]):
    """Arrays or PIL images through a transform, with labels; albumentations' transforms take the image by name."""

    def __init__(self, transform: Any = None) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        if type(self.transform).__module__.startswith("albumentations"):
            return self.transform(image=PICTURES[index])["image"], index % 10
        image = Image.fromarray(PICTURES[index])
        return image if self.transform is None else self.transform(image), index % 10
