"""DataModules: what all image classification data share."""

from __future__ import annotations

__all__ = ["ClassificationData"]

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader
from torchvision.transforms import v2

from pl_normkit.recipes.loading import RecipeData, require_option
from pl_normkit.recipes.vit.samples import (
    Augment,
    CollateImages,
    ImageDataset,
    ImageSource,
    Normalization,
    fit_normalization,
    plain_transform,
)


class ClassificationData(RecipeData[ImageSource]):
    """Loaders over sources of labelled images; a subclass says where these come from.

    Batches: (images (N, channels, S, S) normalized, labels (N,) int64), in training with CutMix (images, shares (N, classes)),
    and for prediction (images, names). Mixup is not offered: it shrinks the variance of the input that a positional embedding
    is weighed against; CutMix and erasing with noise keep it (arXiv 2405.14115).

    Args:
        image_size: side S of the images in pixels.
        mean, std: normalization per channel, of images in [0, 1]; None fits it to the training images.
        batch_size: training batch.
        eval_batch_size: batch for validation, test and prediction.
        num_workers: processes that read images.
        scale: range of the share of an image that a training crop keeps.
        flip: probability of a horizontal flip.
        jitter: largest relative change of brightness and contrast.
        erase: probability of erasing a rectangle with noise.
        cutmix: share of the training batches that CutMix (alpha 1) mixes.

    Raises DataError for a value that cannot be used.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 2,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        jitter: float = 0.3,
        erase: float = 0.25,
        cutmix: float = 0.5,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, flip=flip, jitter=jitter)
        require_option(image_size > 0, "image_size", image_size, "take at least 1")
        require_option(0 < scale[0] <= scale[1] <= 1, "scale", scale, "give the lower bound first, above 0 and at most 1")
        for option, value in (("erase", erase), ("cutmix", cutmix)):
            require_option(0 <= value <= 1, option, value, "take a probability")
        self.image_size = image_size
        self.augment = Augment(scale, flip, jitter, erase)
        self.cutmix = cutmix
        self._normalization = _given_normalization(mean, std, self.in_chans)

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """One name per class, in the order of the labels. Raises DataError."""

    @property
    @abstractmethod
    def in_chans(self) -> int:
        """Channels of the images."""

    @property
    def normalization(self) -> Normalization:
        """As given, or fitted to the training images."""
        if self._normalization is None:
            if "train" not in self.sources:
                self.sources.update(self.build_sources(("train",)))
            self._normalization = fit_normalization(self.sources["train"])
        return self._normalization

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = ImageDataset(self.sources["train"], self.augment.build(self.image_size, self.normalization))
        return self.build_loader(dataset, CollateImages(self._mix()), training=True)

    def _mix(self) -> v2.Transform | None:
        return v2.RandomApply([v2.CutMix(num_classes=len(self.class_names))], self.cutmix) if self.cutmix else None

    def val_dataloader(self) -> DataLoader[Any]:
        return self._plain_loader(self.sources["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        return self._plain_loader(self.sources["test"])

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._plain_loader(self.build_predict_source(), named=True)

    def _plain_loader(self, source: ImageSource, *, named: bool = False) -> DataLoader[Any]:
        transform = plain_transform(self.image_size, self.normalization)
        return self.build_loader(ImageDataset(source, transform, named=named), CollateImages())


def _given_normalization(mean: Sequence[float] | None, std: Sequence[float] | None, in_chans: int) -> Normalization | None:
    if mean is None and std is None:
        return None
    require_option(mean is not None and std is not None, "mean", mean, "give mean and std, or neither")
    for option, values in (("mean", mean or ()), ("std", std or ())):
        require_option(len(values) == in_chans, option, values, f"give {in_chans} numbers, one a channel")
    require_option(min(std or ()) > 0, "std", std, "take numbers above 0")
    return Normalization(tuple(mean or ()), tuple(std or ()))
