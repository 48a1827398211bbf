from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pl_normkit.recipes.sheets import draw_sheet, paint_values


def test_pictures_of_all_sizes_stand_in_their_row_and_column(tmp_path: Path):
    rows = [[torch.full((3, height, width), value, dtype=torch.uint8) for value, width in ((200, 20), (120, 30))] for height in (40, 10)]
    draw_sheet(("", ""), rows, tmp_path / "a" / "sheet.png", [("cat", (250, 0, 0))])
    pixels = np.array(Image.open(tmp_path / "a" / "sheet.png"))
    assert [int((pixels == value).all(-1).sum()) for value in (200, 120)] == [20 * 50, 30 * 50]
    assert bool((pixels == (250, 0, 0)).all(-1).any())
    top = 16  # the line of titles
    assert (pixels[top, 6] == 200).all()
    assert (pixels[top + 40 + 6, 6 + 30 + 6] == 120).all()


def test_values_are_painted_in_order_and_unknown_ones_white():
    painted = paint_values(torch.tensor([[0.0, 0.5, 1.0, float("nan"), -3.0]]), 0, 1)
    assert painted[:, 0].T.tolist() == [[68, 1, 84], [33, 145, 140], [253, 231, 37], [255, 255, 255], [68, 1, 84]]
