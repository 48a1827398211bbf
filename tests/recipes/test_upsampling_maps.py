"""Reduction and enlargement against PIL, filters against loops, map files against what was written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pl_normkit.errors import DataError
from pl_normkit.recipes.upsampling import joint_bilateral
from pl_normkit.recipes.upsampling.maps import map_file, one_hot, read_map, write_map
from pl_normkit.recipes.upsampling.resample import enlarge, fill_unknown, reduce_map
from pl_normkit.recipes.upsampling.samples import Batch, Sample, Task, UpsamplingDataset, collate
from pl_normkit.recipes.upsampling.scores import rmse, wrong_share

NAN = float("nan")


def _by_pil(values: torch.Tensor, size: tuple[int, int], how: Image.Resampling) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.fromarray(values.numpy()).resize((size[1], size[0]), how)))


@pytest.mark.parametrize(("how", "pil"), [("bicubic", Image.Resampling.BICUBIC), ("nearest", Image.Resampling.NEAREST)])
@pytest.mark.parametrize("factor", [3, 4, 8])
def test_coarse_maps_are_those_of_pil(how, pil, factor):
    fine = torch.rand(48, 72)
    coarse = reduce_map(fine[None], factor, how)[0]
    torch.testing.assert_close(coarse, _by_pil(fine, (48 // factor, 72 // factor), pil), rtol=0, atol=1e-5)
    torch.testing.assert_close(enlarge(coarse[None], (48, 72))[0], _by_pil(coarse, (48, 72), Image.Resampling.BICUBIC), rtol=0, atol=1e-5)


def test_unknown_pixels_get_values_from_around_and_known_ones_stay():
    maps = torch.rand(2, 13, 17)
    holed = maps.clone()
    holed[:, 3:9, 2:14] = NAN
    filled = fill_unknown(holed)
    known = holed.isfinite()
    assert torch.equal(filled[known], maps[known])
    assert float(filled.min()) >= float(maps.min())
    assert float(filled.max()) <= float(maps.max())
    one = torch.full((1, 9, 9), NAN)
    one[0, 4, 7] = 3.0
    assert torch.equal(fill_unknown(one), torch.full((1, 9, 9), 3.0))


def test_joint_bilateral_is_its_formula():
    guidance, coarse = torch.rand(3, 8, 12), torch.rand(2, 4, 6)
    small = guidance.reshape(3, 4, 2, 6, 2).mean((2, 4))
    expected = torch.zeros(2, 8, 12)
    for y in range(8):
        for x in range(12):
            row, column, total = (y + 0.5) / 2 - 0.5, (x + 0.5) / 2 - 0.5, 0.0
            for step in range(-2, 3):
                for side in range(-2, 3):
                    r, c = round(row) + step, round(column) + side
                    a, b = min(max(r, 0), 3), min(max(c, 0), 5)
                    colour = float((guidance[:, y, x] - small[:, a, b]).square().mean())
                    weight = np.exp(-((r - row) ** 2 + (c - column) ** 2) / (2 * 0.8**2) - colour / (2 * 0.1**2)) + 1e-12
                    expected[:, y, x] += weight * coarse[:, a, b]
                    total += weight
            expected[:, y, x] /= total
    torch.testing.assert_close(joint_bilateral(guidance, coarse), expected, rtol=1e-4, atol=1e-5)
    flat = joint_bilateral(guidance, torch.full((1, 4, 6), 0.3))
    torch.testing.assert_close(flat, torch.full((1, 8, 12), 0.3))


def test_scores_leave_out_border_and_unknown_pixels():
    truth, found = torch.zeros(1, 20, 20), torch.zeros(1, 20, 20)
    found[0, :6] = 9.0
    found[0, 7, 7] = 4.0
    truth[0, 8, 8] = NAN
    assert rmse(found, truth) == pytest.approx(np.sqrt(16 / 63))
    planes = one_hot(torch.zeros(20, 20), 2, Path("a.png"))
    guess = planes.clone()
    guess[:, 7, 7] = torch.tensor([0.1, 0.9])
    assert wrong_share(guess, planes) == pytest.approx(1 / 64)
    assert np.isnan(rmse(found, torch.full((1, 20, 20), NAN)))


def test_map_files_come_back_with_unknown_pixels(tmp_path: Path):
    values = torch.tensor([[1.0, 2.0, 300.0], [4.0, 0.0, 6.0]])
    for suffix in (".npy", ".tif", ".png"):
        write_map(values, tmp_path / suffix[1:] / f"a{suffix}")
        path = map_file(tmp_path / suffix[1:], "a")
        assert path is not None
        back = read_map(path, 0)
        assert torch.equal(back.nan_to_num(0), values)
        assert int(back.isnan().sum()) == 1
    (tmp_path / "b.pfm").write_bytes(b"Pf\n3 2\n-1.0\n" + values.flip(0).numpy().astype("<f4").tobytes())
    assert torch.equal(read_map(tmp_path / "b.pfm", None), values)
    (tmp_path / "c.pfm").write_bytes(b"Pf\n3 2\n1.0\n" + torch.full((2, 3), torch.inf).numpy().astype(">f4").tobytes())
    with pytest.raises(DataError, match="no known pixel"):
        read_map(tmp_path / "c.pfm", None)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.pfm", b"PF\n1 1\n-1\n" + bytes(12), "cannot be read"),
        ("a.pfm", b"Pf\n9 9\n-1\n" + bytes(12), "cannot be read"),
        ("a.npy", b"no array", "cannot be read"),
        ("a.png", b"no picture", "cannot be read"),
        ("a.tif", None, "cannot be read"),
    ],
)
def test_a_map_that_cannot_be_read_is_named(tmp_path: Path, name, content, what):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        read_map(tmp_path / name, 0)
    assert name in caught.value.where


class _One:
    """A source of one sample."""

    def __init__(self, image: torch.Tensor, values: torch.Tensor) -> None:
        self.sample = Sample(image, values)

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "one"

    def group(self, index: int) -> str:
        return "all"

    def read(self, index: int) -> Sample:
        return self.sample


def test_a_sample_is_cut_reduced_scaled_and_can_be_scaled_back():
    image, values = torch.randint(256, (3, 35, 41), dtype=torch.uint8), 100 + 50 * torch.rand(1, 35, 41)
    item = UpsamplingDataset(_One(image, values), Task(4, "bicubic"))[0]
    assert isinstance(item, Batch)
    batch = collate([item, item])
    assert isinstance(batch, Batch)
    assert (batch.guidance.shape, batch.start.shape, batch.coarse.shape) == ((2, 3, 32, 40), (2, 1, 32, 40), (2, 1, 8, 10))
    assert torch.equal(batch.truth[0], values[:, :32, :40])
    back = batch.start[0] * batch.span[0] + batch.shift[0]
    torch.testing.assert_close(back, enlarge(batch.coarse[0], (32, 40)), rtol=1e-5, atol=1e-3)
    assert batch.names == ["one", "one"]


@pytest.mark.parametrize(
    ("size", "task", "crop", "what"),
    [((6, 40), Task(4, "nearest"), None, "too small to be reduced"), ((20, 40), Task(4, "nearest"), 32, "smaller than the crop")],
)
def test_a_map_that_is_too_small_is_refused(size, task, crop, what):
    item = UpsamplingDataset(_One(torch.zeros(3, *size, dtype=torch.uint8), torch.rand(1, *size)), task, crop)[0]
    assert isinstance(item, DataError)
    assert what in item.what


def test_crops_without_a_known_pixel_are_drawn_again():
    values = torch.full((1, 64, 64), NAN)
    values[0, :, :24] = torch.rand(64, 24)
    dataset = UpsamplingDataset(_One(torch.zeros(3, 64, 64, dtype=torch.uint8), values), Task(4, "bicubic"), 32, jitter=0.1)
    torch.manual_seed(0)
    items = [dataset[0] for _ in range(10)]
    assert all(isinstance(item, Batch) and bool(item.start.isfinite().all()) for item in items)
