"""DataModules: what all image classification data share."""

from __future__ import annotations

__all__ = ["ClassificationData", "Part"]

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

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

Part = Literal["train", "val", "test"]


class ClassificationData(RecipeData):
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
        image_size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        scale: tuple[float, float],
        flip: float,
        jitter: float,
        erase: float,
        cutmix: float,
    ) -> None:
        super().__init__()
        require_option(image_size > 0, "image_size", image_size, "take at least 1")
        require_option(batch_size > 0, "batch_size", batch_size, "take at least 1")
        require_option(eval_batch_size > 0, "eval_batch_size", eval_batch_size, "take at least 1")
        require_option(num_workers >= 0, "num_workers", num_workers, "take 0 or more")
        require_option(0 < scale[0] <= scale[1] <= 1, "scale", scale, "give the lower bound first, above 0 and at most 1")
        require_option(0 <= jitter < 1, "jitter", jitter, "take a share below 1")
        for option, value in (("flip", flip), ("erase", erase), ("cutmix", cutmix)):
            require_option(0 <= value <= 1, option, value, "take a probability")
        self.image_size = image_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.augment = Augment(scale, flip, jitter, erase)
        self.cutmix = cutmix
        self.sources: dict[Part, ImageSource] = {}
        self._normalization = _given_normalization(mean, std, self.in_chans)

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """One name per class, in the order of the labels. Raises DataError."""

    @property
    @abstractmethod
    def in_chans(self) -> int:
        """Channels of the images."""

    @abstractmethod
    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, ImageSource]:
        """Find and check the images of `parts`. Raises DataError."""

    def build_predict_source(self) -> ImageSource:
        """The images to predict: those of the test. Raises DataError."""
        return self.build_sources(("test",))["test"]

    @property
    def normalization(self) -> Normalization:
        """As given, or fitted to the training images."""
        if self._normalization is None:
            if "train" not in self.sources:
                self.sources.update(self.build_sources(("train",)))
            self._normalization = fit_normalization(self.sources["train"])
        return self._normalization

    def setup(self, stage: str) -> None:
        wanted: dict[str, tuple[Part, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        missing = tuple(part for part in wanted.get(stage, ()) if part not in self.sources)
        if missing:
            self.sources.update(self.build_sources(missing))

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = ImageDataset(self.sources["train"], self.augment.build(self.image_size, self.normalization))
        return DataLoader(
            dataset,
            batch_size=min(self.batch_size, len(dataset)),
            shuffle=True,
            drop_last=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=CollateImages(self._mix()),
        )

    def _mix(self) -> v2.Transform | None:
        return v2.RandomApply([v2.CutMix(num_classes=len(self.class_names))], self.cutmix) if self.cutmix else None

    def val_dataloader(self) -> DataLoader[Any]:
        return self._plain_loader(self.sources["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        return self._plain_loader(self.sources["test"])

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._plain_loader(self.build_predict_source(), named=True)

    def _plain_loader(self, source: ImageSource, *, named: bool = False) -> DataLoader[Any]:
        return DataLoader(
            ImageDataset(source, plain_transform(self.image_size, self.normalization), named=named),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=CollateImages(),
        )


def _given_normalization(mean: Sequence[float] | None, std: Sequence[float] | None, in_chans: int) -> Normalization | None:
    if mean is None and std is None:
        return None
    require_option(mean is not None and std is not None, "mean", mean, "give mean and std, or neither")
    for option, values in (("mean", mean or ()), ("std", std or ())):
        require_option(len(values) == in_chans, option, values, f"give {in_chans} numbers, one a channel")
    require_option(min(std or ()) > 0, "std", std, "take numbers above 0")
    return Normalization(tuple(mean or ()), tuple(std or ()))
