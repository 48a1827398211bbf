from pathlib import Path

import numpy as np
import torch
from PIL import Image


def write_map_pairs(root: Path, count: int, *, size: tuple[int, int] = (48, 64), classes: int = 0) -> None:
    """`count` images whose halves differ in colour, with maps of two levels (16-bit PNG), 0 in one corner."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("images", "maps"):
        (root / kind).mkdir(parents=True)
    for index in range(count):
        edge = int(torch.randint(size[1] // 4, 3 * size[1] // 4, (), generator=generator))
        values = torch.where(torch.arange(size[1]) < edge, 1, 2).expand(size).clone()
        pixels = values[..., None] * 80 + torch.randint(40, (*size, 3), generator=generator)
        values = (values - 1) if classes else values * 1000
        values[:4, :4] = 0
        Image.fromarray(pixels.numpy().astype(np.uint8)).save(root / "images" / f"{index}.png")
        Image.fromarray(values.numpy().astype(np.uint16)).save(root / "maps" / f"{index}.png")
