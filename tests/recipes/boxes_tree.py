import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = (64, 96)


def write_boxed(root: Path, count: int, *, form: str = "json", masks: bool = True) -> None:
    """`count` images with one bright rectangle of class "cat" or "dog" each, its box, and a mask."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("images", "boxes", *(["masks"] if masks else [])):
        (root / kind).mkdir(parents=True)
    (root / "classes.txt").write_text("cat\ndog\n")
    for index in range(count):
        left, top = (int(torch.randint(4, side // 2, (), generator=generator)) for side in SIZE[::-1])
        box, label = (left, top, left + 40, top + 24), index % 2 + 1
        mask = torch.zeros(SIZE, dtype=torch.uint8)
        mask[top : top + 24, left : left + 40] = label
        pixels = mask[..., None] * 90 + torch.randint(60, (*SIZE, 3), generator=generator)
        Image.fromarray(pixels.numpy().astype(np.uint8)).save(root / "images" / f"{index}.png")
        if masks:
            Image.fromarray(mask.numpy()).save(root / "masks" / f"{index}.png")
        write_box(root / "boxes" / f"{index}.{form}", box, label)


def write_box(path: Path, box: tuple[int, int, int, int], label: int) -> None:
    left, top, right, bottom = box
    if path.suffix == ".json":
        path.write_text(json.dumps({"boxes": [box], "labels": [("cat", "dog")[label - 1]]}))
    elif path.suffix == ".txt":
        shares = ((left + right) / 2 / SIZE[1], (top + bottom) / 2 / SIZE[0], (right - left) / SIZE[1], (bottom - top) / SIZE[0])
        path.write_text(" ".join([str(label - 1), *(f"{share:.6f}" for share in shares)]) + "\n")
    else:
        corners = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
        inside = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
        name = ("cat", "dog")[label - 1]
        path.write_text(f"<annotation><object><name>{name}</name><bndbox>{inside}</bndbox></object></annotation>")
