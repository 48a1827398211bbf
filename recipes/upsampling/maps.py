"""Read and write files of depth, disparity and label maps; whatever is wrong with one is a DataError that names the file."""

from __future__ import annotations

__all__ = ["MAP_SUFFIXES", "load_array", "map_file", "one_hot", "read_map", "read_pfm", "write_map"]

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.image_files import decode_picture

MAP_SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".pfm")


def map_file(folder: Path, name: str) -> Path | None:
    """The map of that name in any format, or None."""
    return next((path for suffix in MAP_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def read_map(path: Path, unknown: float | None) -> Tensor:
    """Values (H, W), float32, NaN where the file has `unknown`, NaN or infinity. Raises DataError."""
    if path.suffix == ".pfm":
        values = read_pfm(path)
    elif path.suffix == ".npy":
        values = torch.from_numpy(np.array(load_array(path)).astype(np.float32)).squeeze(-1)
    else:
        values = decode_picture(path, "map", None).float()
    if values.dim() != 2:
        evidence = f"its values are {tuple(values.shape)}"
        raise DataError("a map has more than one channel", where=str(path), evidence=evidence, fix="save one number a pixel, not colours")
    values = values.masked_fill(~values.isfinite(), torch.nan)
    if unknown is not None:
        values = values.masked_fill(values == unknown, torch.nan)
    if not bool(values.isfinite().any()):
        raise DataError("a map has no known pixel", where=str(path), evidence=f"unknown is {unknown}", fix="set --data.unknown, or drop it")
    return values


def load_array(path: Path) -> np.ndarray:
    """The array of a .npy file, left on disk. Raises DataError."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    return array


def read_pfm(path: Path) -> Tensor:
    """A portable float map of one channel, as Middlebury's: (H, W) float32. Raises DataError."""
    try:
        with path.open("rb") as file:
            kind, sides, scale = (file.readline().decode("ascii").strip() for _ in range(3))
            width, height = (int(side) for side in sides.split())
            values = np.frombuffer(file.read(), "<f4" if float(scale) < 0 else ">f4")
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if kind != "Pf" or values.size != width * height:
        raise _unreadable(path, f"a header {kind!r} of {width} x {height}, and {values.size} numbers")
    return torch.from_numpy(values.reshape(height, width)[::-1].astype(np.float32))


def _unreadable(path: Path, evidence: str) -> DataError:
    return DataError("the map cannot be read", where=str(path), evidence=evidence, fix="replace the file, or take it out of the data set")


def one_hot(labels: Tensor, classes: int, path: Path) -> Tensor:
    """Labels (H, W), NaN where unknown, to (classes, H, W) of 0 and 1, NaN where unknown. Raises DataError naming a value out of range."""
    known = labels.isfinite()
    values = torch.where(known, labels, 0.0)
    wrong = (values < 0) | (values >= classes) | (values != values.round())
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise DataError(
            "a label map has a class out of range",
            where=f"{path}, row {row}, column {column}",
            evidence=f"{float(values[row, column]):g}",
            fix=f"there are {classes} classes, 0 to {classes - 1}; set --data.classes or --data.unknown",
        )
    planes = F.one_hot(values.long(), classes).permute(2, 0, 1).float()
    return planes.masked_fill(~known, torch.nan)


def write_map(values: Tensor, path: Path) -> None:
    """Write (H, W): .npy and .tif as float32, .png rounded to 16 bits. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = values.float().cpu().numpy()
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".png":
        Image.fromarray(array.round().clip(0, 65535).astype(np.uint16)).save(path)
    else:
        Image.fromarray(array).save(path)
