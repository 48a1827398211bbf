"""What is said of a network and its data before the first step."""

from __future__ import annotations

__all__ = ["require_size", "warn_cut_patches", "warn_normalization"]

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ModelSpecError, NormkitWarning
from pl_normkit.preserve import preserved
from pl_normkit.recipes.vit.samples import Normalization


@torch.no_grad()
def require_size(network: nn.Module, images: Tensor) -> None:
    """Raise ModelSpecError where `network` fails on `images` (N, channels, S, S)."""
    try:
        with preserved(network, buffers=True):
            network.eval()(images)
    except Exception as error:
        own = (getattr(network, "pretrained_cfg", None) or {}).get("input_size")
        side = f"; its weights were made at {own[-1]}" if own else ""
        raise ModelSpecError(
            f"{type(network).__name__} fails on images of {images.shape[-2]} x {images.shape[-1]} pixels",
            where=f"--data.image_size {images.shape[-1]}",
            evidence=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            fix=f"take another --data.image_size, or --model.options that fit this one{side}",
        ) from error


def warn_cut_patches(network: nn.Module, size: int) -> None:
    """Warn where the patches of `network` do not cover images of `size` pixels a side: timm lets the last pixels go without a word."""
    embedding = getattr(network, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embedding, "dynamic_img_pad", False):
        return
    left = size % patch[-1]
    if left:
        text = f"no patch holds the last {left} of the {size} pixels of a side; take an --data.image_size that {patch[-1]} divides"
        warnings.warn(text, NormkitWarning, stacklevel=2)


def warn_normalization(network: nn.Module, normalization: Normalization) -> None:
    """Warn where images are normalized otherwise than those on which timm's weights of `network` were trained."""
    known: dict[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    trained = {name: tuple(known.get(name) or ()) for name in ("mean", "std")}
    given = {"mean": normalization.mean, "std": normalization.std}
    if all(len(trained[name]) == len(given[name]) for name in given) and any(
        abs(own - other) > 1e-3 for name in given for own, other in zip(given[name], trained[name], strict=True)
    ):
        options = " ".join(f"--data.{name} {list(values)}" for name, values in trained.items())
        text = f"the pretrained weights know images normalized otherwise than the data is; give them {options}"
        warnings.warn(text, NormkitWarning, stacklevel=2)
