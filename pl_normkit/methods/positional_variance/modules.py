"""Augmentation that keeps mean and second moment of the normalised image, and so the weight of the positional embedding."""

from __future__ import annotations

__all__ = ["VarianceSafeErasing", "VarianceSafeMixup"]

import math
import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pl_normkit.errors import ConfigError, DataError

_MODES = ("batch", "pair", "elem")


class VarianceSafeMixup:
    """Mixup and CutMix whose mixed images have the variance of plain ones; a drop-in for timm's `Mixup`.

    A mixture lam I1 + (1 - lam) I2 has v = lam^2 + (1 - lam)^2 + 2 lam (1 - lam) c of their variance, with c the correlation of two
    images: 0 for noise, 0.5 for scikit-learn's digits, which all stand in the middle of a black ground. c is measured on each batch,
    between the images that are mixed, and taken to lie in [0, 1], as it does in expectation for images drawn independently. The
    mixture's deviation from `mean` is multiplied by 1 / sqrt(v). Labels are mixed with lam as ever; CutMix, which keeps the variance,
    gets no gain. Call it on normalised images. With the same state of `numpy.random` boxes, lam and labels equal timm's.

    This correction is our own extension; it is not shown to be in arXiv 2405.14115, which by public reviews advises against Mixup.

    Args:
        mixup_alpha: lam ~ Beta(alpha, alpha) for Mixup; off at 0.
        cutmix_alpha: the same for CutMix.
        cutmix_minmax: smallest and largest side of the CutMix box as shares of the image, in place of its alpha.
        prob: probability that a batch, pair or element is mixed.
        switch_prob: probability of CutMix where both are on.
        mode: "batch", "pair" or "elem": what shares one lam.
        correct_lam: take lam from the box as cut at the borders.
        label_smoothing: smoothing of the mixed labels.
        num_classes: number of classes.
        multi_label: dense labels (N, classes), smoothed towards 0.5.
        mean: mean of the normalised images, one number or one per channel; 0 fits a normalization that fits the data.

    Raises:
        ConfigError: for an option out of range.
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Literal["batch", "pair", "elem"] = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        multi_label: bool = False,
        *,
        mean: float | Sequence[float] = 0.0,
    ) -> None:
        if mode not in _MODES:
            raise ConfigError(f"mode must be one of {', '.join(_MODES)}", evidence=repr(mode))
        if cutmix_minmax is not None and len(cutmix_minmax) != 2:
            raise ConfigError("cutmix_minmax is a pair: smallest and largest side", evidence=repr(cutmix_minmax))
        if min(mixup_alpha, cutmix_alpha) < 0.0 or (mixup_alpha == 0.0 and cutmix_alpha == 0.0 and cutmix_minmax is None):
            raise ConfigError("mixup_alpha or cutmix_alpha must be above 0", evidence=f"{mixup_alpha} and {cutmix_alpha}")
        if not (0.0 <= prob <= 1.0 and 0.0 <= switch_prob <= 1.0):
            raise ConfigError("prob and switch_prob lie in [0, 1]", evidence=f"{prob} and {switch_prob}")
        self.mixup_alpha = mixup_alpha
        self.cutmix_minmax = cutmix_minmax
        self.cutmix_alpha = cutmix_alpha if cutmix_minmax is None else 1.0
        self.mix_prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.correct_lam = correct_lam
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.mean = mean
        self.mixup_enabled = True

    def __call__(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch with its reverse.

        Args:
            images: normalised, (N, C, H, W), floating; N even. Not changed in place.
            target: class indices (N,), or (N, classes) with `multi_label`.

        Returns:
            mixed images, and labels (N, classes).

        Raises:
            DataError: for an odd batch or images that are not floating.
        """
        if images.dim() != 4 or not images.is_floating_point():
            raise DataError("mixing needs normalised images (N, C, H, W)", evidence=f"{images.dtype} {tuple(images.shape)}")
        if len(images) % 2:
            raise DataError("mixing pairs each image with another: the batch must be even", evidence=f"{len(images)} images")
        lam, is_cut = self._draw(len(images))
        mixed, lam = self._mix(images, lam, is_cut)
        return mixed, self._mix_labels(target, lam, images.dtype)

    def _draw(self, count: int) -> tuple[list[float], list[bool]]:
        """What each image is mixed with lam by, and whether it is cut, not blended; drawn in timm's order."""
        numbers = _global_numbers()
        drawn = {"batch": 1, "pair": count // 2, "elem": count}[self.mode]
        if not self.mixup_enabled:
            return [1.0] * count, [False] * count
        if self.mode == "batch" and numbers.rand() >= self.mix_prob:
            return [1.0] * count, [False] * count
        is_cut = [self.cutmix_alpha > 0.0] * drawn
        if self.mixup_alpha > 0.0 and self.cutmix_alpha > 0.0:
            is_cut = (numbers.rand(drawn) < self.switch_prob).tolist()
        lam = self._draw_lam(numbers, is_cut)
        if self.mode != "batch":
            acts = (numbers.rand(drawn) < self.mix_prob).tolist()
            lam = [value if act else 1.0 for value, act in zip(lam, acts, strict=True)]
        if self.mode == "pair":
            return lam + lam[::-1], is_cut + is_cut[::-1]
        return (lam * count, is_cut * count) if self.mode == "batch" else (lam, is_cut)

    def _draw_lam(self, numbers: Any, is_cut: list[bool]) -> list[float]:
        if self.mode == "batch":
            alpha = self.cutmix_alpha if is_cut[0] else self.mixup_alpha
            return [float(numbers.beta(alpha, alpha))]
        drawn = {alpha_of: numbers.beta(alpha, alpha, size=len(is_cut)).astype("float32").tolist() for alpha_of, alpha in self._alphas()}
        return [drawn[cut][index] for index, cut in enumerate(is_cut)]

    def _alphas(self) -> list[tuple[bool, float]]:
        """(is CutMix, alpha) of what is on."""
        both = [(True, self.cutmix_alpha), (False, self.mixup_alpha)]
        return [(is_cut, alpha) for is_cut, alpha in both if alpha > 0.0]

    def _mix(self, images: Tensor, lam: list[float], is_cut: list[bool]) -> tuple[Tensor, list[float]]:
        """Mixed images, and lam as the boxes turned out."""
        inside, lam = self._boxes(images.shape, lam, is_cut)
        weight = images.new_tensor([1.0 if cut else value for value, cut in zip(lam, is_cut, strict=True)]).reshape(-1, 1, 1, 1)
        mean = torch.as_tensor(self.mean, device=images.device, dtype=images.dtype).reshape(-1, 1, 1)
        other = images.flip(0)
        common = 2.0 * weight * (1.0 - weight) * _correlation(images - mean, other - mean)
        gain = (weight.square() + (1.0 - weight).square() + common).rsqrt()
        blended = mean + gain * (images.lerp(other, 1.0 - weight) - mean)
        mixed = torch.where(weight < 1.0, blended, images)
        return torch.where(inside.to(images.device), other, mixed), lam

    def _boxes(self, shape: Sequence[int], lam: list[float], is_cut: list[bool]) -> tuple[Tensor, list[float]]:
        """Masks (N, 1, H, W) of the pixels that CutMix takes from the other image, and lam after the boxes were cut at the borders."""
        count, height, width = shape[0], shape[-2], shape[-1]
        inside, cut_lam = torch.zeros(count, 1, height, width, dtype=torch.bool), list(lam)
        drawn = {"batch": 1, "pair": count // 2, "elem": count}[self.mode]
        for index in range(drawn):
            if not is_cut[index] or lam[index] == 1.0:
                continue
            top, bottom, left, right = self._box(height, width, lam[index])
            sharing = {"batch": range(count), "pair": (index, count - 1 - index), "elem": (index,)}[self.mode]
            for image in sharing:
                inside[image, :, top:bottom, left:right] = True
                if self.correct_lam or self.cutmix_minmax is not None:
                    cut_lam[image] = 1.0 - (bottom - top) * (right - left) / (height * width)
        return inside, cut_lam

    def _box(self, height: int, width: int, lam: float) -> tuple[int, int, int, int]:
        numbers = _global_numbers()
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax
            sides = [int(numbers.randint(int(side * low), int(side * high))) for side in (height, width)]
            top, left = int(numbers.randint(0, height - sides[0] + 1)), int(numbers.randint(0, width - sides[1] + 1))
            return top, top + sides[0], left, left + sides[1]
        cut_height, cut_width = int(height * math.sqrt(1.0 - lam)), int(width * math.sqrt(1.0 - lam))
        row, column = int(numbers.randint(0, height)), int(numbers.randint(0, width))
        top, bottom = max(row - cut_height // 2, 0), min(row + (cut_height + 1) // 2, height)
        left, right = max(column - cut_width // 2, 0), min(column + (cut_width + 1) // 2, width)
        return top, bottom, left, right

    def _mix_labels(self, target: Tensor, lam: list[float], dtype: torch.dtype) -> Tensor:
        if self.multi_label:
            if target.dim() != 2 or target.shape[1] != self.num_classes:
                raise DataError("multi_label mixes dense labels (N, num_classes)", evidence=f"{tuple(target.shape)}")
            dense = target.float() * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        else:
            off = self.label_smoothing / self.num_classes
            dense = torch.full((len(target), self.num_classes), off, device=target.device)
            dense.scatter_(1, target.long().reshape(-1, 1), 1.0 - self.label_smoothing + off)
        if self.mode == "batch":
            return dense * lam[0] + dense.flip(0) * (1.0 - lam[0])
        weights = torch.tensor(lam, device=target.device, dtype=dtype).unsqueeze(1)
        return dense * weights + dense.flip(0) * (1.0 - weights)

    def __repr__(self) -> str:
        shown = ("mixup_alpha", "cutmix_alpha", "mix_prob", "switch_prob", "mode", "mean")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of paired images, over all pairs and pixels, from 0 to 1; 0 for images without any variance."""
    product, square = (one * other).sum(dtype=torch.float32), one.square().sum(dtype=torch.float32)
    return (product / square.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0.0, 1.0).to(one.dtype)


def _global_numbers() -> Any:
    """Numpy's global generator: what timm draws from, and what a run seeds in each worker."""
    import numpy.random

    return numpy.random


class VarianceSafeErasing:
    """Random erasing whose noise has the statistics of the normalised images, pixel by pixel.

    Blocks as in Random Erasing (arXiv 1708.04896) and timm's `RandomErasing`: a share of the area, any aspect ratio in the range. Place it
    after normalization: as the last transform of a sample, on a batch, or as `PrefetchLoader.random_erasing`.

    Args:
        mean: mean of the normalised images, one number or one per channel.
        std: their standard deviation. 0 and 1 fit a normalization that fits the data; `measure_positional_variance` reports both.
        probability: probability that an image is erased.
        min_area: smallest share of the area erased.
        max_area: largest share.
        min_aspect: smallest height over width of a block.
        max_aspect: largest, None for 1 / min_aspect.
        count: blocks per image, sharing the area.

    Raises:
        ConfigError: for an option out of range.

    Source: noise with the mean and variance of the data is derived here; mode "pixel" under the default normalization is published (public
    reviews of arXiv 2405.14115).
    """

    def __init__(
        self,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        probability: float = 0.25,
        min_area: float = 0.02,
        max_area: float = 1 / 3,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
        count: int = 1,
    ) -> None:
        if not 0.0 <= probability <= 1.0:
            raise ConfigError("probability lies in [0, 1]", evidence=str(probability))
        if not 0.0 < min_area <= max_area <= 1.0:
            raise ConfigError("areas are shares: 0 < min_area <= max_area <= 1", evidence=f"{min_area} and {max_area}")
        if min_aspect <= 0.0 or count < 1:
            raise ConfigError("min_aspect is above 0 and count at least 1", evidence=f"{min_aspect} and {count}")
        self.mean = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
        self.std = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
        if bool((self.std < 0).any()):
            raise ConfigError("std is not negative", evidence=str(std))
        self.probability = probability
        self.area = (min_area, max_area)
        self.log_aspect = (math.log(min_aspect), math.log(max_aspect or 1.0 / min_aspect))
        self.count = count

    def __call__(self, images: Tensor) -> Tensor:
        """Erase blocks in place: (C, H, W) or (N, C, H, W), floating. Raises DataError for anything else."""
        if images.dim() not in (3, 4) or not images.is_floating_point():
            raise DataError("erasing needs normalised images, (C, H, W) or (N, C, H, W)", evidence=f"{images.dtype} {tuple(images.shape)}")
        for image in images if images.dim() == 4 else images.unsqueeze(0):
            if random.random() < self.probability:
                for _ in range(self.count):
                    self._erase(image)
        return images

    def _erase(self, image: Tensor) -> None:
        """One block; as in the original, ten tries to place it."""
        channels, height, width = image.shape
        for _ in range(10):
            area = random.uniform(*self.area) * height * width / self.count
            aspect = math.exp(random.uniform(*self.log_aspect))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < rows < height and 0 < columns < width:
                top, left = random.randint(0, height - rows), random.randint(0, width - columns)
                noise = torch.randn(channels, rows, columns, device=image.device, dtype=torch.float32)
                fitted = noise * self.std.to(image.device) + self.mean.to(image.device)
                image[:, top : top + rows, left : left + columns] = fitted.to(image.dtype)
                return

    def __repr__(self) -> str:
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"{type(self).__name__}(mean={mean}, std={std}, probability={self.probability:g}, area={self.area})"
