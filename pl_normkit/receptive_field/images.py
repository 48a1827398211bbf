"""Image files for the command line: found, read, and brought to the size and statistics that a model expects."""

from __future__ import annotations

__all__ = ["Transform", "image_files", "read_images", "transform_of"]

import importlib
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, DataError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Transform:
    """Short side to size / crop_pct (bicubic), centre crop, scale to [0, 1], subtract mean, divide by std: timm's evaluation transform.

    Attributes:
        size: (height, width) of the crop.
        mean, std: one value per channel; three for RGB, one for grey.
        crop_pct: share of the resized image's side that the crop takes.
        interpolation: Pillow's name of the resampling filter.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    def __call__(self, picture: Any) -> Tensor:
        """(C, H, W) float32 from a Pillow image."""
        numpy, resampling = importlib.import_module("numpy"), importlib.import_module("PIL.Image").Resampling
        picture = picture.convert("RGB" if len(self.mean) == 3 else "L")
        height, width = (int(side / self.crop_pct) for side in self.size)
        scale = max(height / picture.height, width / picture.width)
        to_height, to_width = max(height, int(picture.height * scale)), max(width, int(picture.width * scale))
        picture = picture.resize((to_width, to_height), resampling[self.interpolation.upper()])
        top, left = round((to_height - self.size[0]) / 2), round((to_width - self.size[1]) / 2)
        pixels = numpy.array(picture.crop((left, top, left + self.size[1], top + self.size[0])), dtype="float32") / 255
        image = torch.from_numpy(pixels).reshape(*self.size, len(self.mean)).permute(2, 0, 1)
        return (image - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def transform_of(model: nn.Module, shape: tuple[int, ...]) -> Transform:
    """The transform for images (C, H, W) of this shape: a timm model's own, else ImageNet's statistics and the whole short side.

    Raises ConfigError for another number of channels than 1 or 3.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(
            "image files have 1 or 3 channels", evidence=f"--input {','.join(map(str, shape))}", fix="write --input 3,224,224"
        )
    config = getattr(model, "pretrained_cfg", None) or {}
    has_own = hasattr(config, "get") and config.get("mean") is not None and len(config["mean"]) == shape[0]
    mean, std = (config["mean"], config["std"]) if has_own else (IMAGENET_MEAN, IMAGENET_STD)
    if len(mean) != shape[0]:
        mean, std = (0.5,) * shape[0], (0.5,) * shape[0]
    size = (shape[1], shape[2])
    if not has_own:
        return Transform(size, tuple(mean), tuple(std))
    return Transform(size, tuple(mean), tuple(std), config.get("crop_pct") or 0.875, _pillow_filter(config.get("interpolation")))


def _pillow_filter(name: str | None) -> str:
    return name if name in ("bicubic", "bilinear", "nearest", "lanczos") else "bicubic"


def image_files(folder: Path) -> list[Path]:
    """Image files under `folder`, sorted by path. Raises DataError when there are none."""
    if not folder.is_dir():
        raise DataError("there is no such folder of images", where=str(folder), fix="give the folder that holds the images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError("the folder holds no images", where=str(folder), fix=f"known endings: {', '.join(sorted(SUFFIXES))}")
    return files


def read_images(files: Iterable[Path], transform: Transform) -> Iterator[Tensor]:
    """Each file as a tensor (C, H, W). Raises DataError naming a file that cannot be read."""
    pillow = importlib.import_module("PIL.Image")
    refusals = (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error, zlib.error, pillow.DecompressionBombError)
    for path in files:
        try:
            with warnings.catch_warnings(), pillow.open(path) as picture:
                warnings.simplefilter("error", pillow.DecompressionBombWarning)
                image = transform(picture)
        except (*refusals, pillow.DecompressionBombWarning) as error:
            raise DataError(
                "the image cannot be read",
                where=str(path),
                evidence=f"{type(error).__name__}: {error}",
                fix="replace the file, or take it out of the folder",
            ) from error
        yield image
