"""Mixup and erasing that keep the variance, against timm's and against the closed forms."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from sklearn.datasets import load_digits
from timm.data import Mixup

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.methods.positional_variance import ImageMoments, measure_positional_variance, suggest_augmentation
from pl_normkit.nn import VarianceSafeErasing, VarianceSafeMixup
from tests.methods.positional_variance.images import HALF, MEAN, STD, normal_images, vit

global_numbers: Any = importlib.import_module("numpy.random")  # what timm draws from

SETTINGS: list[dict[str, Any]] = [
    {"mixup_alpha": 0.8},
    {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.5, "correct_lam": False},
    {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
    {"mixup_alpha": 0.2, "cutmix_minmax": (0.2, 0.8)},
    {"mixup_alpha": 0.8, "multi_label": True},
]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_it_is_timms_mixup_but_for_one_gain_per_image(mode: Any, options: dict[str, Any]) -> None:
    images = normal_images(6, 32)
    target = torch.rand(6, 10) if options.get("multi_label") else torch.randint(0, 10, (6,))
    for seed in range(8):
        global_numbers.seed(seed)
        plain, labels = Mixup(mode=mode, num_classes=10, **options)(images.clone(), target)
        after = global_numbers.random()
        global_numbers.seed(seed)
        mixed, mixed_labels = VarianceSafeMixup(mode=mode, num_classes=10, **options)(images, target)
        assert global_numbers.random() == after
        assert torch.equal(mixed_labels, labels)
        gain = (mixed.flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(mixed, plain * gain)
        assert bool((gain > 1 - 1e-6).all())
        if not options["mixup_alpha"]:
            assert torch.equal(mixed, plain)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), mean=st.floats(-1.0, 1.0))
def test_mean_and_variance_are_kept(seed: int, mean: float) -> None:
    """For independent images, whatever their mean is."""
    global_numbers.seed(seed)
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) * 0.5 + mean
    mixed, _ = VarianceSafeMixup(1.0, num_classes=2, mean=mean)(images, torch.zeros(2))
    assert float(mixed.mean()) == pytest.approx(mean, abs=0.01)
    assert float((mixed - mean).square().mean()) == pytest.approx(0.25, rel=0.02)


def test_corrected_mixup_keeps_the_ratio() -> None:
    images = normal_images(64)
    train = [VarianceSafeMixup(0.8, num_classes=2, mode="elem")(images, torch.zeros(64))[0]]
    assert measure_positional_variance(vit(), train, [images]).rho == pytest.approx(1.0, rel=0.01)


def digits() -> torch.Tensor:
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:512, None]
    return (images - images.mean()) / images.std()


def photographs() -> torch.Tensor:
    """Crops along one strip of a portrait, which overlap: they have much in common."""
    crops = [torch.from_numpy(data.astronaut() / 255).float().permute(2, 0, 1)[:, top : top + 64, 190:254] for top in range(0, 256, 4)]
    images = torch.stack(crops)
    return (images - images.mean()) / images.std()


def textures() -> torch.Tensor:
    images = torch.from_numpy(data.brick() / 255).float().unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 1, 32, 32)
    return (images - images.mean()) / images.std()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("make_images", [digits, photographs, textures, lambda: normal_images(256, 16)])
def test_real_images_keep_their_second_moment(make_images: Callable[[], torch.Tensor], mode: Any) -> None:
    """Over many batches, as a normalization sees it; plain Mixup does not keep it on any of them."""
    images = make_images()
    global_numbers.seed(0)
    order = torch.Generator().manual_seed(0)
    batches = [images[torch.randperm(len(images), generator=order)[:64]] for _ in range(60)]
    safe, plain = (cls(0.8, num_classes=2, mode=mode) for cls in (VarianceSafeMixup, Mixup))
    labels = torch.zeros(64)
    kept = torch.stack([safe(batch.clone(), labels)[0].square().mean() / batch.square().mean() for batch in batches])
    lost = torch.stack([plain(batch.clone(), labels)[0].square().mean() / batch.square().mean() for batch in batches])
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(lost.mean()) < 0.93


def test_images_are_not_changed_in_place_and_unmixed_ones_not_at_all() -> None:
    images = normal_images(4, 16)
    before = images.clone()
    mixup = VarianceSafeMixup(1.0, num_classes=2, mode="elem", mean=(0.1, 0.2, 0.3))
    mixup(images, torch.zeros(4))
    assert torch.equal(images, before)
    mixup.mixup_enabled = False
    assert torch.equal(mixup(images, torch.zeros(4))[0], images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "all"}, "mode must be one of"),
        ({"mixup_alpha": 0.0}, "must be above 0"),
        ({"mixup_alpha": -1.0, "cutmix_alpha": 1.0}, "must be above 0"),
        ({"cutmix_minmax": (0.1,)}, "is a pair"),
        ({"prob": 1.5}, "lie in"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VarianceSafeMixup(**options)


@pytest.mark.parametrize(
    ("images", "target", "message"),
    [
        (torch.zeros(3, 3, 8, 8), torch.zeros(3), "must be even"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2), "normalised images"),
        (torch.zeros(2, 3, 8), torch.zeros(2), "normalised images"),
    ],
)
def test_batches_that_cannot_be_mixed(images: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        VarianceSafeMixup()(images, target)
    with pytest.raises(DataError, match="dense labels"):
        VarianceSafeMixup(multi_label=True)(torch.zeros(2, 3, 8, 8), torch.zeros(2))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.1, 0.46), ((0.5, 0.0, -0.5), (0.2, 0.4, 0.6))])
def test_erasing_keeps_mean_and_second_moment(mean: Any, std: Any) -> None:
    centre, scale = (torch.tensor(value).expand(3) if isinstance(value, float) else torch.tensor(value) for value in (mean, std))
    images = normal_images(64) * scale.reshape(3, 1, 1) + centre.reshape(3, 1, 1)
    erased = VarianceSafeErasing(mean, std, probability=1.0)(images.clone())
    area = (erased != images).any(1).float().mean((1, 2))
    assert 0.018 < float(area.min()) < 0.1 < float(area.max()) < 0.35  # sides are rounded to pixels
    assert erased.mean((0, 2, 3)).tolist() == pytest.approx(centre.tolist(), abs=0.01)
    assert erased.std((0, 2, 3)).tolist() == pytest.approx(scale.tolist(), rel=0.02)


def test_erasing_takes_single_images_and_its_probability() -> None:
    image = normal_images(1)[0]
    assert torch.equal(VarianceSafeErasing(probability=0.0)(image.clone()), image)
    assert VarianceSafeErasing(probability=1.0)(image.clone().half()).dtype is torch.float16
    touched = [not torch.equal(VarianceSafeErasing(probability=0.25)(image.clone()), image) for _ in range(200)]
    assert 25 < sum(touched) < 75


@pytest.mark.parametrize(
    "options",
    [{"probability": 2.0}, {"min_area": 0.5, "max_area": 0.2}, {"min_area": 0.0}, {"count": 0}, {"min_aspect": 0.0}, {"std": -1.0}],
)
def test_wrong_erasing_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        VarianceSafeErasing(**options)
    with pytest.raises(DataError):
        VarianceSafeErasing()(torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_what_is_suggested_is_what_timm_takes() -> None:
    found = suggest_augmentation()
    transform = timm.data.create_transform(64, is_training=True, **found.create_transform)
    assert (transform.transforms[-1].per_pixel, found.erasing) == (True, None)
    assert Mixup(**found.mixup).mixup_alpha == 0.0
    assert str(found).splitlines() == [
        f"create_transform(mean={MEAN}, std={STD}, re_prob=0.25, re_mode='pixel', re_count=1)",
        "Mixup(mixup_alpha=0.0, cutmix_alpha=1.0)",
    ]


def test_another_normalization_gets_erasing_of_its_own() -> None:
    found = suggest_augmentation(HALF, HALF)
    assert found.create_transform["re_prob"] == 0.0
    assert found.erasing is not None
    images = normal_images(32) * torch.tensor(STD).reshape(3, 1, 1) / 0.5 + (torch.tensor(MEAN).reshape(3, 1, 1) - 0.5) / 0.5
    erased = VarianceSafeErasing(**{**found.erasing, "probability": 1.0})(images.clone())
    assert float(erased.square().mean() / images.square().mean()) == pytest.approx(1.0, rel=0.01)
    report = measure_positional_variance(vit(), [images], [images])
    measured = suggest_augmentation(HALF, HALF, images=report.evaluation.images).erasing
    assert measured is not None
    assert measured["std"] == pytest.approx(found.erasing["std"], rel=0.02)
    shifted = suggest_augmentation(images=ImageMoments((0.4, 0.0, 0.0), (1.0, 1.0, 1.0)))  # unit second moment, but no zero mean
    assert shifted.erasing is not None
    assert "VarianceSafeErasing(mean=(0.4, 0.0, 0.0), std=(0.9165, 1.0, 1.0)" in str(shifted)
    with pytest.raises(ConfigError):
        suggest_augmentation((0.5,), HALF)
