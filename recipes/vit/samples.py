"""From stored images to batches: augmentation that keeps the variance of the input, normalization, collation."""

from __future__ import annotations

__all__ = ["Augment", "CollateImages", "ImageDataset", "ImageSource", "Normalization", "fit_normalization"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from pl_normkit.errors import DataError

Item = tuple[Tensor, int] | tuple[Tensor, str]


class ImageSource(ABC):
    """Indexed images with labels, as they are stored."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read(self, index: int) -> tuple[Tensor, int]:
        """Image (channels, H, W) uint8 and the index of its class, -1 for none. Raises DataError when it cannot be read."""

    def name(self, index: int) -> str:
        """A name for the image, unique within the source."""
        return str(index)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def undo(self, images: Tensor) -> Tensor:
        """Normalized images (N, channels, H, W) back to uint8."""
        shape = (1, -1, 1, 1)
        restored = images.cpu().float() * torch.tensor(self.std).view(shape) + torch.tensor(self.mean).view(shape)
        return (restored.clamp(0, 1) * 255).round().to(torch.uint8)


def fit_normalization(source: ImageSource, count: int = 2000) -> Normalization:
    """Statistics of `count` images spread over `source`: after it, mean 0 and second moment 1 in every channel."""
    indices = range(0, len(source), max(len(source) // count, 1))
    moments = torch.stack([_moments(source.read(index)[0]) for index in indices]).mean(0)
    mean, square = moments.unbind(0)
    std = (square - mean**2).clamp(min=1e-8).sqrt()
    return Normalization(tuple(mean.tolist()), tuple(std.tolist()))


def _moments(image: Tensor) -> Tensor:
    pixels = image.double().flatten(1) / 255
    return torch.stack([pixels.mean(1), (pixels**2).mean(1)])


@dataclass(frozen=True)
class Augment:
    """Random resized crop, flip, brightness and contrast jitter, and erasing with noise of unit variance.

    Attributes:
        scale: range of the share of the image that the crop keeps.
        flip: probability of a horizontal flip.
        jitter: largest relative change of brightness and of contrast.
        erase: probability of erasing a rectangle. It comes after normalization and fills in one normal draw a pixel, which
            keeps the second moment of a normalized image; a constant would shrink it (arXiv 2405.14115).
    """

    scale: tuple[float, float] = (0.6, 1.0)
    flip: float = 0.5
    jitter: float = 0.2
    erase: float = 0.25

    def build(self, size: int, normalization: Normalization) -> v2.Compose:
        """The transform of a stored image (channels, H, W) uint8 to (channels, size, size)."""
        steps: list[v2.Transform] = [v2.RandomResizedCrop(size, scale=self.scale, interpolation=_BICUBIC, antialias=True)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.jitter:
            steps.append(v2.ColorJitter(brightness=self.jitter, contrast=self.jitter))
        steps += _normalize(normalization)
        if self.erase:
            steps.append(v2.RandomErasing(self.erase, value="random"))
        return v2.Compose(steps)


_BICUBIC = v2.InterpolationMode.BICUBIC


def plain_transform(size: int, normalization: Normalization) -> v2.Compose:
    """For evaluation: the shorter side to `size`, the centre of the longer one."""
    return v2.Compose([v2.Resize(size, interpolation=_BICUBIC, antialias=True), v2.CenterCrop(size), *_normalize(normalization)])


def _normalize(normalization: Normalization) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(normalization.mean), list(normalization.std))]


class ImageDataset(Dataset[Item | DataError]):
    """Transformed images with their labels, or with their names.

    A DataError comes back as the item: raised inside a loader worker, its text would carry the worker's traceback.
    """

    def __init__(self, source: ImageSource, transform: Callable[[Tensor], Tensor], *, named: bool = False) -> None:
        self.source = source
        self.transform = transform
        self.named = named

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item | DataError:
        try:
            stored, label = self.source.read(index)
        except DataError as error:
            return error
        image = self.transform(stored)
        return (image, self.source.name(index)) if self.named else (image, label)


class CollateImages:
    """Stack items to images (N, channels, H, W) and labels (N,) or names; `mix` acts on the batch, such as CutMix."""

    def __init__(self, mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> None:
        self.mix = mix

    def __call__(self, items: Sequence[Item | DataError]) -> tuple[Tensor, Tensor | list[str]] | DataError:
        found: list[Item] = []
        for item in items:
            if isinstance(item, DataError):
                return item
            found.append(item)
        images, labels = default_collate(found)
        return self.mix(images, labels) if self.mix is not None else (images, labels)
