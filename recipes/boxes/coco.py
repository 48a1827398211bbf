"""COCO's instances: boxes from the annotation file, masks for scoring drawn from its polygons. pycocotools is not needed."""

from __future__ import annotations

__all__ = ["COCOSource", "read_coco"]

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.boxes.annotations import Boxes, make_boxes
from pl_normkit.recipes.boxes.samples import VOID, BoxSource
from pl_normkit.recipes.image_files import read_image
from pl_normkit.recipes.segmentation.samples import Sample


def read_coco(path: Path) -> dict[str, Any]:
    """An annotation file with images, annotations and categories. Raises DataError."""
    fix = "give COCO's instances_*.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("images", "annotations", "categories") if not content[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        evidence = f"{type(error).__name__}: {error}"
        raise DataError("the annotations cannot be read", where=str(path), evidence=evidence, fix=fix) from error
    if missing:
        raise DataError("the annotations hold nothing", where=str(path), evidence=f"no {missing[0]}", fix=fix)
    return content


class COCOSource(BoxSource):
    """Images of an annotation file. Crowds give no box, and do not count in masks. Raises DataError for boxes that cannot be used."""

    def __init__(self, content: dict[str, Any], folder: Path, class_names: list[str], where: str, *, only_boxed: bool) -> None:
        self.folder, self.class_names, self.where = folder, class_names, where
        names = {category["id"]: category["name"] for category in content["categories"]}
        self.objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for item in content["annotations"]:
            self.objects[item["image_id"]].append({**item, "name": names.get(item["category_id"], f"id {item['category_id']}")})
        self.images = [image for image in content["images"] if not only_boxed or self.objects[image["id"]]]
        for index in range(len(self.images)):
            self.read_boxes(index)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(Path(self.images[index]["file_name"]).with_suffix("").as_posix())

    def read_image(self, index: int) -> Tensor:
        path, image = self.folder / self.images[index]["file_name"], self.images[index]
        pixels = read_image(path)
        if pixels.shape[1:] != (image["height"], image["width"]):
            evidence = f"{pixels.shape[2]} x {pixels.shape[1]} pixels, {image['width']} x {image['height']} in the annotations"
            raise DataError(
                "an image has another size than in the annotations", where=str(path), evidence=evidence, fix="restore the image"
            )
        return pixels

    def read_boxes(self, index: int) -> Boxes:
        image = self.images[index]
        entries = []
        for item in self.objects[image["id"]]:
            if not item.get("iscrowd"):
                left, top, width, height = item["bbox"]
                entries.append((item["name"], [left, top, left + width, top + height]))
        return make_boxes(entries, self.class_names, (image["height"], image["width"]), f"{self.where}, {image['file_name']}")

    def read(self, index: int) -> Sample:
        image = self.images[index]
        mask = Image.new("L", (image["width"], image["height"]), 0)
        pen = ImageDraw.Draw(mask)
        items = sorted(self.objects[image["id"]], key=lambda item: item.get("area", 0), reverse=True)
        for item in sorted(items, key=lambda item: not item.get("iscrowd")):  # crowds below
            polygons = item.get("segmentation")
            if isinstance(polygons, list) and not item.get("iscrowd"):
                for polygon in polygons:
                    pen.polygon([(x, y) for x, y in zip(polygon[::2], polygon[1::2], strict=True)], self.class_names.index(item["name"]))
            else:
                left, top, width, height = item["bbox"]
                pen.rectangle((left, top, left + width, top + height), VOID)
        return self.read_image(index), torch.from_numpy(np.array(mask)).long()
