"""Torchvision's data sets in small: files as its readers expect them. An image of class k is of one value, 10 (k + 1)."""

import bz2
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

SIDE = 16
LABELS = {"train": (0, 1, 2, 0, 1, 2), "test": (2, 1, 0)}


def pixel(label: int) -> int:
    return 10 * (label + 1)


def _save(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), (pixel(label),) * 3).save(path)


def _stack(part: str) -> np.ndarray:
    return np.stack([np.full((SIDE, SIDE), pixel(label), np.uint8) for label in LABELS[part]])


def _mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        count = len(LABELS[part])
        images = struct.pack(">iiii", 0x803, count, SIDE, SIDE) + _stack(part).tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + bytes(LABELS[part]))


def _usps(root: Path) -> None:
    for part, name in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        lines = []
        for label in LABELS[part]:
            value = (pixel(label) + 0.5) / 255 * 2 - 1
            lines.append(" ".join([str(label + 1), *(f"{index + 1}:{value:.6f}" for index in range(SIDE * SIDE))]))
        (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))


def _gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    for index, label in enumerate(LABELS["train"]):
        _save(base / "GTSRB" / "Training" / f"{label:05d}" / f"{index}.ppm", label)
    rows = ["Filename;ClassId"]
    for index, label in enumerate(LABELS["test"]):
        _save(base / "GTSRB" / "Final_Test" / "Images" / f"{index}.ppm", label)
        rows.append(f"{index}.ppm;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")


def _aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    for part, split in (("train", "trainval"), ("test", "test")):
        for index, label in enumerate(LABELS[part]):
            _save(data / "images" / f"{split}{index}.jpg", label)
        lines = [f"{split}{index} wing {label}" for index, label in enumerate(LABELS[part])]
        (data / f"images_variant_{split}.txt").write_text("\n".join(lines))
    (data / "variants.txt").write_text("wing 0\nwing 1\nwing 2\n")


def _food(root: Path) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part, labels in LABELS.items():
        listed: dict[str, list[str]] = {f"dish{label}": [] for label in sorted(set(labels))}
        for index, label in enumerate(labels):
            _save(base / "images" / f"dish{label}" / f"{part}{index}.jpg", label)
            listed[f"dish{label}"].append(f"dish{label}/{part}{index}")
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))


def _pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part, split in (("train", "trainval"), ("test", "test")):
        lines = []
        for index, label in enumerate(LABELS[part]):
            _save(base / "images" / f"breed{label}_{split}{index}.jpg", label)
            lines.append(f"breed{label}_{split}{index} {label + 1} 1 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines))


def _svhn(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    for part, labels in LABELS.items():
        images = np.repeat(_stack(part)[:, :, :, None], 3, axis=3).transpose(1, 2, 3, 0)
        savemat(root / f"{part}_32x32.mat", {"X": images, "y": np.array([label or 10 for label in labels])[:, None]})


WRITERS = {
    "FGVCAircraft": _aircraft,
    "Food101": _food,
    "GTSRB": _gtsrb,
    "MNIST": _mnist,
    "OxfordIIITPet": _pets,
    "SVHN": _svhn,
    "USPS": _usps,
}


def write_tree(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the data set `name` in `root`; checks of downloads against their digests are off."""
    root.mkdir(parents=True, exist_ok=True)
    WRITERS[name](root)
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
