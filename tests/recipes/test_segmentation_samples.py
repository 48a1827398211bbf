import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_tree import write_pairs
from torchvision.transforms import v2

from pl_normkit.errors import DataError
from pl_normkit.recipes.segmentation import FolderData, TextureMosaic
from pl_normkit.recipes.segmentation.samples import Augment, CollateNamed, CollatePairs, crop_middle, denormalize, normalize


def _coded(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 8 x 8 pixels; a label of 0 or 1 and the same value as brightness."""
    mask = torch.randint(2, (-(-height // 8), -(-width // 8))).repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width]
    return mask.float().expand(3, -1, -1).clone(), mask


@settings(derandomize=True, deadline=None, max_examples=40)
@given(height=st.integers(1, 90), width=st.integers(1, 90), flip=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 99))
def test_augmentation_keeps_image_and_mask_together(height, width, flip, seed):
    torch.manual_seed(seed)
    image, mask = _coded(height, width)

    cut, labels = Augment(32, scale=(1.0, 1.0), flip=flip, jitter=0.0)(image, mask)

    assert cut.shape == (3, 32, 32)
    assert labels.shape == (32, 32)
    padding = labels == 255
    assert torch.equal(cut[0][~padding], labels[~padding].float())
    assert (~padding).sum() == min(height, 32) * min(width, 32)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_zoom_moves_image_and_mask_alike_and_makes_no_new_labels(factor):
    torch.manual_seed(0)
    image, mask = _coded(64, 64)

    cut, labels = Augment(32, scale=(factor, factor), flip=0.0, jitter=0.0)(image, mask)

    assert set(labels.unique().tolist()) <= {0, 1}
    agreement = ((cut[0] > 0.5).long() == labels).float().mean()
    assert agreement > 0.97


def test_flip_is_the_mirror_image():
    image, mask = _coded(32, 32)

    flipped, labels = Augment(32, scale=(1.0, 1.0), flip=1.0, jitter=0.0)(image, mask)

    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(labels, mask.flip(-1))


def test_jitter_changes_the_image_only():
    torch.manual_seed(0)
    image, mask = _coded(32, 32)
    image = image * 0.5 + 0.2

    changed, labels = Augment(32, scale=(1.0, 1.0), flip=0.0, jitter=0.2)(image, mask)

    assert torch.equal(labels, mask)
    assert not torch.equal(changed, image)
    assert (changed - image).abs().max() < 0.25


def test_transforms_of_torchvision_move_image_and_mask_alike_and_ignore_what_comes_from_outside():
    torch.manual_seed(0)
    mask = torch.zeros(64, 64, dtype=torch.int64)
    mask[:, 32:] = 1
    image = mask.float().expand(3, -1, -1) * 0.5 + 0.25
    augment = Augment(64, scale=(1.0, 1.0), flip=0.0, jitter=0.0, ignore_index=9, transforms=[v2.RandomRotation((40, 40))])

    turned, labels = augment(image, mask)

    assert (turned.dtype, labels.dtype, type(turned), type(labels)) == (torch.float32, torch.int64, torch.Tensor, torch.Tensor)
    outside = turned[0] == 0
    assert set(labels.unique().tolist()) == {0, 1, 9}
    assert torch.equal(labels == 9, outside)
    assert 0.1 < outside.float().mean() < 0.4
    assert torch.equal((turned[0] > 0.5).long()[~outside], labels[~outside])


def test_photometric_transforms_leave_the_mask():
    torch.manual_seed(0)
    image, mask = torch.rand(3, 32, 32) * 0.5, torch.randint(3, (32, 32))

    changed, labels = Augment(32, (1.0, 1.0), 0.0, 0.0, transforms=[v2.RandomPhotometricDistort(p=1.0)])(image, mask)

    assert torch.equal(labels, mask)
    assert not torch.equal(changed, image)


def test_a_transform_that_changes_the_size_is_refused():
    with pytest.raises(DataError, match="changes the size") as caught:
        Augment(32, transforms=[v2.Resize(16)])(*_coded(40, 40))
    assert "Resize: (32, 32) became (16, 16)" in caught.value.evidence


def test_normalization_and_back():
    image = torch.randint(256, (3, 9, 7), dtype=torch.uint8)

    assert torch.equal(denormalize(normalize(image.float() / 255)[None])[0], image)


def test_a_batch_of_several_sizes_is_padded_with_ignored_pixels():
    pairs = [
        (torch.ones(3, 40, 20), torch.zeros(40, 20, dtype=torch.int64)),
        (torch.ones(3, 10, 33), torch.ones(10, 33, dtype=torch.int64)),
    ]

    images, masks = CollatePairs(9)(pairs)

    assert images.shape == (2, 3, 64, 64)
    assert masks.shape == (2, 64, 64)
    assert (masks == 9).sum(dim=(1, 2)).tolist() == [64 * 64 - 40 * 20, 64 * 64 - 10 * 33]
    assert images.sum(dim=(1, 2, 3)).tolist() == [3 * 40 * 20, 3 * 10 * 33]


def test_prediction_batches_keep_names_and_sizes():
    images, names, sizes = CollateNamed()([(torch.ones(3, 40, 20), "a"), (torch.ones(3, 10, 33), "b/c")])

    assert images.shape == (2, 3, 64, 64)
    assert names == ["a", "b/c"]
    assert sizes.tolist() == [[40, 20], [10, 33]]


@pytest.mark.parametrize("collate", [CollatePairs(255), CollateNamed()])
def test_an_error_in_a_worker_travels_as_the_batch(collate):
    error = DataError("broken")

    assert collate([(torch.ones(3, 1, 1), torch.ones(1, 1)), error]) is error
    with pytest.raises(DataError, match="broken"):
        TextureMosaic().on_before_batch_transfer(error, 0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("crop_size", 50),
        ("crop_size", 0),
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("num_workers", -1),
        ("scale", (2.0, 0.5)),
        ("scale", (0.0, 1.0)),
        ("flip", 1.5),
        ("jitter", 1.0),
        ("regions", 0),
        ("train_count", 0),
    ],
)
def test_an_impossible_option_is_named(option, value):
    with pytest.raises(DataError) as caught:
        TextureMosaic(**{option: value})
    assert option in caught.value.where + caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(("height", "width", "top", "left"), [(32, 32, 0, 0), (50, 61, 9, 14), (20, 60, 0, 14), (10, 12, 0, 0)])
def test_the_middle_of_an_image_is_cut_or_padded(height, width, top, left):
    image = torch.rand(3, height, width)

    middle = crop_middle(image, 32)

    assert middle.shape == (3, 32, 32)
    kept = image[:, top : top + 32, left : left + 32]
    assert torch.equal(middle[:, : kept.shape[1], : kept.shape[2]], kept)
    assert middle.count_nonzero() == kept.count_nonzero()


def test_sample_images_have_the_size_of_the_training_crop_whatever_theirs_is(tmp_path):
    for index, size in enumerate([(40, 90), (70, 30), (60, 60), (60, 60)]):
        write_pairs(tmp_path / str(index), 1, size=size)
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / str(index) / kind / "0.png").rename(tmp_path / kind / f"{index}.png")
    (tmp_path / "train.txt").write_text("3\n")
    (tmp_path / "val.txt").write_text("0\n1\n2\n")
    data = FolderData(str(tmp_path), ["a", "b", "c"], crop_size=32, check_masks=False)
    data.setup("fit")

    assert data.sample_images(2).shape == (2, 3, 32, 32)
    assert data.sample_images(9).shape == (3, 3, 32, 32)
    picture = (tmp_path / "images" / "1.png").read_bytes()
    (tmp_path / "images" / "1.png").write_bytes(picture[: len(picture) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        data.sample_images(2)
