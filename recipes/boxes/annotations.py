"""Read boxes from JSON, YOLO's text and VOC's XML; whatever is wrong is a DataError that names the file and the box."""

from __future__ import annotations

__all__ = ["BOX_SUFFIXES", "Boxes", "box_file", "make_boxes", "read_boxes"]

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pl_normkit.errors import DataError, nearest

BOX_SUFFIXES = (".json", ".xml", ".txt")
_FORMS = """{"boxes": [[x1, y1, x2, y2], ...], "labels": ["name", ...]}"""
_SLACK = 1.5
"""Pixels by which a box may leave the image: annotators count from 0 or from 1, and YOLO's shares are rounded."""


class Boxes(NamedTuple):
    """Boxes (K, 4) float32 as x1, y1, x2, y2 in pixels, and their classes (K,) int64, at least 1: 0 is the background."""

    boxes: Tensor
    labels: Tensor


def box_file(folder: Path, name: str) -> Path | None:
    """The boxes of that name in any format, or None."""
    return next((path for suffix in BOX_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def read_boxes(path: Path, class_names: Sequence[str], size: tuple[int, int]) -> Boxes:
    """The boxes of a file, by its suffix.

    Args:
        path: .json ({"boxes": [[x1, y1, x2, y2], ...], "labels": ["name", ...]}, pixels), .txt (YOLO: class from 0, not counting the
            background, then middle and size as shares of the image), or .xml (VOC; boxes marked difficult count too).
        class_names: background first.
        size: (height, width) of the image.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries = {".json": _json, ".txt": _yolo, ".xml": _xml}[path.suffix](text, class_names, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
        evidence = f"{type(error).__name__}: {error}"
        raise DataError("the boxes cannot be read", where=str(path), evidence=evidence, fix=_advice(path)) from error
    return make_boxes(entries, class_names, size, str(path))


def _advice(path: Path) -> str:
    if path.suffix == ".txt":
        return "write YOLO's lines: class x_middle y_middle width height, shares of the image"
    return f"write {_FORMS}" if path.suffix == ".json" else "write VOC's XML: annotation/object with name and bndbox"


Entry = tuple[str | int, Sequence[float]]
"""A class by name or number, and x1, y1, x2, y2."""


def _json(text: str, class_names: Sequence[str], size: tuple[int, int]) -> list[Entry]:
    content: dict[str, Any] = json.loads(text)
    boxes, labels = content["boxes"], content["labels"]
    if len(boxes) != len(labels):
        raise ValueError(f"{len(boxes)} boxes and {len(labels)} labels")
    return [(label, [float(value) for value in box]) for label, box in zip(labels, boxes, strict=True)]


def _yolo(text: str, class_names: Sequence[str], size: tuple[int, int]) -> list[Entry]:
    found: list[Entry] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        number, x, y, width, height = line.split()
        middle, half = (float(x) * size[1], float(y) * size[0]), (float(width) * size[1] / 2, float(height) * size[0] / 2)
        corners = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
        found.append((int(number) + 1, corners))
    return found


def _xml(text: str, class_names: Sequence[str], size: tuple[int, int]) -> list[Entry]:
    found: list[Entry] = []
    for item in ElementTree.fromstring(text).iter("object"):
        box = item.find("bndbox")
        if box is None:
            raise ValueError("an object without bndbox")
        left, top, right, bottom = (float(box.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax"))
        found.append((item.findtext("name", "").strip(), [left - 1, top - 1, right, bottom]))  # counted from 1, the last pixel included
    return found


def make_boxes(entries: Sequence[Entry], class_names: Sequence[str], size: tuple[int, int], where: str) -> Boxes:
    """Checked and cut to the image. Raises DataError for an unknown class, a box without area or outside the image."""
    boxes, labels = [], []
    for number, (label, corners) in enumerate(entries, 1):
        place = f"{where}, box {number}"
        labels.append(_label(label, class_names, place))
        if len(corners) != 4 or not all(torch.isfinite(torch.tensor(corners)).tolist()):
            raise DataError("a box is not four numbers", where=place, evidence=str(list(corners)), fix="write x1, y1, x2, y2 in pixels")
        left, top, right, bottom = corners
        if right <= left or bottom <= top:
            fix = "write x1, y1, x2, y2 in pixels, not width and height"
            raise DataError("a box has no area", where=place, evidence=str(list(corners)), fix=fix)
        if min(left, top) < -_SLACK or right > size[1] + _SLACK or bottom > size[0] + _SLACK:
            evidence = f"{[round(value, 1) for value in corners]} in an image of {size[1]} x {size[0]} pixels"
            raise DataError("a box leaves its image", where=place, evidence=evidence, fix="write x1, y1, x2, y2 in pixels of this image")
        boxes.append([max(left, 0.0), max(top, 0.0), min(right, size[1]), min(bottom, size[0])])
    return Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(labels, dtype=torch.int64))


def _label(label: str | int, class_names: Sequence[str], place: str) -> int:
    if isinstance(label, str) and label in class_names[1:]:
        return class_names.index(label)
    if isinstance(label, int) and 1 <= label < len(class_names):
        return label
    hint = nearest(label, class_names[1:]) if isinstance(label, str) else ""
    fix = hint or f"the classes with boxes are {', '.join(class_names[1:])}"
    shown = repr(label) if isinstance(label, str) else f"number {label - 1}"
    raise DataError("a box has a class that is not in the class list", where=place, evidence=shown, fix=fix)
