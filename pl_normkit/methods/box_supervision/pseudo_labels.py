"""Label maps from a trained box classifier: unaries, a refinement by the image, and labels by retrieval."""

from __future__ import annotations

__all__ = ["box_unaries", "refine_by_guide", "retrieved_labels"]

import torch
import torch.nn.functional as F
from torch import Tensor

from pl_normkit.errors import DataError

_TINY = 1e-12


def box_unaries(
    features: Tensor, weight: Tensor, attention: Tensor, boxes: Tensor, labels: Tensor, size: tuple[int, int], *, threshold: float = 0.99
) -> Tensor:
    """Scores (classes, H, W) of one image: background from attention, each class from its activation map inside its own boxes.

    Class scores are relu(f . w_c) over their maximum in each box, 0 outside the boxes of the class. The background score is A where it
    reaches `threshold` times its maximum, 0 below, and 1 outside all boxes.

    Args:
        features: (C, h, w) of one image.
        weight: (classes, C) of the classifier, background first.
        attention: (h, w), A of `BackgroundAwarePool2d(grid=1)`.
        boxes: (K, 4) as x1, y1, x2, y2 in pixels.
        labels: (K,) classes of the boxes, at least 1.
        size: (height, width) of the image.
        threshold: share of the attention's maximum.

    Raises:
        DataError: when boxes and labels do not fit.

    Source: arXiv 2104.00905 after public summaries; the maximum per box and the threshold are those of the public code.

    >>> boxes, labels = torch.tensor([[4, 4, 20, 20]]), torch.tensor([2])
    >>> scores = box_unaries(torch.rand(4, 8, 8), torch.rand(3, 4), torch.rand(8, 8), boxes, labels, (32, 32))
    >>> scores.shape, float(scores[1].abs().max()), float(scores[0, 0, 0])
    (torch.Size([3, 32, 32]), 0.0, 1.0)
    """
    if len(boxes) != len(labels) or (len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) < len(weight)):
        raise DataError("each box has a class between 1 and the last", evidence=f"{len(boxes)} boxes, labels {labels.tolist()}")
    maps = _upsampled(torch.einsum("chw,kc->khw", features.float(), weight.float()).relu(), size)
    background = _upsampled(attention[None].float(), size)[0]
    scores = torch.zeros(len(weight), *size, device=features.device)
    outside = torch.ones(size, dtype=torch.bool, device=features.device)
    for box, label in zip(boxes.round().int().tolist(), labels.tolist(), strict=True):
        left, top, right, bottom = max(box[0], 0), max(box[1], 0), box[2], box[3]
        inside = maps[label, top:bottom, left:right]
        if inside.numel():
            scaled = inside / inside.max().clamp_min(_TINY)
            scores[label, top:bottom, left:right] = torch.maximum(scores[label, top:bottom, left:right], scaled)
            outside[top:bottom, left:right] = False
    scores[0] = torch.where(background >= threshold * background.max(), background, 0.0)
    scores[0][outside] = 1.0
    return scores


def refine_by_guide(image: Tensor, scores: Tensor, *, radius: int = 8, eps: float = 1e-3) -> Tensor:
    """Scores (classes, H, W) that follow the edges of an image (3, H, W) in 0..1: a guided filter with a grey guide.

    It stands where no dense CRF is installed, and is not the paper's refinement.

    Source: He, Sun and Tang, "Guided Image Filtering", ECCV 2010, equations (5) to (8).

    >>> flat = torch.full((2, 16, 16), 0.5)
    >>> torch.allclose(refine_by_guide(torch.rand(3, 16, 16), flat), flat, atol=1e-5)
    True
    """
    guide = image.float().mean(0, keepdim=True)
    mean_guide, mean_scores = _box_mean(guide, radius), _box_mean(scores.float(), radius)
    covariance = _box_mean(guide * scores, radius) - mean_guide * mean_scores
    variance = _box_mean(guide * guide, radius) - mean_guide**2
    slope = covariance / (variance + eps)
    offset = mean_scores - slope * mean_guide
    return _box_mean(slope, radius) * guide + _box_mean(offset, radius)


def _box_mean(maps: Tensor, radius: int) -> Tensor:
    """Mean over windows that are cut at the border."""
    return F.avg_pool2d(maps[None], 2 * radius + 1, 1, radius, count_include_pad=False)[0]


def retrieved_labels(features: Tensor, labels: Tensor, weight: Tensor, boxes: Tensor) -> Tensor:
    """The class whose mean feature each pixel is nearest to by cosine: labels (H, W) for one image, among the classes of `labels`.

    Args:
        features: (C, h, w).
        labels: (H, W), the refined label map.
        weight: (classes, C) of the classifier; stands for the mean of a class that has boxes and no pixel.
        boxes: (K, 5) as x1, y1, x2, y2, class; outside all boxes a pixel is background.

    Source: arXiv 2104.00905 after public summaries; the stand-in and the background outside boxes are those of the public code.

    >>> out = retrieved_labels(torch.rand(4, 8, 8), torch.zeros(32, 32), torch.rand(3, 4), torch.tensor([[4, 4, 20, 20, 2]]))
    >>> out.shape, int(out[0, 0])
    (torch.Size([32, 32]), 0)
    """
    maps = _upsampled(features.float(), (labels.shape[-2], labels.shape[-1]))
    directions = F.normalize(maps, dim=0)
    classes = sorted({0, *boxes[:, 4].int().tolist()})
    means = [maps[:, labels == c].mean(1) if bool((labels == c).any()) else weight[c].float() for c in classes]
    cosines = torch.einsum("chw,kc->khw", directions, F.normalize(torch.stack(means), dim=1)).relu()
    inside = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    allowed = torch.zeros(len(classes), *labels.shape, dtype=torch.bool, device=labels.device)
    allowed[0] = True
    for left, top, right, bottom, label in boxes.round().int().tolist():
        inside[max(top, 0) : bottom, max(left, 0) : right] = True
        allowed[classes.index(label), max(top, 0) : bottom, max(left, 0) : right] = True
    found = torch.tensor(classes, device=labels.device)[torch.where(allowed, cosines, -1.0).argmax(0)]
    return torch.where(inside, found, 0)


def _upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=True)[0]
