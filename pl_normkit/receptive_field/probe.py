"""The measurement: averaged input gradients of one unit, exact for each image, in batches."""

from __future__ import annotations

__all__ = ["effective_receptive_field"]

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.preserve import preserved
from pl_normkit.receptive_field.field import ReceptiveField
from pl_normkit.receptive_field.units import Unit, find_unit
from pl_normkit.wrappers import unwrapped

_IMAGE_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x")


def effective_receptive_field(
    model: nn.Module,
    loader: Iterable[Any] | Tensor,
    layer: str | None = None,
    position: tuple[int, int] | None = None,
    *,
    max_images: int | None = None,
    gradient: Literal["positive", "absolute"] = "positive",
    batch_size: int = 16,
) -> ReceptiveField:
    """The map of input pixels that drive one unit: for each image the gradient of the unit's mean over channels, averaged over
    colour channels, then clamped at 0; summed over images, normalized to sum 1.

    The model runs in evaluation mode and is as before afterwards; parameters may be frozen and get no gradient.

    Args:
        model: takes images (N, C, H, W); gives a map (N, C, H, W) or (N, H, W, C), tokens (N, T, C), class scores, or a
            container whose first such tensor counts. On any device but meta.
        loader: batches: tensors, sequences or mappings that hold images; also a tensor (N, C, H, W) or a dataset.
            All images must have one size.
        layer: module path. Default: the output where it is a map (a segmentation network's logits), else a timm model's
            `forward_features`, else the last map that a module gives.
        position: (y, x) in the cells of that map, tokens without the prefix ones. Default: (h // 2, w // 2) of a map with
            channels first, the upper left of the middle 2x2 for tokens and channels-last maps of even size (OpenERF's rules).
        max_images: stop after so many; None takes all.
        gradient: "positive" clamps at 0 as OpenERF does, "absolute" takes magnitudes.
        batch_size: images per backward pass, whatever the loader's batches.

    Raises:
        ConfigError: for an unknown layer, a position outside the map, an output that is no map, a bad option.
        DataError: for an empty loader, batches without images, images of several sizes, gradients that are not finite.

    Source: OpenERF for backbones; for logits derived from it (the definition of arXiv 2307.14179 is not known to us).

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    >>> field = effective_receptive_field(model, torch.rand(2, 3, 9, 9), layer="1", gradient="absolute")
    >>> int((field.map > 0).sum())
    25
    """
    _check_options(max_images, gradient, batch_size)
    model = unwrapped(model)
    with preserved(model, buffers=True), torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        total: Tensor | None = None
        unit: Unit | None = None
        count, memory_format = 0, torch.contiguous_format
        for images in _batches(loader, max_images, batch_size, *_home_of(model)):
            if total is not None and total.shape != images.shape[2:]:
                raise DataError(
                    "the images have several sizes, whose maps cannot be added",
                    evidence=f"{tuple(total.shape)} and {tuple(images.shape[2:])}",
                    fix="resize or crop them to one size",
                )
            if unit is None:
                unit, memory_format = _find_unit(model, images[:1], layer, position)
            images = images.contiguous(memory_format=memory_format)
            summed = _summed_gradient(model, unit, images, gradient, count)
            total = summed if total is None else total + summed
            count += len(images)
    if total is None or unit is None:
        raise DataError("there are no images", where="loader", fix="give at least one")
    mass = float(total.sum())
    return ReceptiveField(total / mass if mass > 0 else torch.zeros_like(total), unit.layer, unit.grid, unit.position, count)


def _find_unit(model: nn.Module, images: Tensor, layer: str | None, position: tuple[int, int] | None) -> tuple[Unit, torch.memory_format]:
    """The unit, and the faster memory format that the model takes: on a CPU channels-last, unless it looks at its input as contiguous."""
    if images.device.type == "cpu":
        try:
            last = images.clone(memory_format=torch.channels_last).requires_grad_()
            return find_unit(model, last, layer, position), torch.channels_last
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
    return find_unit(model, images.clone().requires_grad_(), layer, position), torch.contiguous_format


def _summed_gradient(model: nn.Module, unit: Unit, images: Tensor, gradient: str, before: int) -> Tensor:
    """Sum over images of each one's map. Images do not mix in evaluation mode, so one backward pass gives all gradients."""
    images = images.detach().requires_grad_()
    values = unit.values(model, images)
    (grad,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
    if grad is None:
        raise ConfigError(f"the unit at {unit.position} of {unit.layer or 'the output'} does not depend on the image")
    maps = grad.to(torch.promote_types(grad.dtype, torch.float32)).mean(1)
    if not bool(maps.isfinite().all()):
        first = int((~maps.isfinite().flatten(1).all(1)).nonzero()[0])
        raise DataError("the gradient is not finite", where=f"image {before + first}", fix="look for NaN in the image or in the weights")
    maps = maps.abs() if gradient == "absolute" else maps.clamp(min=0)
    return maps.sum(0).to("cpu", torch.float64)


def _check_options(max_images: int | None, gradient: str, batch_size: int) -> None:
    if gradient not in ("positive", "absolute"):
        raise ConfigError(f"gradient {gradient!r} is not known", fix='"positive" or "absolute"')
    for name, value in (("max_images", max_images), ("batch_size", batch_size)):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} must be a positive whole number", evidence=repr(value))


def _home_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the images must be: device and floating dtype of the model's first tensor."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    if tensors and tensors[0].is_meta:
        raise ConfigError("a model on the meta device has no weights to measure", fix="build it on the CPU or a GPU")
    return (tensors[0].device, tensors[0].dtype) if tensors else (torch.device("cpu"), torch.float32)


def _batches(loader: Iterable[Any], limit: int | None, batch_size: int, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Images (n, C, H, W), n <= batch_size, at most `limit` of them in all; neighbours of one size share a batch."""
    waiting: list[Tensor] = []
    for found in _each(loader, limit):
        image = found.detach().clone() if found.is_inference() else found.detach()
        if waiting and (len(waiting) == batch_size or waiting[0].shape != image.shape):
            yield torch.stack(waiting).to(device, dtype)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting).to(device, dtype)


def _each(loader: Iterable[Any], limit: int | None) -> Iterator[Tensor]:
    count = 0
    for batch in [loader] if isinstance(loader, Tensor) else loader:
        for image in _images_in(batch):
            yield image
            count += 1
            if count == limit:
                return


def _images_in(batch: Any) -> Tensor:
    """The images of a batch, (N, C, H, W); of a lone sample (C, H, W) too."""
    if isinstance(batch, Mapping):
        batch = next((batch[key] for key in _IMAGE_KEYS if isinstance(batch.get(key), Tensor)), batch)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    images = next((tensor for tensor in tensors if tensor.dim() in (3, 4) and tensor.is_floating_point()), None)
    if images is None:
        seen = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors) or f"a {type(batch).__name__}"
        raise DataError("a batch holds no images", where="loader", evidence=seen, fix="give floating-point images (N, C, H, W)")
    return images if images.dim() == 4 else images[None]
