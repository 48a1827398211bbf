"""DataModules: the built-in stereo pair with planes, a folder of pairs, Middlebury's scenes, NYU v2's arrays."""

from __future__ import annotations

__all__ = ["FolderData", "MiddleburyData", "NYUData", "StereoAndPlanes", "UpsamplingData"]

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from pl_normkit.recipes.loading import Part, RecipeData, require_option
from pl_normkit.recipes.splitting import SplitBy, split_folder
from pl_normkit.recipes.upsampling.built_in import PlanesSource, StereoSource, TwoSources
from pl_normkit.recipes.upsampling.files import ArraySource, CoarsePairs, MapPair, PairSource, find_pairs, find_scenes
from pl_normkit.recipes.upsampling.resample import Reduction
from pl_normkit.recipes.upsampling.samples import MapSource, Task, UpsamplingDataset, collate


class UpsamplingData(RecipeData[MapSource]):
    """Loaders of `Batch`es; a subclass says where images and maps come from. Evaluation takes whole images, one at a time.

    Args:
        factor: how many times larger the fine map is: 4, 8 and 16 are usual.
        reduction: how coarse maps are made of fine ones: "bicubic" or "nearest". Scores of the two cannot be compared.
        crop_size: side of the training crop in pixels, a multiple of the factor.
        batch_size: training batch.
        num_workers: processes that read training samples; evaluation uses as many.
        flip: probability of a horizontal flip.
        jitter: largest relative change of the image's brightness and contrast.
        classes: number of classes where maps hold labels; 0 where they hold numbers such as depth.
        unknown: value of map pixels without a measurement, besides NaN and infinity; None where all values count.
        predict_dir: folder with `images/` and coarse `maps/` for `predict`; None makes coarse maps of the test (or validation) maps.

    Raises DataError for a value that cannot be used.
    """

    def __init__(
        self,
        *,
        factor: int = 8,
        reduction: Reduction = "bicubic",
        crop_size: int = 128,
        batch_size: int = 4,
        num_workers: int = 2,
        flip: float = 0.5,
        jitter: float = 0.1,
        classes: int = 0,
        unknown: float | None = 0,
        predict_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=1, num_workers=num_workers, flip=flip, jitter=jitter)
        require_option(factor > 1, "factor", factor, "take 4, 8 or 16")
        fits = crop_size >= 2 * factor and crop_size % factor == 0
        require_option(fits, "crop_size", crop_size, f"take a multiple of --data.factor, {factor}, such as {16 * factor}")
        require_option(classes >= 0 and classes != 1, "classes", classes, "take 0 for numbers, or at least 2")
        self.task = Task(factor, reduction, classes > 0)
        self.crop_size, self.flip, self.jitter = crop_size, flip, jitter
        self.classes, self.unknown = classes, unknown
        self.predict_dir = Path(predict_dir) if predict_dir is not None else None

    def build_predict_source(self) -> MapSource:
        if self.predict_dir is None:
            return self.build_sources(("test",))["test"]
        return CoarsePairs(find_pairs(self.predict_dir), self.task.factor, self.unknown, self.classes)

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = UpsamplingDataset(self.sources["train"], self.task, self.crop_size, self.flip, self.jitter)
        return self.build_loader(dataset, collate, training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(UpsamplingDataset(self.sources["val"], self.task), collate)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(UpsamplingDataset(self.sources["test"], self.task), collate)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(UpsamplingDataset(self.build_predict_source(), self.task, has_truth=self.predict_dir is None), collate)


class StereoAndPlanes(UpsamplingData):
    """Measured disparity of scikit-image's stereo pair, and slanted planes under its photographs; nothing is downloaded.

    The pair is one picture: crops of its left 60 % train, the whole rest is validated and tested on. Planes are drawn, with photographs
    cut the same way.

    Args:
        seed: decides every room of planes.
        image_size: side of such a room in pixels.
        regions: planes in it.
        train_count: rooms, and crops of the stereo pair, in an epoch.
        val_count: rooms for validation; tests use as many others.
        crop_size, num_workers, options: see UpsamplingData.

    Raises DataError without scikit-image.
    """

    def __init__(
        self,
        seed: int = 0,
        image_size: int = 128,
        regions: int = 6,
        train_count: int = 96,
        val_count: int = 16,
        crop_size: int = 96,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(crop_size=crop_size, num_workers=num_workers, **options)
        for option, value in (("image_size", image_size), ("regions", regions), ("train_count", train_count), ("val_count", val_count)):
            require_option(value > 0, option, value, "take at least 1")
        self.seed, self.image_size, self.regions = seed, image_size, regions
        self.counts: dict[Part, int] = {"train": train_count, "val": val_count, "test": val_count}

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, MapSource]:
        return {part: TwoSources(self._stereo(part), self._planes(part)) for part in parts}

    def _stereo(self, part: Part) -> StereoSource:
        return StereoSource(part, self.counts[part] if part == "train" else 1)

    def _planes(self, part: Part) -> PlanesSource:
        return PlanesSource(part, count=self.counts[part], size=self.image_size, regions=self.regions, seed=self.seed)


class FolderData(UpsamplingData):
    """Pairs in a folder: `root/images`, and under the same names `root/maps` (.png of 8 or 16 bits, .tif, .npy, .pfm), of the same size.

    Splits as in the segmentation recipe: `root/train` and `root/val` each with both folders, or `root/train.txt` and `root/val.txt`, or
    a share drawn by `seed`. Without samples of their own, tests run on the validation samples.

    Args:
        root: the folder.
        split: "folders", "files", "seed", or "auto": the first of them that is there.
        val_share: share of the images for validation, for "seed".
        seed: of that draw.
        options: see UpsamplingData.

    Raises DataError for everything that is wrong with the folder, before training starts.
    """

    def __init__(self, root: str, split: SplitBy = "auto", val_share: float = 0.2, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        require_option(0 < val_share < 1, "val_share", val_share, "take a share between 0 and 1")
        self.root, self.val_share, self.seed = Path(root), val_share, seed
        self.split: SplitBy = split

    def find(self) -> dict[Part, list[MapPair]]:
        """Files for "train", "val" and maybe "test". Raises DataError."""
        return split_folder(self.root, self.split, self.val_share, self.seed, find_pairs)

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, MapSource]:
        found = self.find()
        return {part: PairSource(found.get(part) or found["val"], part, self.unknown, self.classes) for part in parts}


class MiddleburyData(FolderData):
    """Scenes of the Middlebury stereo data sets as they unpack: folders with an image and its disparity, under `root`.

    Known are 2014 and 2021 (im0.png, disp0.pfm), 2005 and 2006 (view1.png, disp1.png), 2001 and 2003 (im2.ppm, disp2.pgm). Zero and
    infinite disparities are unknown. A share of the scenes drawn by `seed` is for validation and test, unless `root` has train/ and val/.

    Args:
        root: the folder.
        options: see FolderData and UpsamplingData.
    """

    def __init__(self, root: str, split: SplitBy = "auto", val_share: float = 0.2, seed: int = 0, **options: Any) -> None:
        super().__init__(root, split, val_share, seed, **options)

    def find(self) -> dict[Part, list[MapPair]]:
        return split_folder(self.root, self.split, self.val_share, self.seed, find_scenes)


class NYUData(UpsamplingData):
    """NYU v2 as the arrays that most code on guided upsampling reads: train_images_split.npy, train_depth_split.npy, test_images_v2.npy
    and test_depth.npy in one folder. Validation is the test set: its score is no reason to choose a checkpoint by.

    Scores are in the units of the arrays; published ones are in centimetres.

    Args:
        root: the folder.
        options: see UpsamplingData.

    Raises DataError for missing arrays, or shapes that do not fit.
    """

    def __init__(self, root: str, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root)

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, MapSource]:
        names = ("train_images_split.npy", "train_depth_split.npy"), ("test_images_v2.npy", "test_depth.npy")
        return {part: ArraySource(*(self.root / name for name in names[part != "train"])) for part in parts}
