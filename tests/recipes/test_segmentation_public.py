import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pl_normkit.errors import DataError
from pl_normkit.recipes.export import run_or_export
from pl_normkit.recipes.segmentation import RECIPE, ADE20KData, CityscapesData, SegmentationData, STAREData, VOCData

run = partial(run_or_export, RECIPE)

SIZE = (40, 50)
LOADING = {"crop_size": 32, "num_workers": 0, "batch_size": 1}
Values = tuple[int, ...]


def _write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (90, 120, 30)).save(path)


def _write_mask(path: Path, values: Values, *, palette: bool = False, mode: str = "L") -> None:
    """Columns of the values, in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.resize(np.array(values, dtype=np.uint8), SIZE[1])
    picture = Image.fromarray(np.tile(columns, (SIZE[0], 1)))
    if palette:
        picture.putpalette([value for index in range(256) for value in (index, 255 - index, index // 2)])
    picture.convert(mode if not palette else "P").save(path)


def _make_voc(root: Path, values: Values = (0, 15, 20, 255)) -> None:
    base = root / "VOCdevkit" / "VOC2012"
    for name in ("2007_01", "2007_02", "2007_03", "unlabelled"):
        _write_image(base / "JPEGImages" / f"{name}.jpg")
        if name != "unlabelled":
            _write_mask(base / "SegmentationClass" / f"{name}.png", values, palette=True)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_01\n2007_03\n")
    (lists / "val.txt").write_text("2007_02\n")


def _make_ade20k(root: Path, values: Values = (0, 1, 150)) -> None:
    for part, count in (("training", 2), ("validation", 1)):
        for index in range(count):
            name = f"ADE_{part[:5]}_{index:08d}"
            _write_image(root / "images" / part / f"{name}.jpg")
            _write_mask(root / "annotations" / part / f"{name}.png", values)


def _make_cityscapes(root: Path, values: Values = (0, 7, 26, 33, 29, 255)) -> None:
    for part, city in (("train", "ulm"), ("train", "bonn"), ("val", "lindau"), ("test", "berlin")):
        name = f"{city}_000000_000019"
        _write_image(root / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png")
        _write_mask(root / "gtFine" / part / city / f"{name}_gtFine_labelIds.png", values)
        _write_mask(root / "gtFine" / part / city / f"{name}_gtFine_instanceIds.png", (200,))


def _make_stare(root: Path, values: Values = (0, 255)) -> None:
    for index, name in enumerate(("im0001", "im0002", "im0235", "im0324")):
        image, label = root / "stare-images" / f"{name}.ppm", root / "labels-ah" / f"{name}.ah.ppm"
        _write_image(image)
        _write_mask(label, values, mode="RGB")
        if index % 2:
            for path in (image, label):
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()


Make = Callable[[Path, Values], None]
SETS: dict[str, tuple[Make, type[SegmentationData], int, list[int], dict[str, list[str]]]] = {
    "voc": (_make_voc, VOCData, 21, [0, 15, 20, 255], {"train": ["2007_01", "2007_03"], "val": ["2007_02"]}),
    "ade20k": (
        _make_ade20k,
        ADE20KData,
        150,
        [255, 0, 149],
        {"train": ["ADE_train_00000000", "ADE_train_00000001"], "val": ["ADE_valid_00000000"]},
    ),
    "cityscapes": (
        _make_cityscapes,
        CityscapesData,
        19,
        [255, 0, 13, 18, 255, 255],
        {"train": ["bonn/bonn_000000_000019", "ulm/ulm_000000_000019"], "val": ["lindau/lindau_000000_000019"]},
    ),
    "stare": (_make_stare, STAREData, 2, [0, 1], {"train": ["im0001", "im0002"], "val": ["im0235", "im0324"]}),
}


@pytest.mark.parametrize("name", SETS)
def test_a_public_data_set_is_read_from_its_own_layout(tmp_path, name):
    make, kind, classes, labels, parts = SETS[name]
    make(tmp_path)
    data = kind(root=str(tmp_path), **LOADING)
    data.setup("fit")
    data.setup("test")

    found = {part: [source.name(index) for index in range(len(source))] for part, source in data.sources.items()}
    assert found == {**parts, "test": parts["val"]}
    assert len(data.class_names) == len(set(data.class_names)) == classes
    for source in data.sources.values():
        for index in range(len(source)):
            image, mask = source.read(index)
            assert image.shape == (3, *SIZE)
            assert mask[0, : len(labels)].tolist() == labels
            assert torch.equal(mask, mask[:1].expand(SIZE))
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((1, 3, 32, 32), (1, 32, 32))
    assert len(data.build_predict_source()) == len(parts["val"])


@pytest.mark.parametrize(
    ("name", "values", "evidence"),
    [("voc", (0, 21), "value 21"), ("ade20k", (0, 151), "value 151"), ("cityscapes", (0, 34), "value 34")],
)
def test_a_value_that_the_data_set_does_not_have_is_named(tmp_path, name, values, evidence):
    make, kind, *_ = SETS[name]
    make(tmp_path, values)

    with pytest.raises(DataError, match="class out of range") as caught:
        kind(root=str(tmp_path), **LOADING).setup("fit")

    assert "row 0, column 1" in caught.value.where
    assert evidence in caught.value.evidence
    assert caught.value.fix
    kind(root=str(tmp_path), check_masks=False, **LOADING).setup("fit")


def _drop_masks(root: Path, folder: str) -> None:
    next(path for path in sorted((root / folder).rglob("*")) if path.suffix in (".png", ".ppm", ".gz")).unlink()


@pytest.mark.parametrize(
    ("name", "spoil", "what"),
    [
        ("voc", lambda root: _drop_masks(root, "VOCdevkit/VOC2012/SegmentationClass"), "no mask"),
        ("voc", lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink(), "split file cannot be read"),
        ("voc", lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("2008_01"), "not there"),
        ("voc", lambda root: (root / "VOCdevkit").rename(root / "voc"), "not laid out as expected"),
        ("ade20k", lambda root: _drop_masks(root, "annotations/validation"), "no mask"),
        ("ade20k", lambda root: (root / "annotations").rename(root / "labels"), "mask folder is not there"),
        ("ade20k", lambda root: (root / "images").rename(root / "pictures"), "not laid out as expected"),
        ("cityscapes", lambda root: (root / "gtFine").rename(root / "gtCoarse"), "mask folder is not there"),
        ("cityscapes", lambda root: (root / "leftImg8bit" / "val").rename(root / "leftImg8bit" / "x"), "image folder is not there"),
        ("stare", lambda root: _drop_masks(root, "labels-ah"), "no mask"),
        ("stare", lambda root: (root / "labels-ah").rename(root / "labels-vk"), "mask folder is not there"),
        ("stare", lambda root: (root / "stare-images" / "im0002.ppm.gz").write_bytes(b"\x1f\x8b\x08"), "image cannot be read"),
    ],
)
def test_what_is_wrong_with_a_public_data_set_is_said_before_training(tmp_path, name, spoil, what):
    make, kind, *_ = SETS[name]
    make(tmp_path)
    spoil(tmp_path)

    with pytest.raises(DataError, match=what) as caught:
        kind(root=str(tmp_path), **LOADING).setup("fit")

    assert str(tmp_path) in caught.value.where
    assert caught.value.fix


def test_the_options_of_a_public_data_set_are_those_of_every_folder(tmp_path, capsys):
    options = [f"--data.root={tmp_path}", "--data.train_list=train_aug", "--data.crop_size=64", "--config=upernet"]
    assert run(["--data=VOCData", *options, "--print_config"]) == 0

    config = yaml.safe_load(capsys.readouterr().out)
    chosen = config["data"]["init_args"]
    assert (chosen["crop_size"], chosen["train_list"], chosen["val_list"], chosen["ignore_index"]) == (64, "train_aug", "val", 255)
    assert config["model"]["architecture"] == "UPerNet"
    assert "class_names" not in chosen
    assert "code" not in chosen
