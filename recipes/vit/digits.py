"""Scikit-learn's digits: real data with nothing to download."""

from __future__ import annotations

__all__ = ["Digits", "TensorSource"]

from typing import Any

from torch import Tensor

from pl_normkit.recipes.digits import DIGIT_NAMES, split_digits
from pl_normkit.recipes.loading import Part
from pl_normkit.recipes.vit.data import ClassificationData
from pl_normkit.recipes.vit.samples import ImageSource


class TensorSource(ImageSource):
    """Images (N, channels, H, W) uint8 and labels (N,) in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Digits(ClassificationData):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels; nothing is downloaded.

    A permutation by `seed` sends the first 20 % to validation, the next 20 % to the test, the rest to training.

    Args:
        seed: decides who is in which part.
        image_size: the images are resized to it.
        batch_size, eval_batch_size, num_workers, scale, flip, jitter, erase, cutmix: see ClassificationData, and for all other options.

    Raises DataError without scikit-learn.
    """

    def __init__(
        self,
        seed: int = 0,
        image_size: int = 16,
        batch_size: int = 32,
        eval_batch_size: int = 360,
        num_workers: int = 0,
        scale: tuple[float, float] = (0.8, 1.0),
        flip: float = 0.0,
        jitter: float = 0.0,
        erase: float = 0.1,
        cutmix: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            scale=scale,
            flip=flip,
            jitter=jitter,
            erase=erase,
            cutmix=cutmix,
            **options,
        )
        self.seed = seed

    @property
    def class_names(self) -> list[str]:
        return list(DIGIT_NAMES)

    @property
    def in_chans(self) -> int:
        return 1

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, ImageSource]:
        split = split_digits(self.seed)
        return {part: TensorSource(*split[part]) for part in parts}
