from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("sky", "road", "tree")


def _save_mask(mask: torch.Tensor, path: Path, palette: bool) -> None:
    picture = Image.fromarray(mask.to(torch.uint8).numpy())
    if palette:
        picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [255] * 759)
    picture.save(path)


def write_pairs(folder: Path, count: int, *, palette: bool = True, size: tuple[int, int] = (50, 60)) -> None:
    """`count` images whose grey value shows the class, and their masks; blocks of 10 x 10 pixels."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        blocks = torch.randint(len(CLASSES), (size[0] // 10, size[1] // 10), generator=generator)
        mask = blocks.repeat_interleave(10, 0).repeat_interleave(10, 1)
        pixels = mask[..., None] * 80 + torch.randint(60, (*size, 3), generator=generator)
        Image.fromarray(pixels.numpy().astype(np.uint8)).save(folder / "images" / f"{index}.png")
        _save_mask(mask, folder / "masks" / f"{index}.png", palette)
