"""Scikit-learn's digits as images in [-1, 1]."""

from __future__ import annotations

__all__ = ["DigitImages"]

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, default_collate

from pl_normkit.recipes.diffusion.scorer import Scorer, fit_scorer
from pl_normkit.recipes.digits import DIGIT_NAMES, split_digits
from pl_normkit.recipes.loading import Part, RecipeData, require_option

Labelled = tuple[Tensor, Tensor]


class DigitImages(RecipeData[Labelled]):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels; nothing is downloaded.

    Batches: (images (N, 1, S, S) in [-1, 1], labels (N,), their numbers (N,)), and for prediction the numbers of the samples alone. The
    order of the training images depends on the seed and the epoch alone, so that a resumed run sees what the whole one would have seen.
    A subclass with another `read_images` and `class_names` gives other images.

    Args:
        seed: decides who is in which part: a fifth for validation, a fifth for the test.
        image_size: side S; the images are resized to it.
        batch_size: training batch.
        eval_batch_size: batch for validation, test and prediction.
        num_workers: processes that hand over samples.
        samples: how many images prediction draws.

    Attributes:
        scorer: the classifier that samples are judged by; trained in `setup`, on the training images.

    Raises DataError without scikit-learn, or for a value that cannot be used.
    """

    def __init__(
        self,
        seed: int = 0,
        image_size: int = 8,
        batch_size: int = 64,
        eval_batch_size: int = 360,
        num_workers: int = 0,
        samples: int = 64,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, flip=0.0, jitter=0.0)
        require_option(image_size >= 4, "image_size", image_size, "take at least 4")
        require_option(samples > 0, "samples", samples, "take at least 1")
        self.seed = seed
        self.image_size = image_size
        self.samples = samples
        self.scorer: Scorer | None = None

    @property
    def class_names(self) -> list[str]:
        """One name per label."""
        return list(DIGIT_NAMES)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return 1

    def read_images(self) -> dict[Part, Labelled]:
        """Images (N, channels, H, W) uint8 and labels (N,) of each part. Raises DataError."""
        return split_digits(self.seed)

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, Labelled]:
        found = self.read_images()
        return {part: (self._prepare(found[part][0]), found[part][1]) for part in parts}

    def _prepare(self, stored: Tensor) -> Tensor:
        images = stored.float() / 127.5 - 1
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return images.clamp(-1, 1)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "predict" and self.scorer is None:
            missing: tuple[Part, ...] = tuple(part for part in ("train", "val") if part not in self.sources)
            self.sources.update(self.build_sources(missing))
            self.scorer = fit_scorer(self.sources["train"], self.sources["val"], len(self.class_names))

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = _numbered(self.sources["train"])
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, world, rank, shuffle=True, seed=torch.initial_seed() % 2**32, drop_last=True
        )
        return self.build_loader(dataset, default_collate, training=True, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(_numbered(self.sources["val"]), default_collate)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(_numbered(self.sources["test"]), default_collate)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(TensorDataset(torch.arange(self.samples)), default_collate)


def _numbered(source: Labelled) -> TensorDataset:
    return TensorDataset(*source, torch.arange(len(source[1])))
