"""From stored images and masks to batches: augmentation, normalization, padding and collation."""

from __future__ import annotations

__all__ = [
    "Augment",
    "CollateNamed",
    "CollatePairs",
    "PredictDataset",
    "Sample",
    "SampleSource",
    "SegmentationDataset",
    "crop_middle",
    "denormalize",
]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from pl_normkit.errors import DataError

Sample = tuple[Tensor, Tensor]
NamedSample = tuple[Tensor, str]

STRIDE = 32
"""Sides of a batch are padded to a multiple of this, the deepest output stride of the encoders."""

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class SampleSource(ABC):
    """Indexed images with masks, as they are stored."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A name for the sample, unique within the source, usable as a relative file name without suffix."""

    @abstractmethod
    def read_image(self, index: int) -> Tensor:
        """Image (3, H, W), uint8. Raises DataError when it cannot be read."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Image (3, H, W) uint8 and mask (H, W) int64. Raises DataError when one of them cannot be read."""


@dataclass(frozen=True)
class Augment:
    """Random scale, crop, horizontal flip and brightness / contrast jitter; drawn from torch's global generator.

    Attributes:
        crop_size: side of the square crop in pixels.
        scale: range of the random zoom.
        flip: probability of a horizontal flip.
        jitter: largest relative change of brightness and of contrast.
        ignore_index: mask value of the padding around an image smaller than the crop, and of what `transforms` bring in from outside.
        transforms: transforms of torchvision v2, between flip and jitter; the size of the crop must stay.
    """

    crop_size: int
    scale: tuple[float, float] = (0.75, 1.5)
    flip: float = 0.5
    jitter: float = 0.2
    ignore_index: int = 255
    transforms: Sequence[Callable[..., Any]] = ()

    def __call__(self, image: Tensor, mask: Tensor) -> Sample:
        """Image (3, H, W) float in [0, 1] and mask (H, W) int64 to (3, crop, crop) and (crop, crop)."""
        image, mask = self._zoom(image, mask)
        image, mask = self._crop(image, mask)
        if torch.rand(()).item() < self.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        for transform in self.transforms:
            image, mask = self._transform(transform, image, mask)
        contrast, brightness = (1 + self.jitter * (2 * torch.rand(2) - 1)).tolist()
        mean = image.mean()
        return ((image - mean) * contrast + mean * brightness).clamp(0, 1), mask

    def _transform(self, transform: Callable[..., Any], image: Tensor, mask: Tensor) -> Sample:
        from torchvision import tv_tensors

        # Geometric transforms fill masks with 0, which is a class: labels move up by one while they act.
        changed = transform(tv_tensors.Image(image), tv_tensors.Mask(mask + 1))
        labels = changed[1].as_subclass(Tensor).long() - 1
        if labels.shape != mask.shape:
            evidence = f"{type(transform).__name__}: {tuple(mask.shape)} became {tuple(labels.shape)}"
            raise DataError("a transform changes the size of the crop", where="--data.transforms", evidence=evidence, fix="leave it out")
        return changed[0].as_subclass(Tensor), labels.masked_fill(labels < 0, self.ignore_index)

    def _zoom(self, image: Tensor, mask: Tensor) -> Sample:
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        if factor == 1:
            return image, mask
        size = [max(round(side * factor), 1) for side in mask.shape]
        zoomed = F.interpolate(image[None], size, mode="bilinear", antialias=factor < 1)[0]
        labels = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        return zoomed, labels

    def _crop(self, image: Tensor, mask: Tensor) -> Sample:
        height, width = (max(side, self.crop_size) for side in mask.shape)
        image, mask = pad_to(image, (height, width), 0.5), pad_to(mask, (height, width), self.ignore_index)
        top = int(torch.randint(height - self.crop_size + 1, ()))
        left = int(torch.randint(width - self.crop_size + 1, ()))
        rows, columns = slice(top, top + self.crop_size), slice(left, left + self.crop_size)
        return image[:, rows, columns], mask[rows, columns]


def pad_to(tensor: Tensor, size: tuple[int, int], value: float) -> Tensor:
    """Pad the last two axes at the bottom and the right."""
    height, width = tensor.shape[-2:]
    return F.pad(tensor, (0, size[1] - width, 0, size[0] - height), value=value)


def crop_middle(image: Tensor, side: int) -> Tensor:
    """The middle square of an image (3, H, W); what it lacks becomes 0 at the bottom and the right."""
    top, left = (max((length - side) // 2, 0) for length in image.shape[-2:])
    return pad_to(image[:, top : top + side, left : left + side], (side, side), 0.0)


def normalize(image: Tensor) -> Tensor:
    """Image (3, H, W) in [0, 1] to zero mean and unit deviation by the ImageNet statistics every smp encoder expects."""
    return (image - _MEAN) / _STD


def denormalize(images: Tensor) -> Tensor:
    """Normalized images (N, 3, H, W) back to uint8."""
    return ((images.cpu() * _STD + _MEAN).clamp(0, 1) * 255).round().to(torch.uint8)


class SegmentationDataset(Dataset[Sample | DataError]):
    """Normalized images with masks.

    A DataError comes back as the item: raised inside a loader worker, its text would carry the worker's traceback.
    """

    def __init__(self, source: SampleSource, augment: Augment | None = None) -> None:
        self.source = source
        self.augment = augment

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | DataError:
        try:
            stored, mask = self.source.read(index)
        except DataError as error:
            return error
        image = stored.float() / 255
        if self.augment is not None:
            image, mask = self.augment(image, mask)
        return normalize(image), mask


class PredictDataset(Dataset[NamedSample | DataError]):
    """Normalized images with their names, no masks."""

    def __init__(self, source: SampleSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> NamedSample | DataError:
        try:
            return normalize(self.source.read_image(index).float() / 255), self.source.name(index)
        except DataError as error:
            return error


def _stack(tensors: Sequence[Tensor], value: float) -> Tensor:
    height, width = (-(-max(tensor.shape[axis] for tensor in tensors) // STRIDE) * STRIDE for axis in (-2, -1))
    return torch.stack([pad_to(tensor, (height, width), value) for tensor in tensors])


@dataclass(frozen=True)
class CollatePairs:
    """Stack samples to images (N, 3, H, W) and masks (N, H, W), padded to a common multiple of 32 with `ignore_index`."""

    ignore_index: int

    def __call__(self, items: Sequence[Sample | DataError]) -> Sample | DataError:
        samples = []
        for item in items:
            if isinstance(item, DataError):
                return item
            samples.append(item)
        return _stack([image for image, _ in samples], 0.0), _stack([mask for _, mask in samples], self.ignore_index)


class CollateNamed:
    """Stack named images to images (N, 3, H, W), names, and sizes (N, 2) as (height, width) before padding."""

    def __call__(self, items: Sequence[NamedSample | DataError]) -> tuple[Tensor, list[str], Tensor] | DataError:
        samples = []
        for item in items:
            if isinstance(item, DataError):
                return item
            samples.append(item)
        sizes = torch.tensor([image.shape[-2:] for image, _ in samples])
        return _stack([image for image, _ in samples], 0.0), [name for _, name in samples], sizes
