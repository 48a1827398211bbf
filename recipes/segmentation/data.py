"""DataModules: a folder of images and masks, and the built-in texture mosaics."""

from __future__ import annotations

__all__ = ["FilesData", "FolderData", "SegmentationData", "TextureMosaic"]

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_normkit.errors import DataError
from pl_normkit.recipes.loading import Part, RecipeData, require_option
from pl_normkit.recipes.segmentation.files import FileSource, Pair, check_files, find_predict_images
from pl_normkit.recipes.segmentation.folder import pair_files, read_class_names
from pl_normkit.recipes.segmentation.images import MaskCode
from pl_normkit.recipes.segmentation.mosaic import TEXTURES, MosaicSource, load_photograph
from pl_normkit.recipes.segmentation.samples import (
    STRIDE,
    Augment,
    CollateNamed,
    CollatePairs,
    PredictDataset,
    SampleSource,
    SegmentationDataset,
    crop_middle,
)
from pl_normkit.recipes.splitting import SplitBy, split_folder


class SegmentationData(RecipeData[SampleSource]):
    """Loaders over four sources of samples; a subclass says where these come from.

    Batches: (images (N, 3, H, W) normalized, masks (N, H, W) int64), and for prediction (images, names, sizes (N, 2)).

    Args:
        class_names: one name per class, in the order of the mask values.
        ignore_index: mask value of pixels that do not count.
        crop_size: side of the training crop in pixels, a multiple of 32.
        batch_size: training batch.
        eval_batch_size: batch for validation, test and prediction.
        num_workers: processes that read training samples; evaluation uses as many.
        scale: range of the random zoom.
        flip: probability of a horizontal flip.
        jitter: largest relative change of brightness and contrast.
        transforms: transforms of `torchvision.transforms.v2`, applied to the crop and its mask after the flip.

    Raises DataError for a value that cannot be used.
    """

    def __init__(
        self,
        class_names: list[str],
        *,
        ignore_index: int = 255,
        crop_size: int = 256,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        jitter: float = 0.2,
        transforms: list[nn.Module] | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, flip=flip, jitter=jitter)
        require_option(crop_size > 0 and crop_size % STRIDE == 0, "crop_size", crop_size, f"take a multiple of {STRIDE}")
        require_option(0 < scale[0] <= scale[1], "scale", scale, "give the lower bound first, above 0")
        require_option(not 0 <= ignore_index < len(class_names), "ignore_index", ignore_index, "take a value that is no class, such as 255")
        self.class_names = class_names
        self.ignore_index = ignore_index
        self.crop_size = crop_size
        self.augment = Augment(crop_size, scale, flip, jitter, ignore_index, tuple(transforms or ()))

    def train_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(SegmentationDataset(self.sources["train"], self.augment), CollatePairs(self.ignore_index), training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(SegmentationDataset(self.sources["val"]), CollatePairs(self.ignore_index))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(SegmentationDataset(self.sources["test"]), CollatePairs(self.ignore_index))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(PredictDataset(self.build_predict_source()), CollateNamed())

    def sample_images(self, count: int) -> Tensor:
        """Middles of the first validation images, (count, 3, crop_size, crop_size) or fewer: what the network is trained on, in size."""
        dataset, taken = SegmentationDataset(self.sources["val"]), []
        for index in range(min(count, len(dataset))):
            item = dataset[index]
            if isinstance(item, DataError):
                raise item
            taken.append(crop_middle(item[0], self.crop_size))
        return torch.stack(taken)


class FilesData(SegmentationData):
    """Samples in files: an image and a mask each. A subclass finds them; without test samples, tests run on those for validation.

    Args:
        class_names: one name per class.
        code: how masks store labels; None where they store the labels themselves.
        root: the folder of the data set.
        predict_dir: folder of images for `predict`; None predicts the test (or validation) images.
        check_masks: decode every mask before the first step; else only the headers are read then, and a wrong value stops the run later.
        options: see SegmentationData.
    """

    def __init__(
        self,
        class_names: list[str],
        code: MaskCode | None,
        root: str,
        predict_dir: str | None = None,
        check_masks: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(class_names, **options)
        self.root = Path(root)
        self.code = code or MaskCode(class_names, self.ignore_index)
        self.predict_dir = Path(predict_dir) if predict_dir is not None else None
        self.check_masks = check_masks

    @abstractmethod
    def find_pairs(self) -> dict[Part, list[Pair]]:
        """Files for "train", "val" and maybe "test". Raises DataError."""

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, SampleSource]:
        found = self.find_pairs()
        chosen = {part: found.get(part) or found["val"] for part in parts}
        for part, pairs in chosen.items():
            check_files(pairs, self.code, part, decode_masks=self.check_masks)
        return {part: FileSource(pairs, self.code) for part, pairs in chosen.items()}

    def build_predict_source(self) -> SampleSource:
        if self.predict_dir is not None:
            return FileSource(find_predict_images(self.predict_dir), self.code)
        found = self.find_pairs()
        return FileSource(found.get("test") or found["val"], self.code)


class FolderData(FilesData):
    """Images and masks in a folder.

    Layouts, told apart by `split`:

    - "seed": `root/images`, `root/masks`; a share `val_share` drawn by `seed` is for validation.
    - "files": the same, with `root/train.txt` and `root/val.txt` (and maybe `root/test.txt`): one image name per line, without suffix.
    - "folders": `root/train/images`, `root/train/masks`, `root/val/images`, `root/val/masks` (and maybe `root/test/...`).
    - "auto": "folders" if `root/train` is there, "files" if `root/train.txt` is there, else "seed".

    A mask has the name of its image and the suffix .png: one channel, grey or palette, each pixel value a class index.
    Without samples of their own, tests run on the validation samples.

    Args:
        root: the folder.
        classes: the class names, or a text file with one a line; None takes `root/classes.txt`.
        split: see above.
        val_share: share of the images for validation, for "seed".
        seed: of that draw.
        options: see FilesData.

    Raises DataError for everything that is wrong with the folder, before training starts where that is cheap.
    """

    def __init__(
        self,
        root: str,
        classes: list[str] | str | None = None,
        split: SplitBy = "auto",
        val_share: float = 0.2,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(read_class_names(Path(root), classes), None, root, **options)
        require_option(0 < val_share < 1, "val_share", val_share, "take a share between 0 and 1")
        self.split: SplitBy = split
        self.val_share = val_share
        self.seed = seed

    def find_pairs(self) -> dict[Part, list[Pair]]:
        return split_folder(self.root, self.split, self.val_share, self.seed, lambda base: pair_files(base / "images", base / "masks"))


class TextureMosaic(SegmentationData):
    """Eight texture photographs bundled with scikit-image, tiled by random Voronoi cells; nothing is downloaded.

    Training samples come from the left 60 % of each photograph, validation and test samples from the rest.

    Args:
        seed: decides every mosaic.
        image_size: side of a mosaic in pixels.
        regions: Voronoi cells in a mosaic.
        train_count, val_count: number of mosaics; tests use `val_count` other mosaics.
        crop_size, batch_size, eval_batch_size, num_workers, scale: see SegmentationData, and for all other options.

    Raises DataError without scikit-image.
    """

    def __init__(
        self,
        seed: int = 0,
        image_size: int = 128,
        regions: int = 6,
        train_count: int = 640,
        val_count: int = 64,
        crop_size: int = 96,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        scale: tuple[float, float] = (0.8, 1.25),
        **options: Any,
    ) -> None:
        super().__init__(
            [texture.name for texture in TEXTURES],
            ignore_index=255,
            crop_size=crop_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            scale=scale,
            **options,
        )
        for option, value in (("image_size", image_size), ("regions", regions), ("train_count", train_count), ("val_count", val_count)):
            require_option(value > 0, option, value, "take at least 1")
        self.seed = seed
        self.image_size = image_size
        self.regions = regions
        self.counts: dict[Part, int] = {"train": train_count, "val": val_count, "test": val_count}

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, SampleSource]:
        photographs = [load_photograph(texture) for texture in TEXTURES]
        size, regions, seed = self.image_size, self.regions, self.seed
        return {part: MosaicSource(photographs, part, count=self.counts[part], size=size, regions=regions, seed=seed) for part in parts}
