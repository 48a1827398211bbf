"""Scores, refinement and retrieval on scenes whose right labels are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pl_normkit.errors import DataError
from pl_normkit.methods.box_supervision import box_unaries, refine_by_guide, retrieved_labels


def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features with one direction a class on a map of 16 x 16: a disc of class 1 in its box, background elsewhere."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    truth = (((y - 8) ** 2 + (x - 8) ** 2) < 20).long()
    features = torch.stack([(truth == 0).float(), (truth == 1).float(), torch.zeros(16, 16)])
    return features, truth, torch.tensor([[14, 14, 50, 50, 1]])


def test_scores_follow_the_boxes_of_their_class() -> None:
    features, truth, boxes = scene()
    attention = (truth == 0).float()
    scores = box_unaries(features, torch.eye(3), attention, boxes[:, :4], boxes[:, 4], (64, 64))
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[14:50, 14:50] = False
    assert float(scores[1][outside].abs().max()) == 0.0
    assert bool((scores[0][outside] == 1).all())
    assert float(scores[1].max()) == pytest.approx(1.0)
    assert float(scores[2].abs().max()) == 0.0
    share = torch.nn.functional.interpolate(truth[None, None].float(), (64, 64), mode="bilinear", align_corners=True)[0, 0]
    expected = (share > 0.01) & ~outside  # background below 0.99 of its maximum counts for nothing
    assert torch.equal(scores.argmax(0) == 1, expected)


def test_labels_that_do_not_fit_are_named() -> None:
    features, truth, boxes = scene()
    for labels in (torch.tensor([0]), torch.tensor([3]), torch.tensor([1, 1])):
        with pytest.raises(DataError, match="each box has a class"):
            box_unaries(features, torch.eye(3), truth.float(), boxes[:, :4], labels, (64, 64))


def test_retrieval_finds_the_disc_from_a_shifted_label_map() -> None:
    features, truth, boxes = scene()
    shifted = torch.nn.functional.interpolate(truth.roll(2, 1)[None, None].float(), (64, 64), mode="nearest")[0, 0].long()
    found = retrieved_labels(features, shifted, torch.eye(3), boxes)
    small = torch.nn.functional.interpolate(truth[None, None].float(), (64, 64), mode="nearest")[0, 0]
    assert float((found == small).float().mean()) > 0.93 > float((shifted == small).float().mean())


def test_a_class_without_pixels_is_retrieved_by_its_weight() -> None:
    features, _, boxes = scene()
    found = retrieved_labels(features, torch.zeros(64, 64, dtype=torch.long), torch.eye(3), boxes)
    assert int((found == 1).sum()) > 200


def guided_filter(guide: np.ndarray, values: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """The equations window by window."""
    height, width = guide.shape
    slope, offset = np.zeros_like(guide), np.zeros_like(guide)
    window = lambda y, x: (slice(max(y - radius, 0), y + radius + 1), slice(max(x - radius, 0), x + radius + 1))  # noqa: E731
    for y in range(height):
        for x in range(width):
            g, p = guide[window(y, x)], values[window(y, x)]
            slope[y, x] = ((g * p).mean() - g.mean() * p.mean()) / (g.var() + eps)
            offset[y, x] = p.mean() - slope[y, x] * g.mean()
    out = np.zeros_like(guide)
    for y in range(height):
        for x in range(width):
            out[y, x] = slope[window(y, x)].mean() * guide[y, x] + offset[window(y, x)].mean()
    return out


def test_refinement_is_the_guided_filter() -> None:
    image, scores = torch.rand(3, 12, 15, dtype=torch.float64), torch.rand(2, 12, 15, dtype=torch.float64)
    out = refine_by_guide(image, scores, radius=2, eps=1e-2)
    guide = image.mean(0).numpy()
    for c in range(2):
        assert np.allclose(out[c].numpy(), guided_filter(guide, scores[c].numpy(), 2, 1e-2), atol=1e-5)
