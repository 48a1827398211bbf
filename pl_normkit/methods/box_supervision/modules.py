"""The pool, the classifier and the loss."""

from __future__ import annotations

__all__ = ["BackgroundAwarePool2d", "BoxPooling", "CosineClassifier", "LossStatistics", "NoiseAwareLoss", "PoolStatistics"]

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, DataError

VOID = 255
_TINY = 1e-12


@dataclass(frozen=True)
class PoolStatistics:
    """What a `BackgroundAwarePool2d` saw in its last call.

    Attributes:
        foreground: mean of 1 - A inside boxes, over images that were pooled with attention; NaN without any.
        without_query: share of the images with boxes that have no cell with background.
    """

    foreground: float
    without_query: float


@dataclass(frozen=True)
class BoxPooling:
    """What `BackgroundAwarePool2d` gives.

    Attributes:
        regions: (R * roi^2, C), one vector a cell of each box, box by box.
        region_boxes: (R * roi^2,) number of the box that a vector belongs to, boxes counted over the whole batch.
        queries: (J, C), the background vectors of all images that were pooled with attention; their class is background.
        attention: (N, h, w), A: 1 outside boxes, how much a cell inside looks like the background; 0 inside where an image got none.
        used: (N,) whether an image was pooled with attention.
    """

    regions: Tensor
    region_boxes: Tensor
    queries: Tensor
    attention: Tensor
    used: Tensor


class BackgroundAwarePool2d(nn.Module):
    """Average the features of each box, weighted by how little they look like the background outside all boxes.

    Queries q_j are mean background features of the cells of a grid; attention A(p) is the mean over j of relu(cos(f(p), q_j)) inside
    boxes and 1 outside; a box becomes the average of f weighted by 1 - A over each cell of a small grid. An image whose background
    share is at most `min_background`, or that has no cell with background, gets the plain average (A = 0) and no queries.

    Args:
        grid: cells a side for the queries; 4 in training, 1 for pseudo labels.
        roi: cells a side that each box is pooled to.
        min_background: share of the image outside boxes up to which attention is not used.

    Called with features (N, C, h, w), a list of N tensors of boxes (K, 4) as x1, y1, x2, y2 in pixels, and the image's (height, width).
    Computes in float32 whatever the features' precision, without a loop over boxes or images.

    Raises:
        DataError: for boxes of another form, of another number of images, or with x2 <= x1 or y2 <= y1.
        ConfigError: for a grid below 1.

    Source: arXiv 2104.00905 after public summaries; the 1e-12, 2x2 cells, 0.125 and N = 4 are those of the public code. Boxes are
    resampled by torchvision's `roi_align`.

    >>> pool = BackgroundAwarePool2d()
    >>> out = pool(torch.rand(1, 8, 16, 16), [torch.tensor([[8.0, 8.0, 40.0, 40.0]])], (64, 64))
    >>> out.regions.shape, out.queries.shape[1], out.attention.shape
    (torch.Size([4, 8]), 8, torch.Size([1, 16, 16]))
    """

    def __init__(self, grid: int = 4, roi: int = 2, min_background: float = 0.125) -> None:
        super().__init__()
        if not all(type(size) is int and size > 0 for size in (grid, roi)):
            raise ConfigError("grid and roi are cells a side, at least 1", evidence=f"{grid}, {roi}")
        self.grid, self.roi, self.min_background = grid, roi, min_background
        self._seen: Tensor | None = None

    @property
    def statistics(self) -> PoolStatistics | None:
        """What the last call saw; None before the first."""
        return None if self._seen is None else PoolStatistics(*self._seen.tolist())

    def forward(self, features: Tensor, boxes: Sequence[Tensor], image_size: tuple[int, int]) -> BoxPooling:
        flat, owner = _checked_boxes(features, boxes)
        background = _background(flat, owner, len(features), image_size)
        share = background.mean((1, 2))
        cells = F.interpolate(background[:, None], features.shape[2:], mode="nearest")
        values = features.float()
        queries, weights = self._queries(values, cells)
        used = (share > self.min_background) & (weights > 0).any(1)
        attention = torch.where(used[:, None, None], self._attention(values, queries, weights), 0.0)
        attention = torch.where(cells[:, 0] > 0, 1.0, attention)
        regions = self._pool(values, attention, flat, owner, image_size)
        self._seen = _pool_numbers(attention, cells[:, 0], used, weights, owner)
        kept = (weights > 0) & used[:, None]
        region_boxes = torch.arange(len(flat), device=features.device).repeat_interleave(self.roi**2)
        return BoxPooling(regions.to(features.dtype), region_boxes, queries[kept].to(features.dtype), attention, used)

    def _queries(self, features: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Mean background features (N, g * g, C) of each cell of the grid, and how much background it holds (N, g * g)."""
        height, width = features.shape[2:]
        down, right = (-height) % self.grid, (-width) % self.grid
        pad = (right // 2, right - right // 2, down // 2, down - down // 2)
        masked, mask = (F.pad(image, pad) for image in (features * cells, cells))
        size = (mask.shape[2] // self.grid, mask.shape[3] // self.grid)
        sums = F.avg_pool2d(masked, size, divisor_override=1).flatten(2).transpose(1, 2)
        weights = F.avg_pool2d(mask, size, divisor_override=1).flatten(1)
        return sums / (weights[..., None] + _TINY), weights

    def _attention(self, features: Tensor, queries: Tensor, weights: Tensor) -> Tensor:
        directions = F.normalize(features.flatten(2), dim=1, eps=_TINY)
        cosines = (F.normalize(queries, dim=2, eps=_TINY) @ directions).relu()
        kept = (weights > 0).to(cosines.dtype)[..., None]
        mean = (cosines * kept).sum(1) / kept.sum(1).clamp_min(1)
        return mean.view(len(features), *features.shape[2:])

    def _pool(self, features: Tensor, attention: Tensor, boxes: Tensor, owner: Tensor, image_size: tuple[int, int]) -> Tensor:
        roi_align = importlib.import_module("torchvision.ops").roi_align
        height, width = image_size
        scale = boxes.new_tensor([features.shape[3] / width, features.shape[2] / height]).repeat(2)
        rois = torch.cat([owner[:, None].to(boxes.dtype), boxes * scale], 1)
        weight = (1 - attention)[:, None]
        both = roi_align(torch.cat([features * weight, weight], 1), rois, (self.roi, self.roi), aligned=True)
        pooled: Tensor = both[:, :-1] / both[:, -1:].clamp_min(_TINY)
        return pooled.flatten(2).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def _pool_numbers(attention: Tensor, cells: Tensor, used: Tensor, weights: Tensor, owner: Tensor) -> Tensor:
    """The fields of `PoolStatistics`, left on the device."""
    inside = (cells == 0) & used[:, None, None]
    has_boxes = torch.zeros_like(used).index_fill(0, owner, True)
    lacks_query = has_boxes & ~(weights > 0).any(1)
    foreground = torch.where(inside, 1 - attention, math.nan).nanmean()
    return torch.stack([foreground, lacks_query.sum() / has_boxes.sum().clamp_min(1)])


def _checked_boxes(features: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All boxes of a batch (R, 4), and the number of the image of each."""
    if features.dim() != 4 or len(boxes) != len(features) or not all(image.dim() == 2 and image.shape[1] == 4 for image in boxes):
        seen = f"features {tuple(features.shape)}, boxes {[tuple(image.shape) for image in boxes]}"
        raise DataError("boxes are one tensor (K, 4) for each image of (N, C, h, w)", evidence=seen)
    flat = torch.cat([image.to(features.device, torch.float32) for image in boxes])
    if len(flat) and not bool((flat[:, 2:] > flat[:, :2]).all()):
        bad = int((~(flat[:, 2:] > flat[:, :2]).all(1)).nonzero()[0])
        raise DataError("a box has no area", where=f"box {bad} of the batch", evidence=str(flat[bad].tolist()), fix="write x1, y1, x2, y2")
    counts = torch.tensor([len(image) for image in boxes], device=features.device)
    return flat, torch.arange(len(boxes), device=features.device).repeat_interleave(counts)


def _background(boxes: Tensor, owner: Tensor, images: int, size: tuple[int, int]) -> Tensor:
    """(N, H, W): 1 for pixels whose centre lies in no box, 0 elsewhere."""
    y = torch.arange(size[0], device=boxes.device) + 0.5
    x = torch.arange(size[1], device=boxes.device) + 0.5
    rows = ((y >= boxes[:, 1:2]) & (y < boxes[:, 3:4])).float()
    columns = ((x >= boxes[:, 0:1]) & (x < boxes[:, 2:3])).float()
    member = F.one_hot(owner, images).float() if len(boxes) else boxes.new_zeros(0, images)
    covered = torch.einsum("rn,rh,rw->nhw", member, rows, columns)
    return (covered == 0).float()


class CosineClassifier(nn.Module):
    """Cosines between features and one direction a class, without a bias: (N, C, H, W) -> (N, classes, H, W) in [-1, 1].

    Source: the segmenter's last layer in arXiv 2104.00905 after public summaries.

    >>> cosines = CosineClassifier(8, 3)(torch.randn(2, 8, 4, 4))
    >>> cosines.shape, bool((cosines.abs() <= 1.0001).all())
    (torch.Size([2, 3, 4, 4]), True)
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, channels, 1, 1))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        return F.conv2d(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


@dataclass(frozen=True)
class LossStatistics:
    """What a `NoiseAwareLoss` saw in its last call: NaN where there was nothing to see.

    Attributes:
        disagreement: share of valid pixels whose two labels differ.
        sigma: median weight of those pixels.
        logit_range: temperature times the range of the cosines.
    """

    disagreement: float
    sigma: float
    logit_range: float


class NoiseAwareLoss(nn.Module):
    """Cross-entropy where two pseudo labels agree, and a doubted one where they differ.

    L = mean over agreeing pixels of -log H + lam * sum of sigma * -log H(first label) / sum of sigma over the others, with
    H = softmax(tau * cos) and sigma = (D(first label) / max D)^gamma, D = 1 + cos. Pixels that are 255 in either map enter nothing;
    empty sets add 0.

    Args:
        tau: temperature.
        gamma: how fast confidence falls; larger doubts more.
        lam: weight of the doubted part.
        detach_weight: False lets gradients pass through sigma, as the public code does.

    Called with cosines (N, classes, H, W), and two label maps (N, H, W) of integers, the first being the one that is doubted.

    Source: arXiv 2104.00905 after public summaries, defaults of the public code's VGG configuration; finite for empty sets here. A public
    replication did not find its gain.

    >>> loss = NoiseAwareLoss()
    >>> labels = torch.randint(0, 3, (2, 4, 4))
    >>> bool(loss(CosineClassifier(8, 3)(torch.randn(2, 8, 4, 4)), labels, labels).isfinite())
    True
    """

    def __init__(self, tau: float = 20.0, gamma: float = 7.0, lam: float = 0.1, *, detach_weight: bool = False) -> None:
        super().__init__()
        self.tau, self.gamma, self.lam, self.detach_weight = tau, gamma, lam, detach_weight
        self._seen: Tensor | None = None

    @property
    def statistics(self) -> LossStatistics | None:
        """What the last call saw; None before the first."""
        return None if self._seen is None else LossStatistics(*self._seen.tolist())

    def forward(self, cosines: Tensor, first: Tensor, second: Tensor) -> Tensor:
        cosines = cosines.float()
        valid = (first != VOID) & (second != VOID)
        agreed, differing = valid & (first == second), valid & (first != second)
        labels = torch.where(valid, first, 0).long()
        nll = F.cross_entropy(self.tau * cosines, labels, reduction="none")
        sigma = self._sigma(cosines, labels)
        certain = _weighted_mean(nll, agreed.to(nll.dtype))
        doubted = _weighted_mean(nll, differing * sigma)
        self._seen = _loss_numbers(self.tau * cosines, valid, differing, sigma)
        return certain + self.lam * doubted

    def _sigma(self, cosines: Tensor, labels: Tensor) -> Tensor:
        confidence = 1 + cosines
        own = confidence.gather(1, labels[:, None])[:, 0]
        sigma: Tensor = (own.clamp_min(0) / confidence.amax(1).clamp_min(_TINY)) ** self.gamma
        return sigma.detach() if self.detach_weight else sigma


@torch.no_grad()
def _loss_numbers(logits: Tensor, valid: Tensor, differing: Tensor, sigma: Tensor) -> Tensor:
    """The fields of `LossStatistics`, left on the device."""
    median = torch.where(differing, sigma, math.nan).nanmedian()
    return torch.stack([differing.sum() / valid.sum(), median, logits.amax() - logits.amin()])


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """0 where nothing has weight; values without weight are left out, not multiplied by 0, and weights count however small they all are."""
    kept = torch.where(weights > 0, values, 0.0)
    relative = weights / weights.amax().detach().clamp_min(torch.finfo(weights.dtype).tiny)
    return (kept * relative).sum() / relative.sum().clamp_min(1.0)
