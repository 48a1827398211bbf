"""Find, read and draw images; whatever is wrong with one is a DataError that names the file."""

from __future__ import annotations

__all__ = [
    "IMAGE_SUFFIXES",
    "decode_picture",
    "find_images",
    "image_size",
    "name_images",
    "open_picture",
    "read_gray",
    "read_image",
    "require_folder",
    "to_picture",
]

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pl_normkit.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_REFUSALS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)


def require_folder(folder: Path, what: str, fix: str = "give the right folder, such as --data.root PATH") -> None:
    """Raise DataError unless `folder` is a folder; `what` names it in the message."""
    if not folder.is_dir():
        seen = "a file" if folder.exists() else "nothing"
        raise DataError(f"{what} is not there", where=str(folder), evidence=f"{seen} at this path", fix=fix)


def find_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files under `folder`, sorted. Raises DataError when there are none."""
    found = [path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(suffixes) and path.is_file()]
    if not found:
        held = len(list(folder.iterdir()))
        raise DataError(
            "the image folder is empty",
            where=str(folder),
            evidence=f"{held} entries, none of them an image" if held else "no entries",
            fix=f"put images there ({', '.join(suffixes)}), or give another folder",
        )
    return found


def name_images(folder: Path, layout: str) -> dict[str, Path]:
    """Image files under `folder` by their path within it, without suffix. Raises DataError; `layout` says what should be there."""
    require_folder(folder, "the image folder", layout)
    found: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            evidence = f"{found[name].name} and {path.name}"
            raise DataError("two images have one name", where=str(folder), evidence=evidence, fix="rename or remove one of them")
        found[name] = path
    return found


def open_picture(path: Path, kind: str) -> Image.Image:
    """The file, maybe packed (.gz), with its header read. Raises DataError; `kind` says what the file should be, such as "image"."""
    try:
        return Image.open(io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path)
    except _REFUSALS as error:
        raise _unreadable(path, kind, error) from error


def decode_picture(path: Path, kind: str, mode: str | None) -> Tensor:
    """Pixels (H, W) or (H, W, channels), converted to PIL's `mode` unless that is None. Raises DataError."""
    try:
        with open_picture(path, kind) as picture:
            return torch.from_numpy(np.array(picture.convert(mode) if mode else picture))
    except _REFUSALS as error:
        raise _unreadable(path, kind, error) from error


def to_picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """An image (channels, H, W) uint8 as colours, brought to (width, height) with its pixels left sharp."""
    colours = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    pixels = colours.permute(1, 2, 0).contiguous()
    return Image.fromarray(torch.Tensor.numpy(pixels)).resize(size, Image.Resampling.NEAREST)


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    fix = "put the file there" if isinstance(error, FileNotFoundError) else "replace the file, or take it out of the data set"
    return DataError(f"the {kind} cannot be read", where=str(path), evidence=f"{type(error).__name__}: {error}", fix=fix)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header of the file alone. Raises DataError when it cannot be read or has more than 8 bits a channel."""
    with open_picture(path, "image") as picture:
        if picture.mode in ("I", "I;16", "I;16B", "F"):
            raise DataError(
                "an image has more than 8 bits a channel",
                where=str(path),
                evidence=f"its pixels are {picture.mode}",
                fix="convert it to 8 bits; how to spread the values is your choice to make",
            )
        return picture.height, picture.width


def read_image(path: Path) -> Tensor:
    """RGB image (3, H, W), uint8. Raises DataError."""
    return decode_picture(path, "image", "RGB").permute(2, 0, 1).contiguous()


def read_gray(path: Path) -> Tensor:
    """Grey image (H, W), uint8. Raises DataError."""
    return decode_picture(path, "image", "L")
