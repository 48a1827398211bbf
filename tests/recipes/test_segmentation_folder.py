from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_tree import CLASSES, write_pairs

from pl_normkit.errors import DataError
from pl_normkit.recipes.segmentation import FolderData


def _names(data: FolderData) -> dict[str, list[str]]:
    return {part: [source.name(index) for index in range(len(source))] for part, source in data.sources.items()}


def _set_up(root: Path, **options) -> FolderData:
    data = FolderData(str(root), crop_size=32, num_workers=0, **options)
    data.setup("fit")
    return data


@pytest.mark.parametrize("palette", [True, False])
def test_palette_and_index_masks_give_their_class_indices(tmp_path, palette):
    write_pairs(tmp_path, 4, palette=palette)
    expected = np.array(Image.open(tmp_path / "masks" / "0.png"))

    data = _set_up(tmp_path, classes=list(CLASSES))
    samples = {source.name(index): source.read(index) for source in data.sources.values() for index in range(len(source))}
    image, mask = samples["0"]

    assert sorted(samples) == ["0", "1", "2", "3"]
    assert mask.dtype == torch.int64
    assert np.array_equal(mask.numpy(), expected)
    assert image.shape == (3, 50, 60)
    assert image.dtype == torch.uint8


def test_sixteen_bit_and_binary_masks_are_read(tmp_path):
    write_pairs(tmp_path, 2)
    Image.fromarray(np.array(Image.open(tmp_path / "masks" / "0.png")).astype(np.uint16)).save(tmp_path / "masks" / "0.png")
    binary = np.zeros((50, 60), dtype=bool)
    binary[3] = True
    Image.fromarray(binary).save(tmp_path / "masks" / "1.png")

    data = _set_up(tmp_path, classes=list(CLASSES), check_masks=False)
    by_name = {source.name(0): source.read(0)[1] for source in data.sources.values()}

    assert set(by_name["0"].unique().tolist()) == {0, 1, 2}
    assert by_name["1"].sum().item() == 60


def test_the_split_by_seed_is_deterministic_and_disjoint(folder):
    first, second = _names(_set_up(folder, seed=1, val_share=0.4)), _names(_set_up(folder, seed=1, val_share=0.4))
    others = [_names(_set_up(folder, seed=seed, val_share=0.4)) for seed in range(2, 6)]

    assert first == second
    assert sorted(first["train"] + first["val"]) == ["0", "1", "2", "3", "4", "5"]
    assert len(first["val"]) == 2
    assert any(other != first for other in others)


def test_the_split_by_files(folder):
    (folder / "train.txt").write_text("3\n1\n\n")
    (folder / "val.txt").write_text("0\n")
    (folder / "test.txt").write_text("5\n")

    data = _set_up(folder)
    data.setup("test")

    assert _names(data) == {"train": ["3", "1"], "val": ["0"], "test": ["5"]}


def test_the_split_by_folders_with_nested_images(tmp_path):
    write_pairs(tmp_path / "train", 3)
    write_pairs(tmp_path / "val", 2)
    for kind in ("images", "masks"):
        (tmp_path / "train" / kind / "town").mkdir()
        (tmp_path / "train" / kind / "2.png").rename(tmp_path / "train" / kind / "town" / "2.png")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))

    data = _set_up(tmp_path, classes=str(tmp_path / "names.txt"))
    data.setup("test")

    assert _names(data) == {"train": ["0", "1", "town/2"], "val": ["0", "1"], "test": ["0", "1"]}
    assert data.class_names == list(CLASSES)


def test_batches_have_the_documented_shapes(folder):
    data = _set_up(folder, batch_size=2)

    images, masks = next(iter(data.train_dataloader()))
    val_images, val_masks = next(iter(data.val_dataloader()))

    assert (images.shape, masks.shape) == ((2, 3, 32, 32), (2, 32, 32))
    assert (images.dtype, masks.dtype) == (torch.float32, torch.int64)
    assert (val_images.shape, val_masks.shape) == ((1, 3, 64, 64), (1, 64, 64))
    assert (val_masks[0, 50:] == 255).all()
    assert (val_masks[0, :, 60:] == 255).all()
    assert (val_masks[0, :50, :60] < 3).all()


def _break_image(root: Path) -> None:
    (root / "images" / "2.png").write_bytes(b"not a picture")


def _colour_mask(root: Path) -> None:
    Image.new("RGB", (60, 50)).save(root / "masks" / "2.png")


def _deep_image(root: Path) -> None:
    Image.fromarray(np.zeros((50, 60), dtype=np.uint16)).save(root / "images" / "2.png")


def _resize_mask(root: Path) -> None:
    Image.new("L", (50, 60)).save(root / "masks" / "2.png")


def _class_out_of_range(root: Path) -> None:
    mask = np.array(Image.open(root / "masks" / "2.png"))
    mask[7, 9] = 3
    mask[8, 9] = 200
    Image.fromarray(mask).save(root / "masks" / "2.png")


def _drop_mask(root: Path) -> None:
    (root / "masks" / "2.png").unlink()


def _double_name(root: Path) -> None:
    Image.new("RGB", (60, 50)).save(root / "images" / "2.jpg")


def _truncate_mask(root: Path) -> None:
    path = root / "masks" / "2.png"
    path.write_bytes(path.read_bytes()[:-40])


def _empty_images(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.unlink()


def _foreign_files(root: Path) -> None:
    _empty_images(root)
    (root / "images" / "notes.doc").write_text("x")


def _no_masks(root: Path) -> None:
    (root / "masks").rename(root / "labels")


def _one_pair(root: Path) -> None:
    for path in (root / "images").iterdir():
        if path.stem != "2":
            path.unlink()


def _foreground_as_255(root: Path) -> None:
    for path in (root / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray((255 * (mask > 0)).astype(np.uint8)).save(path)


def _unknown_split_name(root: Path) -> None:
    (root / "train.txt").write_text("0\n22\n")
    (root / "val.txt").write_text("1\n")


def _shared_split_name(root: Path) -> None:
    (root / "train.txt").write_text("0\n1\n")
    (root / "val.txt").write_text("1\n")


def _no_val_file(root: Path) -> None:
    (root / "train.txt").write_text("0\n1\n")


def _empty_split_file(root: Path) -> None:
    (root / "train.txt").write_text("\n")
    (root / "val.txt").write_text("1\n")


def _only_train_folder(root: Path) -> None:
    write_pairs(root / "train", 2)


@pytest.mark.parametrize(
    ("spoil", "what", "where", "evidence"),
    [
        (_break_image, "image cannot be read", "images/2.png", "UnidentifiedImageError"),
        (_truncate_mask, "mask cannot be read", "masks/2.png", "OSError"),
        (_colour_mask, "mask does not hold class indices", "masks/2.png", "RGB"),
        (_deep_image, "more than 8 bits", "images/2.png", "I;16"),
        (_resize_mask, "another size", "masks/2.png", "mask 50 x 60, image 60 x 50"),
        (
            _class_out_of_range,
            "class out of range",
            "masks/2.png, row 7, column 9",
            "value 3, in 2 of 3000 pixels; other wrong values: [200]",
        ),
        (_drop_mask, "no mask", "images/2.png", "1 of 6"),
        (_double_name, "two images have one name", "images", "2.jpg and 2.png"),
        (_empty_images, "empty", "images", "no entries"),
        (_foreign_files, "empty", "images", "1 entries, none of them an image"),
        (_no_masks, "mask folder is not there", "masks", "nothing at this path"),
        (_one_pair, "cannot be split", "images", "2.png"),
        (_foreground_as_255, "fewer than two classes", "masks", "[0, 255]"),
        (_unknown_split_name, "names an image that is not there", "train.txt, line 2", "'22'"),
        (_shared_split_name, "both training and validation", "train.txt", "'1'"),
        (_no_val_file, "split file cannot be read", "val.txt", "FileNotFoundError"),
        (_empty_split_file, "split file is empty", "train.txt", ""),
        (_only_train_folder, "image folder is not there", "val/images", "nothing"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_before_training(folder, spoil, what, where, evidence):
    spoil(folder)

    with pytest.raises(DataError) as caught:
        _set_up(folder)

    assert what in caught.value.what
    assert where in caught.value.where
    assert evidence in caught.value.evidence
    assert caught.value.fix


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        (None, "class list cannot be read", "classes.txt"),
        (b"", "at least two classes", "classes.txt"),
        (b"sky\n", "at least two classes", "classes.txt"),
        (b"sky\n\nroad\n", "no name", "classes.txt, line 2"),
        (b"sky\nroad\nsky\n", "named twice", "classes.txt"),
        (b"\xff\xfe\x00sky", "class list cannot be read", "classes.txt"),
    ],
)
def test_a_wrong_class_list_is_refused(folder, content, what, where):
    path = folder / "classes.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DataError) as caught:
        FolderData(str(folder))

    assert what in caught.value.what
    assert where in caught.value.where
    assert caught.value.fix


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(DataError, match="data folder is not there") as caught:
        FolderData(str(tmp_path / "nowhere"))
    assert caught.value.where == str(tmp_path / "nowhere")


def test_an_ignore_index_that_is_a_class_is_refused(folder):
    with pytest.raises(DataError, match="ignore_index"):
        FolderData(str(folder), ignore_index=2)


def test_another_ignore_index_makes_a_value_legal(folder):
    _class_out_of_range(folder)
    mask = np.array(Image.open(folder / "masks" / "2.png"))
    mask[mask == 3] = 200
    Image.fromarray(mask).save(folder / "masks" / "2.png")

    data = _set_up(folder, ignore_index=200)

    assert sum(len(source) for source in data.sources.values()) == 6


def test_only_headers_are_read_when_masks_are_not_checked(folder):
    _class_out_of_range(folder)

    data = _set_up(folder, check_masks=False)
    items = [data.sources[part] for part in ("train", "val")]

    with pytest.raises(DataError, match="class out of range"):
        [source.read(index) for source in items for index in range(len(source))]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_while_training_is_one_error_without_a_workers_traceback(folder, num_workers):
    data = FolderData(str(folder), crop_size=32, num_workers=num_workers, batch_size=1)
    data.setup("fit")
    broken = [pair.image for pair in data.sources["train"].pairs]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(DataError) as caught:
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)

    assert caught.value.what == "the image cannot be read"
    assert caught.value.where in {str(path) for path in broken}
    assert "Traceback" not in str(caught.value)
