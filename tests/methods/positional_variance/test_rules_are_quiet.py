"""Pipelines and models of which NK7xx says nothing, or no more than it knows."""

from __future__ import annotations

from functools import partial
from typing import Any

import albumentations as A
import numpy as np
import pytest
import timm
import torch
import torchvision.transforms as v1
from timm.data import FastCollateMixup, Mixup
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification

from pl_normkit import audit
from pl_normkit.methods.positional_variance import measure_positional_variance
from pl_normkit.methods.positional_variance.pipelines.effects import Normalization, steps_of
from pl_normkit.methods.positional_variance.pipelines.walk import read_loader
from pl_normkit.rules import Loaders, Subject
from tests.methods.positional_variance.images import HALF, SIZE, Pictures, normal_images, vit
from tests.methods.positional_variance.loaders import INPUTS, V2, albumented, codes, found, loader, normalised, timm_loader


def test_the_recommended_configuration_is_quiet(model: nn.Module) -> None:
    """Also when its batches are measured, CutMix included."""
    options = {"re_prob": 0.25, "re_mode": "pixel", "scale": (0.8, 1.0), "color_jitter": None}
    for prefetch in (False, True):
        train = timm_loader(prefetch=prefetch, collate_fn=FastCollateMixup(0.0, 1.0) if prefetch else None, **options)
        evaluation = timm_loader(training=False, prefetch=prefetch)
        assert found(model, train, evaluation, [Mixup(0.0, 1.0)], measure=True) == []


ORDINARY = {
    "timm, evaluation": partial(timm_loader, training=False),
    "timm, border crop": partial(timm_loader, training=False, crop_mode="border"),
    "timm, prefetched": partial(timm_loader, training=False, prefetch=True),
    "weights.transforms()": partial(loader, ImageClassification(crop_size=SIZE, resize_size=SIZE)),
    "a flip": partial(loader, normalised(v1.RandomHorizontalFlip())),
    "reflected padding": partial(loader, normalised(v1.RandomCrop(SIZE, 4, padding_mode="reflect"))),
    "albumentations": partial(loader, albumented(A.HorizontalFlip(), A.RandomCrop(48, 48), A.PadIfNeeded(SIZE, SIZE, border_mode=4))),
    "two workers": partial(loader, normalised(), shuffle=True, num_workers=2),
}
ONLY_READ = {  # crops and colours do shift the variance of these small pictures: measured, that is a note
    "timm, training": timm_loader,
    "timm, policy": partial(timm_loader, auto_augment="rand-m6-inc1"),
    "timm, CutMix": partial(timm_loader, prefetch=True, collate_fn=FastCollateMixup(0.0, 1.0)),
    "torchvision's reference": partial(loader, v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), *V2])),
    "torchvision, policy": partial(loader, v2.Compose([v2.ToImage(), v2.RandomResizedCrop(SIZE), v2.TrivialAugmentWide(), *V2])),
}


@pytest.mark.parametrize("name", [*ORDINARY, *ONLY_READ])
def test_ordinary_pipelines_are_quiet(model: nn.Module, name: str) -> None:
    train = {**ORDINARY, **ONLY_READ}[name]()
    evaluation = loader(ImageClassification(crop_size=SIZE, resize_size=SIZE))
    if name in ORDINARY and name.startswith("timm"):
        evaluation = train
    assert found(model, train, evaluation, measure=name in ORDINARY) == []


def test_the_preset_of_torchvision_weights_is_read(model: nn.Module) -> None:
    preset = loader(ImageClassification(crop_size=SIZE, resize_size=SIZE))
    (finding,) = found(model, preset, loader(normalised(mean=HALF, std=HALF)))
    assert (finding.code, finding.cause) == ("NK703", "different statistics")


def test_normalised_patch_tokens_have_the_same_variance_whatever_the_images_are() -> None:
    """The settings then say nothing; the norm of AIMv2 stands before its positions."""
    model = vit("aimv2_large_patch14_224", patch_size=16)
    train = timm_loader(re_prob=0.5, collate_fn=FastCollateMixup(0.8), prefetch=True)
    assert found(model, train, measure=True) == []
    images = normal_images(4)
    assert measure_positional_variance(model, [images * 0.5], [images]).rho == pytest.approx(1.0, abs=1e-3)


def test_images_that_are_not_finite_are_not_judged(model: nn.Module) -> None:
    broken = [torch.full((2, 3, SIZE, SIZE), float("nan"))]
    assert found(model, broken, broken, measure=True) == []


def test_what_is_computed_is_not_called_measured(model: nn.Module) -> None:
    loaders = (timm_loader(re_prob=0.5), loader(normalised()))
    shown = " ".join(audit(model, INPUTS, loaders=loaders, select=["NK7"]).to_html().split())
    assert "computed</small> Var[X] by the settings of this step" in shown
    assert "measured</small> Var[X] of all batches" in shown


def test_other_models_are_none_of_its_business() -> None:
    train = timm_loader(re_prob=0.25, collate_fn=FastCollateMixup(0.8), prefetch=True)
    assert found(timm.create_model("resnet18"), train, measure=True) == []


def test_one_finding_for_each_cause(model: nn.Module) -> None:
    train = timm_loader(prefetch=True, re_prob=0.25, collate_fn=FastCollateMixup(0.8), mean=HALF, std=HALF)
    assert codes(found(model, train)) == ["NK701", "NK702", "NK703"]


def test_without_loaders_nothing_is_said(model: nn.Module) -> None:
    assert audit(model, INPUTS, select=["NK7"]).findings == []
    assert Subject(loaders=Loaders()).loaders == Loaders(None, None, ())


def test_transforms_are_found_wherever_a_dataset_keeps_them() -> None:
    class Own:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, image: Any) -> Any:
            return self.inner(image)

    inner = normalised()
    datasets = [
        Pictures(inner),
        Subset(Pictures(inner), [0]),
        ConcatDataset([Pictures(inner)]),
        Pictures(Own(inner)),
        Pictures(lambda image: inner(image.convert("RGB"))),
    ]
    for dataset in datasets:
        steps = steps_of(read_loader(DataLoader(dataset), "loader"), (SIZE, SIZE))
        assert [type(step) for step in steps] == [Normalization]
    listed = read_loader([DataLoader(Pictures(inner)), DataLoader(Pictures())], "loader")
    assert [type(step) for step in steps_of(listed, (SIZE, SIZE))] == [Normalization]
    assert read_loader([normal_images(2)], "loader") == read_loader(None, "loader") == []


def test_shares_of_containers() -> None:
    steps = {
        "apply": v1.RandomApply([v1.RandomErasing(0.5, scale=(0.2, 0.2))], p=0.5),
        "choice": v2.RandomChoice([v2.RandomErasing(0.5, scale=(0.2, 0.2)), v2.Identity()], p=[0.5, 0.5]),
        "one of": A.OneOf([A.Erasing(scale=(0.1, 0.1), p=0.3), A.NoOp(p=0.3)], p=0.5),
    }
    areas = {}
    for name, step in steps.items():
        transform = albumented(step) if name == "one of" else v1.Compose([step])
        (erasing,) = [found for found in steps_of(read_loader(loader(transform), ""), (SIZE, SIZE)) if hasattr(found, "area")]
        areas[name] = float(np.round(erasing.area, 6))
    assert areas == {"apply": 0.05, "choice": 0.05, "one of": 0.025}
