"""DataModules: built-in scenes of textures, a folder of one's own, PASCAL VOC and COCO; images with boxes, masks for scoring alone."""

from __future__ import annotations

__all__ = ["BoxFolderData", "BoxesData", "COCOBoxData", "TextureObjects", "VOCBoxData"]

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from pl_normkit.errors import ConfigError
from pl_normkit.recipes.boxes.coco import COCOSource, read_coco
from pl_normkit.recipes.boxes.files import BoxedFile, FileBoxSource, PlainSource, find_boxed, find_voc
from pl_normkit.recipes.boxes.objects import OBJECTS, ObjectSource
from pl_normkit.recipes.boxes.samples import PAIR_VOID, VOID, BoxDataset, BoxSource, LabelledSource, collate_boxes
from pl_normkit.recipes.loading import Part, require_option
from pl_normkit.recipes.segmentation.data import SegmentationData
from pl_normkit.recipes.segmentation.files import find_predict_images
from pl_normkit.recipes.segmentation.folder import read_class_names
from pl_normkit.recipes.segmentation.public_data import find_voc_base, read_public_names
from pl_normkit.recipes.segmentation.samples import CollatePairs, SampleSource, SegmentationDataset
from pl_normkit.recipes.splitting import SplitBy, split_folder


class BoxesData(SegmentationData):
    """Loaders for the classifier, over images with boxes, and for the segmenter, over images with two label maps.

    Validation and test read masks; where there are none, their scores are unknown. A subclass gives sources that know boxes.

    Args:
        class_names: the background first, fewer than 255 in all.
        predict_dir: folder of images for `predict`; None predicts the test (or validation) images.
        crop_size, batch_size, eval_batch_size, num_workers, scale, flip, jitter: see SegmentationData.

    Raises DataError for a value that cannot be used.
    """

    def __init__(
        self,
        class_names: list[str],
        *,
        predict_dir: str | None = None,
        crop_size: int = 320,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        scale: tuple[float, float] = (0.5, 1.5),
        flip: float = 0.5,
        jitter: float = 0.2,
    ) -> None:
        super().__init__(
            class_names,
            ignore_index=VOID,
            crop_size=crop_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            scale=scale,
            flip=flip,
            jitter=jitter,
        )
        require_option(2 <= len(class_names) < VOID, "classes", len(class_names), "the background and up to 253 classes with boxes")
        self.flip, self.jitter = flip, jitter
        self.predict_dir = Path(predict_dir) if predict_dir is not None else None
        self.label_folder: Path | None = None

    @property
    def box_source(self) -> BoxSource:
        """The training images with their boxes."""
        source = self.sources["train"]
        assert isinstance(source, BoxSource)
        return source

    def use_labels(self, folder: Path) -> None:
        """Train the segmenter on the label maps in `folder`."""
        self.label_folder = folder

    def build_predict_source(self) -> SampleSource:
        if self.predict_dir is not None:
            return PlainSource(find_predict_images(self.predict_dir))
        return super().build_predict_source()

    def box_dataloader(self, side: int, batch_size: int, *, training: bool = False) -> DataLoader[Any]:
        """Training images squashed to `side` x `side`, with their boxes."""
        dataset = BoxDataset(self.box_source, side, self.flip if training else 0, self.jitter if training else 0)
        return DataLoader(
            dataset,
            min(batch_size, len(dataset)),
            shuffle=training,
            drop_last=training,
            num_workers=self.num_workers,
            collate_fn=collate_boxes,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        if self.label_folder is None:
            fix = "run fit from the command line, or give --stages.labels"
            raise ConfigError("the training images are not labelled yet", where="BoxesData", fix=fix)
        source = LabelledSource(self.sources["train"], self.label_folder, len(self.class_names))
        augment = replace(self.augment, ignore_index=PAIR_VOID)
        return self.build_loader(SegmentationDataset(source, augment), CollatePairs(PAIR_VOID), training=True)


class TextureObjects(BoxesData):
    """Objects of three textures on grounds of three others, from photographs in scikit-image's wheel; nothing is downloaded.

    Training scenes come from the left 60 % of each photograph, validation and test scenes from the rest. Boxes are those of what is seen
    of an object; masks of the training scenes score the labels and nothing else.

    Args:
        seed: decides every scene.
        image_size: side of a scene in pixels.
        most: objects in a scene, at most.
        train_count: training scenes.
        val_count: scenes for validation; tests use as many others.
        crop_size, batch_size, eval_batch_size, num_workers, scale, options: see BoxesData.

    Raises DataError without scikit-image.
    """

    def __init__(
        self,
        seed: int = 0,
        image_size: int = 96,
        most: int = 2,
        train_count: int = 320,
        val_count: int = 64,
        crop_size: int = 96,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        scale: tuple[float, float] = (0.8, 1.25),
        **options: Any,
    ) -> None:
        sizes: dict[str, Any] = {"crop_size": crop_size, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        super().__init__(["background", *OBJECTS], num_workers=num_workers, scale=scale, **sizes, **options)
        for option, value in (("image_size", image_size - 31), ("most", most), ("train_count", train_count), ("val_count", val_count)):
            require_option(value > 0, option, value, "take a larger number")
        self.seed, self.image_size, self.most = seed, image_size, most
        self.counts: dict[Part, int] = {"train": train_count, "val": val_count, "test": val_count}

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, SampleSource]:
        return {part: ObjectSource(part, count=self.counts[part], size=self.image_size, most=self.most, seed=self.seed) for part in parts}


class _BoxFiles(BoxesData):
    """Samples in files; a subclass finds them."""

    def find(self) -> dict[Part, list[BoxedFile]]:
        """Files for "train", "val" and maybe "test". Raises DataError."""
        raise NotImplementedError

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, SampleSource]:
        found = self.find()
        return {part: FileBoxSource(found.get(part) or found["val"], self.class_names, part) for part in parts}


class BoxFolderData(_BoxFiles):
    """Images and boxes in a folder: `root/images`, and under the same names `root/boxes` (.json, YOLO's .txt or VOC's .xml).

    Masks in `root/masks`, one-channel PNGs of class indices, are optional: they score and train nothing. Splits as in the segmentation
    recipe: `root/train` and `root/val` each with those folders, or `root/train.txt` and `root/val.txt`, or a share drawn by `seed`.

    Args:
        root: the folder.
        classes: names of the classes with boxes, in YOLO's order, or a text file with one a line; None takes `root/classes.txt`. The
            background comes first by itself.
        split: "folders", "files", "seed", or "auto": the first of them that is there.
        val_share: share of the images for validation, for "seed".
        seed: of that draw.
        options: see BoxesData.

    Raises DataError for everything that is wrong with the folder, before training starts.
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
        names = read_class_names(Path(root), classes, least=1)
        super().__init__(names if names[0] == "background" else ["background", *names], **options)
        require_option(0 < val_share < 1, "val_share", val_share, "take a share between 0 and 1")
        self.root, self.val_share, self.seed = Path(root), val_share, seed
        self.split: SplitBy = split

    def find(self) -> dict[Part, list[BoxedFile]]:
        return split_folder(self.root, self.split, self.val_share, self.seed, find_boxed)


class VOCBoxData(_BoxFiles):
    """PASCAL VOC 2012 as its archive unpacks: `Annotations` for training, `SegmentationClass` for scoring alone.

    Args:
        root: the folder with VOC2012 or VOCdevkit/VOC2012, or that folder itself.
        train_list: name of a list in `ImageSets/Segmentation`, such as "train", or "train_aug" where it was added.
        val_list: another.
        options: see BoxesData.

    Raises DataError for everything that is wrong with the folder.
    """

    def __init__(self, root: str, train_list: str = "train", val_list: str = "val", **options: Any) -> None:
        super().__init__(read_public_names("voc"), **options)
        self.root = Path(root)
        self.lists: dict[Part, str] = {"train": train_list, "val": val_list}

    def find(self) -> dict[Part, list[BoxedFile]]:
        return find_voc(find_voc_base(self.root), self.lists)


class COCOBoxData(BoxesData):
    """COCO in the folders its archives unpack to, or any data set in its format, as torchvision's CocoDetection takes.

    Args:
        root: folder of `train2017`, `val2017` and `annotations/instances_train2017.json` and `instances_val2017.json`.
        train_images, train_annotations, val_images, val_annotations: other places, within root.
        options: see BoxesData.

    Raises DataError for annotations that cannot be used, among them more than 253 categories.
    """

    def __init__(
        self,
        root: str,
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
        **options: Any,
    ) -> None:
        self.root = Path(root)
        self.places: dict[bool, tuple[str, str]] = {True: (train_images, train_annotations), False: (val_images, val_annotations)}
        content = read_coco(self.root / val_annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        super().__init__(["background", *(category["name"] for category in categories)], **options)

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, SampleSource]:
        found: dict[Part, SampleSource] = {}
        for part in parts:
            images, annotations = self.places[part == "train"]
            path = self.root / annotations
            found[part] = COCOSource(read_coco(path), self.root / images, self.class_names, str(path), only_boxed=part == "train")
        return found
