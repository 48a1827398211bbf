from pathlib import Path

import torch
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def write_class_folders(folder: Path, count: int, *, size: tuple[int, int] = (20, 24)) -> None:
    """`count` RGB images for each class, whose colour shows it."""
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = torch.randint(120, (*size, 3), generator=generator)
            pixels[..., label] += 120
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{index}.png")
