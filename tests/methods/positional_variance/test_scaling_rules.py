"""Pipelines with one mistake of scale each, and sound ones beside them, for a network without positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from pl_normkit import audit
from pl_normkit.findings import Finding
from pl_normkit.rules import Loaders
from tests.methods.positional_variance.images import HALF, MEAN, SIZE, STD, Pictures
from tests.methods.positional_variance.test_rules import timm_loader

FLOAT = torch.float32


def loader(*steps: Any) -> Any:
    return DataLoader(Pictures(v1.Compose(list(steps))), 16)


def sound() -> Any:
    return loader(v1.ToTensor(), v1.Normalize(MEAN, STD))


def found(train: Any, evaluation: Any = None, *, transforms: Any = (), measure: bool = True) -> list[Finding]:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
    loaders = Loaders(train, sound() if evaluation is None else evaluation, transforms)
    report = audit(network, torch.zeros(2, 3, SIZE, SIZE), loaders=loaders, select=["NK7"], measure=measure)
    assert [note for note in report.notes if note in report.failures] == []
    return list(report.findings)


def of_albumentations(*steps: Any) -> Any:
    pipeline = A.Compose(list(steps))
    return DataLoader(Pictures(lambda image: pipeline(image=np.asarray(image))["image"]), 16)


class TwoParts(nn.Module):
    """A user's step that hides what it does."""

    def forward(self, image: Any) -> Any:
        return v1.functional.pil_to_tensor(image).float() if not isinstance(image, torch.Tensor) else image


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "Normalize twice": (
        lambda: loader(v1.ToTensor(), v1.Normalize(MEAN, STD), v1.RandomHorizontalFlip(), v1.Normalize(HALF, HALF)),
        "twice",
    ),
    "Normalize twice, v2": (
        lambda: loader(v2.ToImage(), v2.ToDtype(FLOAT, scale=True), v2.Normalize(MEAN, STD), v2.Compose([v2.Normalize(MEAN, STD)])),
        "Images are normalised twice",
    ),
    "the same object twice": (lambda: loader(v1.ToTensor(), *[v1.Normalize(MEAN, STD)] * 2), "Images are normalised twice"),
    "bytes never scaled": (lambda: loader(v2.ToImage(), v2.ToDtype(FLOAT), v2.Normalize(MEAN, STD)), "Images of 0 to 255"),
    "bytes left as they are": (lambda: loader(v2.PILToTensor(), v2.ToDtype(FLOAT)), "Images of 0 to 255"),
    "per type of input": (
        lambda: loader(v2.ToImage(), v2.ToDtype({tv_tensors.Image: FLOAT, "others": None}), v2.Normalize(MEAN, STD)),
        "Images of 0 to 255",
    ),
    "statistics of bytes": (
        lambda: loader(v1.ToTensor(), v1.Normalize([255 * m for m in MEAN], [255 * s for s in STD])),
        "Images in [0, 1] are normalised with statistics of 0 to 255",
    ),
    "colours last": (lambda: loader(v1.ToTensor(), v1.Normalize(MEAN, STD), v1.ColorJitter(0.4)), "ColorJitter comes after Normalize"),
    "albumentations twice": (lambda: of_albumentations(A.Normalize(), A.Normalize(max_pixel_value=1.0), A.ToTensorV2()), "twice"),
    "albumentations scaled twice": (lambda: of_albumentations(A.ToFloat(), A.Normalize(), A.ToTensorV2()), "divided by 255 once more"),
    "hidden, normalised": (lambda: loader(TwoParts(), v1.Normalize(MEAN, STD)), "far outside"),
    "hidden, not normalised": (lambda: loader(TwoParts()), "Images of 0 to 255"),
    "hidden second division": (lambda: loader(v1.ToTensor(), v1.Lambda(lambda x: x / 255), v1.Normalize(MEAN, STD)), "once more"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_scale_is_named_once(name: str) -> None:
    build, what = MISTAKES[name]
    (finding,) = found(build())
    assert (finding.code, finding.severity, what in finding.message) == ("NK706", "warning", True), finding.message
    assert "training pipeline" in finding.message
    assert [item.what for item in finding.evidence] == ["second moment of the images of a batch, training"]


@pytest.mark.parametrize("name", [name for name in MISTAKES if not name.startswith("hidden")])
def test_settings_tell_it_without_a_batch(name: str) -> None:
    (finding,) = found(MISTAKES[name][0](), measure=False)
    assert (finding.code, finding.evidence) == ("NK706", ())


def test_both_loaders_make_one_finding() -> None:
    build, _ = MISTAKES["Normalize twice"]
    (finding,) = found(build(), build())
    assert ("training and the evaluation pipeline" in finding.message, len(finding.evidence)) == (True, 2)


def test_raw_pixels_are_far_from_the_sound_pipeline() -> None:
    (finding,) = found(MISTAKES["bytes never scaled"][0]())
    batch, _ = next(iter(MISTAKES["bytes never scaled"][0]()))
    (evidence,) = finding.evidence
    assert evidence.value == pytest.approx(float(batch.square().mean()))
    assert evidence.value > 100_000


def test_a_loader_that_fails_is_judged_by_its_settings() -> None:
    broken = loader(v2.ToImage(), v2.ToDtype({torch.Tensor: FLOAT}), v2.Normalize(MEAN, STD))  # raises: names nothing for labels
    (finding,) = found(broken)
    assert (finding.code, finding.evidence) == ("NK706", ())


def test_to_tensor_twice_is_named() -> None:
    (finding,) = found(loader(v1.ToTensor(), v1.ToTensor()), measure=False)
    assert finding.message.startswith("ToTensor stands twice")


def test_a_prefetcher_over_normalised_images() -> None:
    normalising = timm_loader(prefetch=True, no_aug=True)
    normalising.loader.dataset.transform = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])
    (finding,) = found(normalising, measure=False)
    assert finding.message.startswith("Images are normalised twice")


SOUND: dict[str, Callable[[], Any]] = {
    "ImageNet": sound,
    "halves": lambda: loader(v1.ToTensor(), v1.Normalize(HALF, HALF)),
    "no Normalize": lambda: loader(v1.ToTensor()),
    "v2": lambda: loader(v2.ToImage(), v2.ToDtype(FLOAT, scale=True), v2.Normalize(MEAN, STD)),
    "v2, colours on bytes": lambda: loader(v2.ToImage(), v2.RandAugment(), v2.ToDtype(FLOAT, scale=True), v2.Normalize(MEAN, STD)),
    "ConvertImageDtype": lambda: loader(v1.PILToTensor(), v1.ConvertImageDtype(FLOAT), v1.Normalize(MEAN, STD)),
    "statistics of bytes for bytes": lambda: loader(
        v2.PILToTensor(), v2.ToDtype(FLOAT), v2.Normalize([255 * m for m in MEAN], [255 * s for s in STD])
    ),
    "albumentations": lambda: of_albumentations(A.Normalize(), A.ToTensorV2()),
    "timm": timm_loader,
    "timm, prefetched": lambda: timm_loader(prefetch=True),
    "two data sets, one Normalize each": lambda: DataLoader(ConcatDataset([sound().dataset, sound().dataset]), 16),
    "noise for pixels": lambda: loader(v1.ToTensor(), v1.Normalize(MEAN, STD), v1.RandomErasing(p=1.0, value="random")),
    "there and back": lambda: loader(
        v1.ToTensor(),
        v1.Normalize(MEAN, STD),
        v1.Normalize([-m / s for m, s in zip(MEAN, STD, strict=True)], [1 / s for s in STD]),
        v1.Normalize(MEAN, STD),
    ),
}


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("name", SOUND)
def test_sound_pipelines_are_quiet(name: str, measure: bool) -> None:
    assert [finding.message for finding in found(SOUND[name](), measure=measure)] == []


def test_what_the_module_normalises_itself_is_left_alone() -> None:
    assert found(loader(v2.PILToTensor(), v2.ToDtype(FLOAT)), transforms=[v2.Normalize([255 * m for m in MEAN], STD)]) == []
