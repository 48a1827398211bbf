"""Boxes from files, their way through squashing and flipping, label maps, and the built-in scenes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from boxes_tree import SIZE, write_box, write_boxed
from PIL import Image

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.recipes.boxes import BoxFolderData, COCOBoxData, TextureObjects, VOCBoxData
from pl_normkit.recipes.boxes.annotations import Boxes, read_boxes
from pl_normkit.recipes.boxes.labelling import Labels, LabelScores, box_labels, label_image
from pl_normkit.recipes.boxes.refine import refine, require_refinement
from pl_normkit.recipes.boxes.samples import BoxBatch, BoxDataset, LabelledSource, join_labels, part_labels

NAMES = ["background", "cat", "dog"]


@pytest.mark.parametrize("suffix", [".json", ".txt", ".xml"])
def test_every_format_says_the_same(tmp_path: Path, suffix):
    write_box(tmp_path / f"a{suffix}", (10, 20, 50, 44), 2)
    found = read_boxes(tmp_path / f"a{suffix}", NAMES, SIZE)
    torch.testing.assert_close(found.boxes, torch.tensor([[10.0, 20.0, 50.0, 44.0]]), rtol=0, atol=1e-3)
    assert found.labels.tolist() == [2]


def _json(boxes: object, labels: object) -> str:
    return json.dumps({"boxes": boxes, "labels": labels})


@pytest.mark.parametrize(
    ("name", "text", "what", "evidence"),
    [
        ("a.json", "[]", "cannot be read", ""),
        ("a.json", "{", "cannot be read", ""),
        ("a.json", _json([[1, 2, 3, 4]], []), "cannot be read", "1 boxes and 0 labels"),
        ("a.json", _json([[1, 2, 3]], ["cat"]), "not four numbers", "[1.0, 2.0, 3.0]"),
        ("a.json", _json([[10, 10, 5, 20]], ["cat"]), "no area", "5.0"),
        ("a.json", _json([[10, 10, 500, 20]], ["cat"]), "leaves its image", "96 x 64"),
        ("a.json", _json([[1, 2, 30, 40]], ["cta"]), "not in the class list", "'cta'"),
        ("a.json", _json([[1, 2, 30, 40]], ["background"]), "not in the class list", "'background'"),
        ("a.txt", "0 0.5 0.5 0.2", "cannot be read", ""),
        ("a.txt", "2 0.5 0.5 0.2 0.2", "not in the class list", "number 2"),
        ("a.txt", "0 50 50 20 20", "leaves its image", ""),
        ("a.xml", "<annotation>", "cannot be read", "ParseError"),
        ("a.xml", "<annotation><object><name>cat</name></object></annotation>", "cannot be read", "without bndbox"),
    ],
)
def test_what_is_wrong_with_a_file_of_boxes_is_said(tmp_path: Path, name, text, what, evidence):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=what) as caught:
        read_boxes(tmp_path / name, NAMES, SIZE)
    assert name in caught.value.where
    assert evidence in caught.value.evidence
    assert caught.value.fix


def test_a_squashed_and_flipped_image_takes_its_boxes_along(tmp_path: Path):
    """The box of the bright rectangle is where the pixels are bright."""
    write_boxed(tmp_path, 4)
    source = BoxFolderData(str(tmp_path), val_share=0.25).build_sources(("train",))["train"]
    for flip in (0.0, 1.0):
        item = BoxDataset(source, 128, flip=flip)[0]
        assert isinstance(item, BoxBatch)
        rows, columns = (item.images[0].mean(0) > item.images[0].mean()).nonzero(as_tuple=True)
        bounds = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        torch.testing.assert_close(item.boxes[0][0], bounds, rtol=0, atol=2.0)


def test_two_label_maps_travel_as_one_and_are_checked(tmp_path: Path):
    first, second = torch.randint(256, (9, 9)), torch.randint(256, (9, 9))
    back = part_labels(join_labels(first, second))
    assert torch.equal(back[0], first)
    assert torch.equal(back[1], second)
    write_boxed(tmp_path, 2)
    source = BoxFolderData(str(tmp_path), val_share=0.5).build_sources(("train",))["train"]
    labelled = LabelledSource(source, tmp_path / "labels", 3)
    with pytest.raises(DataError, match="label map cannot be read"):
        labelled.read(0)
    for kind, value, size in (("first", 2, SIZE), ("second", 7, SIZE)):
        (tmp_path / "labels" / kind).mkdir(parents=True)
        Image.fromarray(np.full(size, value, np.uint8)).save(tmp_path / "labels" / kind / f"{source.name(0)}.png")
    with pytest.raises(DataError, match="other classes"):
        labelled.read(0)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "labels" / "second" / f"{source.name(0)}.png")
    with pytest.raises(DataError, match="another size"):
        labelled.read(0)


def test_a_class_is_labelled_in_its_own_boxes_alone():
    torch.manual_seed(0)
    image, features = torch.randint(256, (3, 40, 48), dtype=torch.uint8), torch.randn(8, 10, 12)
    found = Boxes(torch.tensor([[4.0, 4.0, 20.0, 30.0], [16.0, 10.0, 44.0, 36.0]]), torch.tensor([1, 2]))
    labels = label_image(image, features, torch.rand(10, 12), torch.randn(3, 8), found, refinement="guided", threshold=0.5)
    for values in (labels.first, labels.second):
        for label, (left, top, right, bottom) in zip((1, 2), found.boxes.int().tolist(), strict=True):
            outside = torch.ones(40, 48, dtype=torch.bool)
            outside[top:bottom, left:right] = False
            assert not bool((values[outside] == label).any())
    assert float(labels.confidence.min()) >= 0
    assert float(labels.confidence.max()) <= 1
    empty = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    nothing = label_image(image, features, torch.ones(10, 12), torch.randn(3, 8), empty, refinement="guided", threshold=0.5)
    assert int(nothing.first.abs().sum() + nothing.second.abs().sum()) == 0


def test_labels_are_scored_by_masks_where_there_are_any():
    found = Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0], [2.0, 2.0, 4.0, 4.0]]), torch.tensor([1, 2]))
    filled = box_labels(found, (8, 8))
    assert (int((filled == 2).sum()), int((filled == 1).sum())) == (4, 60)
    scores = LabelScores(3)
    scores.update(Labels(filled, filled, torch.ones(8, 8)), filled, torch.full((8, 8), 255))
    assert scores.means() == {}
    half = filled.clone()
    half[:, 4:] = 0
    scores.update(Labels(filled, half, torch.ones(8, 8)), filled, filled)
    assert scores.means()["first (refined)"] == 1.0
    assert scores.means()["second (retrieval)"] == pytest.approx((0 + 28 / 60 + 1) / 3)
    assert scores.differing == 32


def test_without_pydensecrf_the_dense_crf_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pydensecrf") as caught:
        require_refinement("crf")
    assert "pydensecrf2" in caught.value.fix
    require_refinement("guided")


def test_the_dense_crf_follows_an_edge():
    pytest.importorskip("pydensecrf")
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[:, :, 12:] = 200
    scores = torch.zeros(3, 24, 24)
    scores[0, :, :9], scores[2, :, 9:] = 1.0, 1.0
    expected = torch.zeros(24, 24, dtype=torch.int64)
    expected[:, 12:] = 2
    assert torch.equal(refine(image, scores, "crf").argmax(0), expected)


def test_built_in_boxes_bound_what_is_seen_and_seeds_decide():
    data = TextureObjects(train_count=12, val_count=2, image_size=64, most=1)
    source = data.build_sources(("train",))["train"]
    for index in range(12):
        mask, found = source.read(index)[1], source.read_boxes(index)
        rows, columns = (mask > 0).nonzero(as_tuple=True)
        bounds = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        assert torch.equal(found.boxes, bounds[None])
        assert found.labels.tolist() == mask[mask > 0].unique().tolist()
    other = TextureObjects(seed=1, train_count=12, val_count=2, image_size=64).build_sources(("train",))["train"]
    assert not torch.equal(other.read(0)[0], source.read(0)[0])


def test_voc_trains_on_annotations_and_scores_by_masks(tmp_path: Path):
    base = tmp_path / "VOCdevkit" / "VOC2012"
    write_boxed(base, 4, form="xml")
    for old, new in (("images", "JPEGImages"), ("boxes", "Annotations"), ("masks", "SegmentationClass")):
        (base / old).rename(base / new)
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, lines in (("train", "0\n1\n2\n"), ("val", "3\n")):
        (base / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(lines)
    sources = VOCBoxData(str(tmp_path)).build_sources(("train", "val"))
    assert (len(sources["train"]), len(sources["val"])) == (3, 1)
    assert sources["train"].read_boxes(0).labels.tolist() == [8]  # VOC's cat
    assert sources["train"].read(0)[1].unique().tolist() == [0, 1]
    (base / "Annotations" / "1.xml").unlink()
    with pytest.raises(DataError, match="a training image has no boxes"):
        VOCBoxData(str(tmp_path)).build_sources(("train",))


def test_coco_boxes_and_masks_agree(tmp_path: Path):
    (tmp_path / "annotations").mkdir()
    content = {
        "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 50}, {"id": 6, "file_name": "b.png", "height": 40, "width": 50}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 5, "category_id": 17, "bbox": [10, 12, 20, 8], "area": 160, "segmentation": [[10, 12, 29, 12, 29, 19, 10, 19]]},
            {"image_id": 5, "category_id": 3, "bbox": [0, 30, 50, 10], "iscrowd": 1, "segmentation": {"counts": [1], "size": [40, 50]}},
        ],
    }
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        for image in content["images"]:
            Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / part / image["file_name"])
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    data = COCOBoxData(str(tmp_path))
    assert data.class_names == ["background", "dog", "cat"]
    sources = data.build_sources(("train", "val"))
    assert (len(sources["train"]), len(sources["val"])) == (1, 2)
    mask, found = sources["train"].read(0)[1], sources["train"].read_boxes(0)
    assert (found.boxes.tolist(), found.labels.tolist()) == ([[10, 12, 30, 20]], [2])
    rows, columns = (mask == 2).nonzero(as_tuple=True)
    assert [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1] == [10, 12, 30, 20]
    assert mask[35, 5] == 255
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(DataError, match="annotations cannot be read"):
        data.build_sources(("train",))


def _spoil_box(folder: Path) -> None:
    write_box(folder / "boxes" / "3.json", (50, 10, 20, 30), 1)


def _remove_boxes(folder: Path) -> None:
    for path in (folder / "boxes").iterdir():
        path.unlink()


def _empty_boxes(folder: Path) -> None:
    for path in (folder / "boxes").iterdir():
        path.write_text('{"boxes": [], "labels": []}')


def _save(kind: str, pixels: np.ndarray):
    def spoil(folder: Path) -> None:
        Image.fromarray(pixels).save(folder / kind / "3.png")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "what", "where"),
    [
        (_spoil_box, "no area", "boxes/3.json, box 1"),
        (_remove_boxes, "a training image has no boxes", "images/"),
        (_empty_boxes, "no training image has a box", "images"),
        (_save("masks", np.zeros((10, 10), np.uint8)), "another size than its image", "masks/3.png"),
        (_save("masks", np.full(SIZE, 9, np.uint8)), "class out of range", "masks/3.png"),
        (_save("masks", np.zeros((*SIZE, 3), np.uint8)), "does not hold class indices", "masks/3.png"),
        (_save("images", np.zeros(SIZE, np.uint16)), "more than 8 bits", "images/3.png"),
        (lambda folder: (folder / "classes.txt").write_text(""), "at least one class", "classes.txt"),
        (lambda folder: (folder / "images" / "3.png").write_bytes(b"no picture"), "image cannot be read", "images/3.png"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_before_training(tmp_path: Path, spoil, what, where):
    write_boxed(tmp_path, 5)
    spoil(tmp_path)
    with pytest.raises(DataError) as caught:
        BoxFolderData(str(tmp_path)).build_sources(("train", "val"))
    assert what in caught.value.what
    assert where in caught.value.where
    assert caught.value.fix
