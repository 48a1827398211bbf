"""Pool and loss against loops over pixels, boxes and cells; empty sets, half precision, void pixels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.nn import BackgroundAwarePool2d, CosineClassifier, NoiseAwareLoss


def by_loops(features: Tensor, boxes: Tensor, size: tuple[int, int], grid: int, roi: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, attention and regions of one image, pixel by pixel. `size` is a multiple of the map, the map one of the grid."""
    _, height, width = features.shape
    mask = torch.ones(size)
    for x1, y1, x2, y2 in boxes.tolist():
        for y in range(size[0]):
            for x in range(size[1]):
                if x1 <= x + 0.5 < x2 and y1 <= y + 0.5 < y2:
                    mask[y, x] = 0
    small = F.interpolate(mask[None, None], (height, width), mode="nearest")[0, 0]
    queries = []
    for row in range(grid):
        for column in range(grid):
            cell = (slice(row * height // grid, (row + 1) * height // grid), slice(column * width // grid, (column + 1) * width // grid))
            weight = small[cell]
            if weight.sum() > 0:
                queries.append((features[(slice(None), *cell)] * weight).sum((1, 2)) / weight.sum())
    attention = torch.ones(height, width)
    for y in range(height):
        for x in range(width):
            if small[y, x] == 0:
                attention[y, x] = sum(F.cosine_similarity(features[:, y, x], q, dim=0).relu() for q in queries) / len(queries)
    scaled = boxes * torch.tensor([width / size[1], height / size[0]]).repeat(2)
    rois = [scaled]
    pooled = roi_align((features * (1 - attention))[None], rois, (roi, roi), aligned=True)
    weight = roi_align((1 - attention)[None, None], rois, (roi, roi), aligned=True)
    return torch.stack(queries), attention, (pooled / weight).flatten(2).transpose(1, 2).flatten(0, 1)


BOXES = [torch.tensor([[4.0, 6.0, 20.0, 30.0], [12.0, 2.0, 30.0, 18.0]]), torch.tensor([[0.0, 0.0, 17.0, 9.0]])]


def test_the_pool_is_what_loops_say() -> None:
    features = torch.randn(2, 5, 16, 16)
    out = BackgroundAwarePool2d()(features, BOXES, (32, 32))
    expected = [by_loops(features[n], BOXES[n], (32, 32), 4, 2) for n in range(2)]
    assert torch.allclose(out.queries, torch.cat([queries for queries, _, _ in expected]), atol=1e-5)
    assert torch.allclose(out.attention, torch.stack([attention for _, attention, _ in expected]), atol=1e-5)
    assert torch.allclose(out.regions, torch.cat([regions for _, _, regions in expected]), atol=1e-4)
    assert out.region_boxes.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert out.used.tolist() == [True, True]


@pytest.mark.parametrize("box", [[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 32.0, 31.0]], ids=["no background", "background of at most 0.125"])
def test_images_without_background_get_the_plain_average(box: list[float]) -> None:
    features = torch.randn(1, 5, 16, 16)
    boxes = torch.tensor([box])
    out = BackgroundAwarePool2d()(features, [boxes], (32, 32))
    plain = roi_align(features, [boxes / 2], (2, 2), aligned=True).flatten(2).transpose(1, 2).flatten(0, 1)
    small = out.attention[0] == 1
    assert (out.used.tolist(), len(out.queries)) == ([False], 0)
    assert torch.allclose(out.attention[0][~small], torch.zeros(()))
    if not small.any():
        assert torch.allclose(out.regions, plain, atol=1e-5)


def test_attention_of_zero_is_the_average_of_the_box() -> None:
    """Features inside the box stand at right angles to those outside."""
    features = torch.zeros(1, 2, 16, 16)
    features[0, 0] = 1
    features[0, :, 4:12, 4:12] = torch.stack([torch.zeros(8, 8), torch.rand(8, 8) + 0.5])
    boxes = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    out = BackgroundAwarePool2d(roi=1)(features, [boxes], (32, 32))
    assert torch.allclose(out.attention[0, 4:12, 4:12], torch.zeros(8, 8))
    inner = out.regions[0, 1]
    assert float(inner) == pytest.approx(float(features[0, 1, 4:12, 4:12].mean()), rel=0.02)


@pytest.mark.parametrize("size", [(15, 13), (16, 16), (7, 5)])
def test_any_size_and_images_without_boxes(size: tuple[int, int]) -> None:
    features = torch.randn(3, 4, *size, requires_grad=True)
    boxes = [torch.tensor([[1.0, 1.0, 20.0, 22.0]]), torch.zeros(0, 4), torch.tensor([[3.0, 3.0, 9.0, 9.0], [0.0, 0.0, 4.0, 30.0]])]
    out = BackgroundAwarePool2d()(features, boxes, (40, 40))
    (out.regions.square().sum() + out.queries.square().sum()).backward()
    assert out.regions.shape == (12, 4)
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())


def test_half_precision_keeps_its_type_and_stays_close() -> None:
    features = torch.randn(2, 5, 16, 16)
    exact = BackgroundAwarePool2d()(features, BOXES, (32, 32))
    half = BackgroundAwarePool2d()(features.half() * 1000, BOXES, (32, 32))
    assert half.regions.dtype == torch.float16
    assert torch.allclose(half.regions.float() / 1000, exact.regions, atol=1e-2)


@pytest.mark.parametrize(
    "boxes", [[torch.zeros(1, 4)], [torch.zeros(1, 4)] * 2, [torch.zeros(4)] * 2, [torch.tensor([[5.0, 5.0, 2.0, 9.0]])] * 2]
)
def test_bad_boxes_are_named(boxes: list[Tensor]) -> None:
    with pytest.raises(DataError, match="box"):
        BackgroundAwarePool2d()(torch.randn(2, 3, 8, 8), boxes, (16, 16))
    with pytest.raises(ConfigError):
        BackgroundAwarePool2d(grid=0)


def loss_by_loops(cosines: Tensor, first: Tensor, second: Tensor, tau: float, gamma: float, lam: float) -> float:
    agreed, doubted, weights = [], 0.0, 0.0
    n, _, height, width = cosines.shape
    for b in range(n):
        for y in range(height):
            for x in range(width):
                a, c = int(first[b, y, x]), int(second[b, y, x])
                if 255 in (a, c):
                    continue
                values = cosines[b, :, y, x]
                nll = -float(torch.log_softmax(tau * values, 0)[a])
                if a == c:
                    agreed.append(nll)
                else:
                    sigma = float(((1 + values[a]) / (1 + values).max()) ** gamma)
                    doubted, weights = doubted + sigma * nll, weights + sigma
    return (sum(agreed) / len(agreed) if agreed else 0.0) + (lam * doubted / weights if weights else 0.0)


labels_maps = st.lists(st.sampled_from([0, 1, 2, 255]), min_size=12, max_size=12)


@settings(max_examples=30, deadline=None)
@given(labels_maps, labels_maps, st.integers(0, 100))
@example([0, 0, 2, 0, 2, 0, 0, 0, 0, 0, 0, 2], [0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2], 10)  # one doubted pixel, whose weight is tiny
def test_the_loss_is_what_loops_say_and_always_finite(first: list[int], second: list[int], seed: int) -> None:
    cosines = (2 * torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1).requires_grad_()
    maps = [torch.tensor(labels).view(1, 3, 4) for labels in (first, second)]
    loss = NoiseAwareLoss()
    value = loss(cosines, *maps)
    assert float(value.detach()) == pytest.approx(
        loss_by_loops(cosines.detach(), *maps, loss.tau, loss.gamma, loss.lam), rel=1e-4, abs=1e-6
    )
    value.backward()
    assert cosines.grad is not None
    assert bool(cosines.grad.isfinite().all())


def test_extreme_cosines_stay_finite() -> None:
    for value in (-1.0, 1.0):
        cosines = torch.full((1, 2, 2, 2), value, requires_grad=True)
        out = NoiseAwareLoss()(cosines, torch.zeros(1, 2, 2, dtype=torch.long), torch.ones(1, 2, 2, dtype=torch.long))
        out.backward()
        assert bool(out.isfinite())
        assert cosines.grad is not None
        assert bool(cosines.grad.isfinite().all())


def test_the_weight_can_be_detached() -> None:
    first, second = torch.zeros(1, 2, 2, dtype=torch.long), torch.ones(1, 2, 2, dtype=torch.long)
    gradients = []
    for detach in (False, True):
        cosines = torch.tensor([0.5, -0.2, 0.1, 0.7, -0.4, 0.3, 0.0, 0.6]).view(1, 2, 2, 2).requires_grad_()
        NoiseAwareLoss(detach_weight=detach)(cosines, first, second).backward()
        gradients.append(cosines.grad)
    assert not torch.allclose(*gradients)


def test_statistics_say_what_was_seen() -> None:
    loss = NoiseAwareLoss()
    assert loss.statistics is None
    first, second = torch.zeros(1, 2, 2, dtype=torch.long), torch.tensor([[[0, 1], [255, 0]]])
    loss(torch.tensor([0.5, -0.5]).view(1, 2, 1, 1).expand(1, 2, 2, 2), first, second)
    assert loss.statistics is not None
    assert (loss.statistics.disagreement, loss.statistics.sigma, loss.statistics.logit_range) == (pytest.approx(1 / 3), 1.0, 20.0)
    pool = BackgroundAwarePool2d()
    pool(torch.randn(1, 2, 8, 8), [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], (32, 32))
    assert pool.statistics is not None
    assert (math.isnan(pool.statistics.foreground), pool.statistics.without_query) == (True, 1.0)


def test_the_classifier_is_the_cosine() -> None:
    classifier = CosineClassifier(4, 3)
    x = torch.randn(2, 4, 5, 5)
    expected = F.cosine_similarity(x[:, None], classifier.weight.view(1, 3, 4, 1, 1), dim=2)
    assert torch.allclose(classifier(x), expected, atol=1e-5)
