"""Data sets of torchvision, by name."""

from __future__ import annotations

__all__ = ["TORCHVISION_SETS", "TorchvisionData", "TorchvisionSet"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from pl_normkit.errors import DataError, nearest
from pl_normkit.recipes.loading import Part, require_option
from pl_normkit.recipes.vit.data import ClassificationData
from pl_normkit.recipes.vit.samples import ImageSource


@dataclass(frozen=True)
class TorchvisionSet:
    """How a class of `torchvision.datasets` is asked for its training and its test images.

    Attributes:
        train, test: arguments.
        in_chans: channels of the images.
        classes: their number, where torchvision gives labels and no names.
    """

    train: Mapping[str, Any]
    test: Mapping[str, Any]
    in_chans: int = 3
    classes: int | None = None


_BY_FLAG: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"train": True}, {"train": False})
_BY_SPLIT: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"split": "train"}, {"split": "test"})

TORCHVISION_SETS = {
    "CIFAR10": TorchvisionSet(*_BY_FLAG),
    "CIFAR100": TorchvisionSet(*_BY_FLAG),
    "FGVCAircraft": TorchvisionSet({"split": "trainval"}, {"split": "test"}),
    "FashionMNIST": TorchvisionSet(*_BY_FLAG, in_chans=1),
    "Flowers102": TorchvisionSet(*_BY_SPLIT, classes=102),
    "Food101": TorchvisionSet(*_BY_SPLIT),
    "GTSRB": TorchvisionSet(*_BY_SPLIT, classes=43),
    "KMNIST": TorchvisionSet(*_BY_FLAG, in_chans=1),
    "MNIST": TorchvisionSet(*_BY_FLAG, in_chans=1),
    "OxfordIIITPet": TorchvisionSet({"split": "trainval"}, {"split": "test"}),
    "STL10": TorchvisionSet(*_BY_SPLIT),
    "SVHN": TorchvisionSet(*_BY_SPLIT, classes=10),
    "USPS": TorchvisionSet(*_BY_FLAG, in_chans=1, classes=10),
}
"""Names that `TorchvisionData` takes."""


class PictureSource(ImageSource):
    """Some images of a torchvision data set."""

    def __init__(self, dataset: Any, indices: Sequence[int], in_chans: int) -> None:
        self.dataset = dataset
        self.indices = indices
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.dataset[self.indices[index]]
        return pil_to_tensor(picture.convert("L" if self.in_chans == 1 else "RGB")), int(label)


class TorchvisionData(ClassificationData):
    """A data set of torchvision.

    `val_share` of its training images, drawn by `seed`, are for validation; tests and predictions run on its test images.

    Args:
        dataset: one of TORCHVISION_SETS, such as "CIFAR10".
        root: folder where torchvision keeps it.
        download: let torchvision download it into `root` where it is missing.
        val_share: share of the training images for validation.
        seed: of that draw.
        image_size, batch_size, eval_batch_size, scale, flip, jitter: see ClassificationData, and for all other options.

    Raises DataError for an unknown name or data that is not there.
    """

    def __init__(
        self,
        dataset: str,
        root: str = "data",
        download: bool = False,
        val_share: float = 0.1,
        seed: int = 0,
        image_size: int = 32,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        scale: tuple[float, float] = (0.6, 1.0),
        flip: float = 0.0,
        jitter: float = 0.2,
        **options: Any,
    ) -> None:
        if dataset not in TORCHVISION_SETS:
            raise DataError(
                f"there is no torchvision data set {dataset!r} here",
                where="--data.dataset",
                fix=f"{nearest(dataset, TORCHVISION_SETS)} One of: {', '.join(TORCHVISION_SETS)}".strip(),
            )
        require_option(0 < val_share < 1, "val_share", val_share, "take a share between 0 and 1")
        self.dataset = dataset
        self.root = root
        self.download = download
        self.val_share = val_share
        self.seed = seed
        self._loaded: dict[str, Any] = {}
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            scale=scale,
            flip=flip,
            jitter=jitter,
            **options,
        )

    @property
    def class_names(self) -> list[str]:
        names = getattr(self._load("train"), "classes", None)
        return [str(name) for name in (names if names is not None else range(TORCHVISION_SETS[self.dataset].classes or 0))]

    @property
    def in_chans(self) -> int:
        return TORCHVISION_SETS[self.dataset].in_chans

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, ImageSource]:
        count = len(self._load("train"))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = min(max(round(count * self.val_share), 1), count - 1)
        chosen: dict[Part, list[int]] = {"val": order[:held_out], "train": order[held_out:]}
        if "test" in parts:
            chosen["test"] = list(range(len(self._load("test"))))
        return {part: PictureSource(self._load(part), chosen[part], self.in_chans) for part in parts}

    def _load(self, part: Part) -> Any:
        """The data set of torchvision that holds `part`."""
        known = TORCHVISION_SETS[self.dataset]
        half = "test" if part == "test" else "train"
        if half not in self._loaded:
            options = known.test if half == "test" else known.train
            try:
                self._loaded[half] = getattr(datasets, self.dataset)(self.root, download=self.download, **options)
            except (ImportError, OSError, RuntimeError) as error:
                raise DataError(
                    f"{self.dataset} cannot be downloaded" if self.download else f"{self.dataset} is not there",
                    where=f"--data.root {self.root}",
                    evidence=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                    fix="run it once with network access, or copy the files there"
                    if self.download
                    else "let torchvision download it with --data.download true, or give the folder that holds it",
                ) from error
        return self._loaded[half]
