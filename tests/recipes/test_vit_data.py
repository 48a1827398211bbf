import pytest
import torch
from torchvision import datasets
from torchvision_trees import LABELS, WRITERS, pixel, write_tree
from vit_tree import CLASSES, write_class_folders

from pl_normkit.errors import DataError
from pl_normkit.recipes.vit import Digits, FolderData, TorchvisionData


def test_digits_are_split_once_and_normalized():
    data = Digits(batch_size=1078, cutmix=0.0, erase=0.0, scale=(1.0, 1.0), jitter=0.0, image_size=8)
    for stage in ("fit", "test"):
        data.setup(stage)
    sizes = {part: len(source) for part, source in data.sources.items()}
    assert sizes == {"train": 1079, "val": 359, "test": 359}
    seen = [source.images.flatten(1) for source in data.sources.values()]
    assert len(torch.cat(seen)) == 1797

    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (1078, 1, 8, 8)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert abs(float(images.mean())) < 0.01
    assert abs(float((images**2).mean()) - 1) < 0.01


def test_training_batches_keep_the_second_moment_of_the_images():
    """CutMix and erasing with noise move it by less than the 5 % at which positional variance shifts count."""
    torch.manual_seed(0)
    data = Digits(batch_size=1078, cutmix=1.0, erase=1.0, scale=(1.0, 1.0), jitter=0.0)
    data.setup("fit")

    images, shares = next(iter(data.train_dataloader()))
    plain = torch.cat([batch[0] for batch in data.val_dataloader()])

    assert shares.shape == (1078, 10)
    assert torch.allclose(shares.sum(1), torch.ones(1078))
    assert abs(float((images**2).mean() / (plain**2).mean()) - 1) < 0.05


def test_class_folders_without_parts_are_drawn_by_seed(tmp_path):
    write_class_folders(tmp_path, 5)

    def draw(seed: int) -> tuple[set[str], set[str]]:
        data = FolderData(str(tmp_path), seed=seed, val_share=0.4)
        data.setup("fit")
        assert data.class_names == list(CLASSES)
        train, val = ({source.name(index) for index in range(len(source))} for source in (data.sources["train"], data.sources["val"]))
        assert (len(train), len(val)) == (9, 6)
        assert not train & val
        assert {name.partition("/")[0] for name in val} == set(CLASSES)
        return train, val

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    write_class_folders(tmp_path, 1)
    with pytest.raises(DataError, match="one image cannot be split"):
        FolderData(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image_size", 0),
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("num_workers", -1),
        ("scale", (0.9, 0.1)),
        ("jitter", 1.0),
        ("flip", 2.0),
        ("erase", -0.1),
        ("cutmix", 1.5),
        ("mean", [0.5]),
        ("std", [0.0]),
    ],
)
def test_a_data_option_that_cannot_be_used_is_named(option, value):
    given = {option: value} if option != "std" else {"std": value, "mean": [0.5]}
    with pytest.raises(DataError, match=f"data option {option} cannot be used"):
        Digits(**given)


def test_torchvision_data_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(DataError, match="CIFAR10 is not there") as caught:
        TorchvisionData("CIFAR10", root=str(tmp_path)).setup("fit")
    assert "--data.download true" in caught.value.fix
    with pytest.raises(DataError, match="no torchvision data set 'CIFAR11'") as caught:
        TorchvisionData("CIFAR11")
    assert "did you mean 'CIFAR10'?" in caught.value.fix


def test_a_download_without_network_is_one_error(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets.MNIST, "download", fail)
    with pytest.raises(DataError, match="MNIST cannot be downloaded") as caught:
        TorchvisionData("MNIST", root=str(tmp_path), download=True).setup("fit")
    assert "Name or service not known" in caught.value.evidence


@pytest.mark.parametrize(("name", "channels"), [("CIFAR10", 3), ("MNIST", 1)])
def test_torchvision_data_is_split_and_batched(name, channels, monkeypatch):
    def fake(root, train, download):
        size = 40 if train else 10
        images = datasets.FakeData(size, (channels, 28, 28), 10, random_offset=int(train))
        images.classes = [f"class {index}" for index in range(10)]
        return images

    monkeypatch.setattr(datasets, name, fake)
    data = TorchvisionData(name, batch_size=8, num_workers=0, image_size=24)
    for stage in ("fit", "test"):
        data.setup(stage)

    assert {part: len(source) for part, source in data.sources.items()} == {"train": 36, "val": 4, "test": 10}
    assert (data.class_names[3], data.in_chans) == ("class 3", channels)
    assert next(iter(data.train_dataloader()))[0].shape == (8, channels, 24, 24)
    assert len(data.normalization.mean) == channels
    images, names = next(iter(data.predict_dataloader()))
    assert (images.shape, names[:2]) == ((10, channels, 24, 24), ("0", "1"))


_NAMES = {
    "FGVCAircraft": ["wing 0", "wing 1", "wing 2"],
    "Food101": ["dish0", "dish1", "dish2"],
    "GTSRB": [str(label) for label in range(43)],
    "OxfordIIITPet": ["Breed0", "Breed1", "Breed2"],
}


@pytest.mark.parametrize("name", WRITERS)
def test_torchvision_reads_its_own_files(name, tmp_path, monkeypatch):
    """Labels fit their images, in the right part; each image tells its class."""
    write_tree(name, tmp_path, monkeypatch)
    data = TorchvisionData(name, root=str(tmp_path), num_workers=0, val_share=1 / 6)
    for stage in ("fit", "test"):
        data.setup(stage)

    names = data.class_names
    assert names == _NAMES[name] if name in _NAMES else len(names) == 10
    read = {part: [source.read(index) for index in range(len(source))] for part, source in data.sources.items()}
    assert {part: len(items) for part, items in read.items()} == {"train": 5, "val": 1, "test": 3}
    for image, label in [item for items in read.values() for item in items]:
        assert image.shape == (data.in_chans, 16, 16)
        assert (image.int() - pixel(label)).abs().max() <= 1  # JPEG and USPS' own scale round
    for part, labels in (("train", read["train"] + read["val"]), ("test", read["test"])):
        assert sorted(label for _, label in labels) == sorted(LABELS[part])
