"""A configuration of timm's loaders and Mixup that leaves the weight of the positional embedding alone."""

from __future__ import annotations

__all__ = ["Suggestion", "suggest_augmentation"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pl_normkit.errors import ConfigError
from pl_normkit.methods.positional_variance.moments import ImageMoments
from pl_normkit.methods.positional_variance.pipelines.effects import DEFAULT_MEAN, DEFAULT_STD, Normalization, natural_second_moment


@dataclass(frozen=True)
class Suggestion:
    """Arguments by the name of the function that takes them; printing it gives the same as text.

    Attributes:
        create_transform: for `timm.data.create_transform` and `create_loader` in training; mean and std also in evaluation.
        mixup: for `timm.data.Mixup` and `FastCollateMixup`.
        erasing: for `pl_normkit.nn.VarianceSafeErasing`, in place of timm's erasing; None where timm's fits.
    """

    create_transform: Mapping[str, Any]
    mixup: Mapping[str, Any]
    erasing: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        lines = [f"create_transform({_arguments(self.create_transform)})", f"Mixup({_arguments(self.mixup)})"]
        if self.erasing is not None:
            lines.append(f"VarianceSafeErasing({_arguments(self.erasing)})  # after normalization")
        return "\n".join(lines)


def suggest_augmentation(
    mean: Sequence[float] = DEFAULT_MEAN,
    std: Sequence[float] = DEFAULT_STD,
    *,
    images: ImageMoments | None = None,
    erase_probability: float = 0.25,
) -> Suggestion:
    """What to pass to timm for a vision transformer with absolute positions: CutMix without Mixup, and erasing noise that fits.

    Args:
        mean: the normalization to keep: ImageNet's default from scratch, the checkpoint's when fine-tuning.
        std: as `mean`.
        images: moments of the normalised images, as `measure_positional_variance` reports them for evaluation; without them those of
            natural images are taken.
        erase_probability: share of images that are erased.

    Raises:
        ConfigError: for a mean and std of different lengths or a std that is not positive.

    Source: CutMix, no Mixup, mode "pixel" and the default statistics are published (public reviews of arXiv 2405.14115); noise for other
    statistics is derived here.

    >>> suggestion = suggest_augmentation()
    >>> type(suggestion).__name__
    'Suggestion'
    """
    if len(mean) != len(std) or min(std, default=0.0) <= 0.0:
        raise ConfigError("mean and std have one positive std per channel", evidence=f"{tuple(mean)} and {tuple(std)}")
    normalization = Normalization(tuple(mean), tuple(std), "")
    noise = _noise(normalization, images)
    second = natural_second_moment(normalization) if images is None else images.overall_second_moment
    fits = abs(second - 1.0) <= 0.25 and all(abs(centre) <= 0.25 for centre in noise["mean"])
    transform = {"mean": tuple(mean), "std": tuple(std), "re_prob": erase_probability if fits else 0.0, "re_mode": "pixel", "re_count": 1}
    erasing = None if fits else {**noise, "probability": erase_probability}
    return Suggestion(transform, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}, erasing)


def _noise(normalization: Normalization, images: ImageMoments | None) -> dict[str, tuple[float, ...]]:
    """Mean and std per channel of the normalised images."""
    if images is not None:
        means, stds = images.mean, images.std
    else:
        channels = list(zip(DEFAULT_MEAN, DEFAULT_STD, normalization.mean, normalization.std, strict=False))
        means = tuple((mean - centre) / scale for mean, _, centre, scale in channels)
        stds = tuple(std / scale for _, std, _, scale in channels)
    return {"mean": tuple(round(value, 4) for value in means), "std": tuple(round(value, 4) for value in stds)}


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
