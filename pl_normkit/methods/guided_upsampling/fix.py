"""`add_guided_upsampling`: a deformable kernel network behind the last upsampling of a network that reads one image."""

from __future__ import annotations

__all__ = ["add_guided_upsampling"]

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import DataError
from pl_normkit.methods.guided_upsampling.modules import DeformableKernelNetwork
from pl_normkit.surgery import AttachAfter, Changes, apply_edits

CHILD = "guided_upsampling"


def add_guided_upsampling(model: nn.Module, *, fast: bool = True, residual: bool = True) -> Changes:
    """Let a `DeformableKernelNetwork` sharpen the output of a segmentation or depth network by the network's own input image.

    The output is upsampled to the image's size where it is smaller (bicubic), and filtered channel by channel. Networks of
    segmentation-models-pytorch and torchvision are served, and any other that takes an image (N, 3, H, W) first and returns a map
    (N, C, h, w), alone or as "out" of a dict. New parameters stand under `guided_upsampling`; all other keys stay. Train on: the
    function changes.

    Args:
        model: edited in place.
        fast: FDKN; else DKN, which is slower by far.
        residual: as for `JointFilter`.

    Raises:
        EditError: when the model has one already. A call with other inputs or outputs raises DataError.

    Source: the filter: arXiv 1910.08373; putting it behind another network by a hook is ours.

    >>> import segmentation_models_pytorch as smp, torch
    >>> model = smp.Unet("resnet18", encoder_weights=None, classes=2)
    >>> changes = add_guided_upsampling(model)
    >>> tuple(model(torch.rand(1, 3, 64, 64)).shape)
    (1, 2, 64, 64)
    """
    network = DeformableKernelNetwork(fast=fast, residual=residual)
    first = next(model.parameters(), None)
    if first is not None:
        network.to(first.device, first.dtype if first.is_floating_point() else None)
    return apply_edits(model, [AttachAfter("", CHILD, network, f"{'F' if fast else ''}DKN behind the output", _sharpen)])


def _sharpen(host: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> Any:
    image = arguments[0] if arguments else next(iter(keywords.values()), None)
    if isinstance(output, Mapping):
        return {**output, "out": _filtered(host, image, output.get("out"))}
    return _filtered(host, image, output)


def _filtered(host: nn.Module, image: Any, target: Any) -> Tensor:
    if not (isinstance(image, Tensor) and isinstance(target, Tensor) and image.dim() == target.dim() == 4):
        seen = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in (image, target)]
        raise DataError("guided upsampling needs an image (N, 3, H, W) and a map (N, C, h, w)", evidence=f"{seen[0]} and {seen[1]}")
    if target.shape[2:] != image.shape[2:]:
        target = F.interpolate(target, image.shape[2:], mode="bicubic", align_corners=False)
    return host.get_submodule(CHILD)(image, target)  # type: ignore[no-any-return]
