"""Images with boxes: for the classifier squashed to one size, for the segmenter with two label maps."""

from __future__ import annotations

__all__ = ["PAIR_VOID", "VOID", "BoxBatch", "BoxDataset", "BoxSource", "LabelledSource", "collate_boxes", "join_labels", "part_labels"]

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from pl_normkit.errors import DataError
from pl_normkit.recipes.boxes.annotations import Boxes
from pl_normkit.recipes.image_files import decode_picture
from pl_normkit.recipes.segmentation.samples import Sample, SampleSource, normalize

VOID = 255
"""A pixel that does not count, in either label map."""
PAIR_VOID = VOID * 256 + VOID


def join_labels(first: Tensor, second: Tensor) -> Tensor:
    """Two label maps, below 256, as one, so that a crop or a flip moves both alike."""
    return first.long() * 256 + second.long()


def part_labels(joined: Tensor) -> tuple[Tensor, Tensor]:
    """What `join_labels` joined.

    >>> part_labels(join_labels(torch.tensor([3, 255]), torch.tensor([4, 255])))
    (tensor([  3, 255]), tensor([  4, 255]))
    """
    return joined // 256, joined % 256


class BoxSource(SampleSource):
    """Indexed images with boxes. `read` gives masks where there are any, `VOID` everywhere else: they score, and train nothing."""

    @abstractmethod
    def read_boxes(self, index: int) -> Boxes:
        """Raises DataError when they cannot be used."""


class BoxBatch(NamedTuple):
    """Images of one size with their boxes.

    Attributes:
        images: (N, 3, side, side), normalized.
        boxes: one (K, 4) an image, in pixels of the squashed image.
        labels: one (K,) an image.
        indices: (N,) in the source.
    """

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    indices: Tensor


class BoxDataset(Dataset[BoxBatch | DataError]):
    """Batches of one, squashed to `side` x `side`: no padding, which the pool would take for background.

    Args:
        source: of the samples.
        side: of the squashed image in pixels.
        flip, jitter: of training; 0 for labels.
    """

    def __init__(self, source: BoxSource, side: int, flip: float = 0.0, jitter: float = 0.0) -> None:
        self.source, self.side, self.flip, self.jitter = source, side, flip, jitter

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> BoxBatch | DataError:
        try:
            stored, found = self.source.read_image(index), self.source.read_boxes(index)
        except DataError as error:
            return error
        height, width = stored.shape[-2:]
        image = F.interpolate(stored[None].float() / 255, (self.side, self.side), mode="bilinear", antialias=True)
        boxes = found.boxes * torch.tensor([self.side / width, self.side / height]).repeat(2)
        if torch.rand(()) < self.flip:
            image, boxes = image.flip(-1), torch.stack([self.side - boxes[:, 2], boxes[:, 1], self.side - boxes[:, 0], boxes[:, 3]], 1)
        brightness, contrast = (1 + self.jitter * (2 * torch.rand(2) - 1)).tolist()
        image = ((image - image.mean()) * contrast + image.mean() * brightness).clamp(0, 1)
        return BoxBatch(normalize(image[0])[None], [boxes], [found.labels], torch.tensor([index]))


def collate_boxes(items: Sequence[BoxBatch | DataError]) -> BoxBatch | DataError:
    """Batches of one to one batch."""
    batches = []
    for item in items:
        if isinstance(item, DataError):
            return item
        batches.append(item)
    return BoxBatch(
        torch.cat([batch.images for batch in batches]),
        [boxes for batch in batches for boxes in batch.boxes],
        [labels for batch in batches for labels in batch.labels],
        torch.cat([batch.indices for batch in batches]),
    )


class LabelledSource(SampleSource):
    """The images of a source with the two label maps that a labelling wrote into `folder`, joined."""

    def __init__(self, source: SampleSource, folder: Path, classes: int) -> None:
        self.source, self.folder, self.classes = source, folder, classes

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read_image(self, index: int) -> Tensor:
        return self.source.read_image(index)

    def read(self, index: int) -> Sample:
        image = self.read_image(index)
        first, second = (self._read_labels(kind, index, image) for kind in ("first", "second"))
        return image, join_labels(first, second)

    def _read_labels(self, kind: str, index: int, image: Tensor) -> Tensor:
        path = self.folder / kind / f"{self.name(index)}.png"
        labels = decode_picture(path, "label map", None).long()
        fix = "label this data set anew: leave out --stages.labels"
        if labels.shape != image.shape[1:]:
            evidence = f"{tuple(labels.shape)}, image {tuple(image.shape[1:])}"
            raise DataError("a label map has another size than its image", where=str(path), evidence=evidence, fix=fix)
        wrong = (labels >= self.classes) & (labels != VOID)
        if bool(wrong.any()):
            evidence = f"value {int(labels[wrong].max())}, {self.classes} classes"
            raise DataError("a label map was made for other classes", where=str(path), evidence=evidence, fix=fix)
        return labels
