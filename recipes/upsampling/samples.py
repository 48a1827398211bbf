"""From an image and its map to batches: reduction, enlargement, scaling, crops and collation."""

from __future__ import annotations

__all__ = ["Batch", "MapSource", "Sample", "Task", "UpsamplingDataset", "collate"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pl_normkit.errors import DataError
from pl_normkit.recipes.upsampling.resample import Reduction, enlarge, fill_unknown, reduce_map

_DRAWS = 20


class Batch(NamedTuple):
    """What the network gets, and what it is judged by.

    Attributes:
        guidance: (N, 3, H, W) in [0, 1].
        start: (N, C, H, W), the coarse map enlarged by bicubic interpolation, scaled to about [0, 1].
        coarse: (N, C, h, w) in units of the data.
        truth: (N, C, H, W) in units of the data, NaN where unknown; all of it where there is no truth.
        shift: (N, 1, 1, 1); units of the data are start * span + shift.
        span: (N, 1, 1, 1).
        names: one a sample.
        groups: what a score is averaged over, one a sample.
    """

    guidance: Tensor
    start: Tensor
    coarse: Tensor
    truth: Tensor
    shift: Tensor
    span: Tensor
    names: list[str]
    groups: list[str]


class Sample(NamedTuple):
    """An image (3, H, W) uint8 with its map (C, H, W), NaN where unknown; or with a coarse map alone, whose size is smaller."""

    image: Tensor
    map: Tensor


class MapSource(ABC):
    """Indexed images with maps."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A name, unique within the source, usable as a relative file name without suffix."""

    def group(self, index: int) -> str:
        """What the sample's score is averaged with."""
        return "all"

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Raises DataError when it cannot be read."""


@dataclass(frozen=True)
class Task:
    """What is to be undone.

    Attributes:
        factor: how many times larger the fine map is.
        how: how the coarse map was made.
        is_labels: whether maps are shares of classes; else each map is scaled by the range of its coarse one.
    """

    factor: int
    how: Reduction
    is_labels: bool = False

    def __str__(self) -> str:
        return f"x{self.factor}, {self.how} reduction"

    def reduce(self, sample: Sample, where: str) -> tuple[Tensor, Tensor, Tensor]:
        """Guidance, coarse map and truth, cut to a multiple of the factor at the bottom and the right. Raises DataError."""
        height, width = (side - side % self.factor for side in sample.map.shape[-2:])
        if min(height, width) < 2 * self.factor:
            evidence = f"{sample.map.shape[-1]} x {sample.map.shape[-2]} pixels at x{self.factor}"
            raise DataError("a map is too small to be reduced", where=where, evidence=evidence, fix="take a smaller --data.factor")
        guidance, truth = sample.image[..., :height, :width], sample.map[..., :height, :width]
        return guidance, reduce_map(fill_unknown(truth), self.factor, self.how), truth

    def range(self, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and span of a coarse map."""
        if self.is_labels:
            return torch.tensor(0.0), torch.tensor(1.0)
        low, high = coarse.amin(), coarse.amax()
        return low, torch.where(high > low, high - low, 1.0)


class UpsamplingDataset(Dataset[Batch | DataError]):
    """Batches of one; a DataError comes back as the item.

    Args:
        source: of the samples.
        task: what is to be undone.
        crop_size: side of a random crop, None for the whole image.
        flip, jitter: see `RecipeData`; with a crop only.
        has_truth: whether maps are fine ones; else they are coarse, and nothing judges the result.
    """

    def __init__(
        self, source: MapSource, task: Task, crop_size: int | None = None, flip: float = 0, jitter: float = 0, has_truth: bool = True
    ) -> None:
        self.source, self.task, self.crop_size = source, task, crop_size
        self.flip, self.jitter, self.has_truth = flip, jitter, has_truth

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch | DataError:
        try:
            return self._build(self.source.read(index), self.source.name(index), self.source.group(index))
        except DataError as error:
            return error

    def _build(self, sample: Sample, name: str, group: str) -> Batch:
        if self.crop_size is not None:
            sample = self._crop(sample, self.crop_size, name)
        if self.has_truth:
            image, coarse, truth = self.task.reduce(sample, name)
        else:
            image, coarse = sample.image, fill_unknown(sample.map)
            truth = coarse.new_full((len(coarse), *image.shape[-2:]), torch.nan)
        guidance = image.float() / 255
        if self.crop_size is not None and self.jitter:
            brightness, contrast = (1 + self.jitter * (2 * torch.rand(2) - 1)).tolist()
            guidance = ((guidance - guidance.mean()) * contrast + guidance.mean() * brightness).clamp(0, 1)
        shift, span = self.task.range(coarse)
        start = (enlarge(coarse, (image.shape[-2], image.shape[-1])) - shift) / span
        scale = shift.view(1, 1, 1, 1), span.view(1, 1, 1, 1)
        return Batch(guidance[None], start[None], coarse[None], truth[None], *scale, [name], [group])

    def _crop(self, sample: Sample, side: int, where: str) -> Sample:
        height, width = sample.map.shape[-2:]
        if min(height, width) < side:
            evidence = f"{width} x {height} pixels, crops of {side}"
            raise DataError("an image is smaller than the crop", where=where, evidence=evidence, fix="take a smaller --data.crop_size")
        for _ in range(_DRAWS):
            top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
            pieces = [part[..., top : top + side, left : left + side] for part in sample]
            if bool(pieces[1].isfinite().any()):
                return Sample(*(piece.flip(-1) for piece in pieces)) if torch.rand(()) < self.flip else Sample(*pieces)
        raise DataError(f"{_DRAWS} random crops of a map have no known pixel", where=where, fix="take a larger --data.crop_size")


def collate(items: Sequence[Batch | DataError]) -> Batch | DataError:
    """Batches of one size to one."""
    batches = []
    for item in items:
        if isinstance(item, DataError):
            return item
        batches.append(item)
    return Batch(
        torch.cat([batch.guidance for batch in batches]),
        torch.cat([batch.start for batch in batches]),
        torch.cat([batch.coarse for batch in batches]),
        torch.cat([batch.truth for batch in batches]),
        torch.cat([batch.shift for batch in batches]),
        torch.cat([batch.span for batch in batches]),
        [name for batch in batches for name in batch.names],
        [group for batch in batches for group in batch.groups],
    )
