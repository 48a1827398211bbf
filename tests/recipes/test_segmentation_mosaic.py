import importlib.util

import pytest
import torch

from pl_normkit.errors import DataError
from pl_normkit.recipes.photographs import cut_part
from pl_normkit.recipes.segmentation import TEXTURES, TextureMosaic
from pl_normkit.recipes.segmentation.mosaic import MosaicSource, compose_mosaic, load_photograph


def _numbered_photographs() -> list[torch.Tensor]:
    """As large as the real ones, but every pixel has a number of its own."""
    shapes = [load_photograph(texture).shape for texture in TEXTURES]
    starts = torch.tensor([0, *(height * width for height, width in shapes)]).cumsum(0).tolist()
    return [torch.arange(start, start + h * w).view(h, w) for start, (h, w) in zip(starts, shapes, strict=False)]


def _pixels(photographs: list[torch.Tensor], part: str) -> torch.Tensor:
    source = MosaicSource(photographs, part, count=30, size=128, regions=6, seed=0)
    return torch.cat([source.compose(index)[0].flatten() for index in range(len(source))]).unique()


@pytest.mark.parametrize("part", ["val", "test"])
def test_training_shares_no_pixel_with_evaluation(part):
    photographs = _numbered_photographs()
    train, held_out = _pixels(photographs, "train"), _pixels(photographs, part)

    assert len(train) > 100_000
    assert len(held_out) > 100_000
    assert not torch.isin(train, held_out).any()


def test_the_parts_make_up_the_photograph():
    photograph = torch.arange(12 * 10).view(12, 10)

    assert torch.equal(torch.cat([cut_part(photograph, "train"), cut_part(photograph, "val")], dim=1), photograph)


def test_at_least_six_real_photographs_are_bundled():
    photographs = [load_photograph(texture) for texture in TEXTURES]

    assert len({texture.file for texture in TEXTURES}) == len(TEXTURES) >= 6
    assert all(photograph.dtype == torch.uint8 and photograph.float().std() > 5 for photograph in photographs)


def test_each_label_covers_its_own_texture():
    parts = [torch.full((20, 15), value, dtype=torch.uint8) for value in range(5)]

    mosaic, labels = compose_mosaic(parts, 40, 9, torch.Generator().manual_seed(3))

    assert torch.equal(mosaic.long(), labels)
    assert len(labels.unique()) > 1


def test_a_small_photograph_is_mirrored_not_stretched():
    part = torch.arange(6).view(2, 3)

    mosaic, _ = compose_mosaic([part], 5, 1, torch.Generator().manual_seed(0))

    expected_rows = [[0, 1, 2, 2, 1], [3, 4, 5, 5, 4]]
    assert mosaic.tolist() == [expected_rows[row] for row in (0, 1, 1, 0, 0)]


def _samples(data: TextureMosaic, part: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [data.sources[part].read(index) for index in range(count)]


def test_the_seed_decides_every_mosaic():
    first, second, other = (TextureMosaic(seed=seed) for seed in (7, 7, 8))
    for data in (first, second, other):
        data.setup("fit")
        data.setup("test")

    for part in ("train", "val", "test"):
        for (image, mask), (same_image, same_mask) in zip(_samples(first, part, 3), _samples(second, part, 3), strict=True):
            assert torch.equal(image, same_image)
            assert torch.equal(mask, same_mask)
        assert not torch.equal(_samples(first, part, 1)[0][0], _samples(other, part, 1)[0][0])
    assert not torch.equal(_samples(first, "val", 1)[0][1], _samples(first, "test", 1)[0][1])


def test_all_classes_occur_about_equally_often():
    data = TextureMosaic(val_count=100)
    data.setup("validate")

    masks = torch.stack([data.sources["val"].read(index)[1] for index in range(100)])
    shares = masks.flatten().bincount(minlength=len(TEXTURES)) / masks.numel()

    assert shares.min() > 0.08
    assert shares.max() < 0.17
    majority_miou = shares.max().item() / len(TEXTURES)
    assert majority_miou < 0.022


def test_a_missing_scikit_image_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(DataError, match=r"scikit-image.*not installed") as caught:
        TextureMosaic().setup("fit")
    assert "pl_normkit[demo]" in caught.value.fix
