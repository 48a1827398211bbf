"""What a recognised transform does to the variance of images, in numbers."""

from __future__ import annotations

__all__ = ["Border", "Candidate", "Erasing", "Mixing", "Normalization", "Step", "natural_second_moment", "steps_of"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pl_normkit.methods.positional_variance.pipelines.walk import MIXUP, Found, class_path, name_of

DEFAULT_MEAN = (0.485, 0.456, 0.406)
DEFAULT_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normalization:
    """(I - mean) / std with statistics of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    where: str


@dataclass(frozen=True)
class Mixing:
    """Linear mixing of two images. `alpha` is None where it cannot be read, `share` the part of the images that is mixed."""

    what: str
    alpha: float | None
    share: float
    where: str

    @property
    def ratio(self) -> float | None:
        """E[lam^2 + (1 - lam)^2] for lam ~ Beta(alpha, alpha): the variance of a mixed batch over that of a plain one."""
        return None if self.alpha is None else (self.alpha + 1.0) / (2.0 * self.alpha + 1.0)

    @property
    def recipe_ratio(self) -> float | None:
        """The same over all images, the unmixed ones included."""
        return None if self.ratio is None else 1.0 - self.share * (1.0 - self.ratio)


@dataclass(frozen=True)
class _Fill:
    """Pixels replaced by values of a given mean and standard deviation, in units of the image at that point."""

    what: str
    area: float | None
    mean: tuple[float, ...]
    std: float
    where: str

    def second_moment(self, after: Normalization | None) -> float:
        """E[v^2] of the fill in normalised units; `after` is the normalization that is still to come, None where it is done."""
        count = len(after.mean) if after is not None else len(self.mean)
        means = self.mean * count if len(self.mean) == 1 else self.mean
        if after is None:
            return sum(mean**2 for mean in means) / len(means) + self.std**2
        channels = zip(means, after.mean, after.std, strict=False)
        return sum(((mean - centre) ** 2 + self.std**2) / scale**2 for mean, centre, scale in channels) / count

    def ratio(self, after: Normalization | None, image_second_moment: float) -> float | None:
        """1 - f + f E[v^2] / E[I^2] for the filled area f, None where the area cannot be read."""
        return None if self.area is None else 1.0 - self.area + self.area * self.second_moment(after) / image_second_moment


@dataclass(frozen=True)
class Erasing(_Fill):
    """Random erasing; `mode` is "const", "rand" (one colour per block) or "pixel"."""

    mode: str = "const"


@dataclass(frozen=True)
class Border(_Fill):
    """Constant values beside the image: padding, and what rotation and shear leave empty.

    With `is_most` the area is an upper bound: of padding less stays where a later crop, or a larger image, cuts it away.
    """

    is_most: bool = False


@dataclass(frozen=True)
class Candidate:
    """What may change the variance of images by an amount that its settings do not tell: crops, colours, policies, padding."""

    what: str
    where: str


Step = Normalization | Mixing | Erasing | Border | Candidate


def natural_second_moment(normalization: Normalization | None) -> float:
    """E[I^2] of natural images (ImageNet's published statistics) under a normalization, mean over channels; 1 for ImageNet's own."""
    if normalization is None or len(normalization.mean) != len(DEFAULT_MEAN):
        return 1.0
    channels = zip(DEFAULT_MEAN, DEFAULT_STD, normalization.mean, normalization.std, strict=True)
    return sum((std**2 + (mean - centre) ** 2) / scale**2 for mean, std, centre, scale in channels) / len(DEFAULT_MEAN)


def steps_of(found: Sequence[Found], size: tuple[int, int]) -> list[Step]:
    """The steps that the transforms make, in order; transforms that change no variance in a known way are left out.

    Args:
        found: as read off a loader.
        size: height and width of the images that the model gets.
    """
    steps: list[Step] = []
    for item in found:
        step = _read(item, size)
        if step is not None and not (isinstance(step, Mixing) and step.share <= 0.0):
            steps.append(step)
    return steps


def _read(found: Found, size: tuple[int, int]) -> Step | None:
    path, kind = class_path(found.transform), type(found.transform).__name__
    if path.startswith("pl_normkit."):
        return None  # our own keep the variance
    if kind == "PrefetchLoader":
        return _normalization(found.transform.mean, found.transform.std, found, 255.0)
    library = path.partition(".")[0]
    reader = _READERS.get((library, kind))
    if reader is not None:
        return reader(found, size)
    return _any_mixup(found) if MIXUP.search(name_of(found.transform)) else None


def _floats(value: Any) -> tuple[float, ...]:
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return tuple(float(item) for item in value) if isinstance(value, (list, tuple)) or hasattr(value, "__len__") else (float(value),)


def _normalization(mean: Any, std: Any, found: Found, scale: float = 1.0) -> Normalization:
    means, stds = (tuple(item / scale for item in _floats(value)) for value in (mean, std))
    return Normalization(means, stds, found.where)


def _normalize(found: Found, _: tuple[int, int]) -> Normalization | None:
    transform = found.transform
    if getattr(transform, "normalization", "standard") != "standard":  # albumentations can normalise each image by itself
        return None
    return _normalization(transform.mean, transform.std, found)


def _timm_mixup(found: Found, _: tuple[int, int]) -> Mixing | None:
    mixup = found.transform
    if not mixup.mixup_enabled or mixup.mixup_alpha <= 0.0:
        return None
    share = float(mixup.mix_prob) * (1.0 - float(mixup.switch_prob) if mixup.cutmix_alpha > 0.0 else 1.0)
    return Mixing(f"Mixup(mixup_alpha={mixup.mixup_alpha:g})", float(mixup.mixup_alpha), found.share * share, found.where)


def _torchvision_mixup(found: Found, _: tuple[int, int]) -> Mixing:
    return Mixing(f"MixUp(alpha={found.transform.alpha:g})", float(found.transform.alpha), found.share, found.where)


def _any_mixup(found: Found) -> Mixing:
    """A mixup of unknown origin: its `alpha` and probability where they stand under their usual names."""
    numbers = {name: getattr(found.transform, name, None) for name in ("mixup_alpha", "alpha", "prob", "p", "mix_prob")}
    known = {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))}
    alpha = known.get("mixup_alpha", known.get("alpha"))
    share = 0.0 if alpha == 0.0 else known.get("prob", known.get("p", known.get("mix_prob", 1.0)))
    return Mixing(name_of(found.transform), alpha, found.share * share, found.where)


def _timm_erasing(found: Found, _: tuple[int, int]) -> Erasing | None:
    erasing = found.transform
    mode = "pixel" if erasing.per_pixel else "rand" if erasing.rand_color else "const"
    touched = 1.0 - 1.0 / erasing.num_splits if erasing.num_splits > 1 else 1.0
    area = found.share * erasing.probability * touched * (erasing.min_area + erasing.max_area) / 2.0
    what = f"RandomErasing(probability={erasing.probability:g}, mode={mode!r})"
    return Erasing(what, area, (0.0,), 0.0 if mode == "const" else 1.0, found.where, mode) if area > 0.0 else None


def _torchvision_erasing(found: Found, _: tuple[int, int]) -> Erasing | None:
    erasing = found.transform
    is_noise = erasing.value is None or erasing.value == "random"
    area = found.share * float(erasing.p) * sum(erasing.scale) / 2.0
    what = f"RandomErasing(p={erasing.p:g}, value={erasing.value!r})"
    mean = (0.0,) if is_noise else _floats(erasing.value)
    return Erasing(what, area, mean, float(is_noise), found.where, "pixel" if is_noise else "const") if area > 0.0 else None


def _mean_of(value: Any) -> float:
    return sum(_floats(value)) / len(_floats(value))


def _coarse_dropout(found: Found, _: tuple[int, int]) -> Erasing | None:
    """CoarseDropout, Erasing and GridDropout of albumentations; hole sizes as shares of the image."""
    holes = found.transform
    if hasattr(holes, "num_holes_range"):
        sides = [_mean_of(sizes) for sizes in (holes.hole_height_range, holes.hole_width_range)]
        covered = _mean_of(holes.num_holes_range) * math.prod(sides) if max(sides) <= 1.0 else None
    elif hasattr(holes, "scale"):
        covered = _mean_of(holes.scale)
    else:
        covered = float(holes.ratio) ** 2
    fill = holes.fill
    area = None if covered is None else found.share * float(holes.p) * min(covered, 1.0)
    what = f"{type(holes).__name__}(p={holes.p:g}, fill={fill!r})"
    if isinstance(fill, str):
        mode = {"random": "pixel", "random_uniform": "rand"}.get(fill)
        return None if mode is None else Erasing(what, area, (0.5,), math.sqrt(1.0 / 12.0), found.where, mode)
    return Erasing(what, area, _unit(fill), 0.0, found.where, "const")


def _unit(fill: Any) -> tuple[float, ...]:
    """A fill value as share of the white level; values above 1 count as 8-bit."""
    values = _floats(0.0 if fill is None else fill)
    return tuple(value / 255.0 for value in values) if max(values) > 1.0 else values


def _border(found: Found, area: float | None, fill: Any = None, *, is_most: bool = False) -> Border:
    if isinstance(fill, dict):  # torchvision v2 keeps one fill per type of input
        fill = next(iter(fill.values()), 0)
    return Border(type(found.transform).__name__, None if area is None else found.share * area, _unit(fill), 0.0, found.where, is_most)


def _is_constant(transform: Any) -> bool:
    """The padding mode has a name in torchvision; albumentations numbers it as OpenCV does, where 0 is constant."""
    mode = getattr(transform, "padding_mode", getattr(transform, "border_mode", "constant"))
    return mode in ("constant", 0)


def _pad(found: Found, size: tuple[int, int]) -> Border | None:
    transform = found.transform
    if not _is_constant(transform):
        return None
    padding = [float(side) for side in _floats(transform.padding)]
    left, top, right, bottom = padding * 4 if len(padding) == 1 else padding * 2 if len(padding) == 2 else padding
    inner = max(size[0] - top - bottom, 0.0) * max(size[1] - left - right, 0.0)
    return _border(found, 1.0 - inner / (size[0] * size[1]), transform.fill, is_most=True)


def _random_crop(found: Found, size: tuple[int, int]) -> Border | None:
    """Padding that a crop of the unpadded size cuts back: on average p (p + 1) / (2 p + 1) of the p rows stay."""
    transform = found.transform
    padding = getattr(transform, "padding", None)
    if not padding or not _is_constant(transform):
        return None
    sides = [float(side) for side in _floats(padding)]
    stays = [side * (side + 1.0) / (2.0 * side + 1.0) for side in (sides[0], sides[-1])]
    return _border(found, 1.0 - max(1.0 - stays[1] / size[0], 0.0) * max(1.0 - stays[0] / size[1], 0.0), transform.fill, is_most=True)


def _affine(found: Found, _: tuple[int, int]) -> Border | None:
    """Rotation, translation, zoom and shear of torchvision and albumentations."""
    transform = found.transform
    if not _is_constant(transform) or getattr(transform, "expand", False):
        return None
    degrees = getattr(transform, "degrees", getattr(transform, "limit", getattr(transform, "rotate", (0.0, 0.0))))
    translate = getattr(transform, "translate", getattr(transform, "translate_percent", None))
    scales = _ranges(getattr(transform, "scale", None), 1.0)
    shears = _ranges(getattr(transform, "shear", None), 0.0)
    area = empty_share([_floats(degrees)[:2], *_shifts(translate), *scales, *shears])
    return _border(found, float(getattr(transform, "p", 1.0)) * area, transform.fill)


def _ranges(value: Any, neutral: float) -> list[tuple[float, ...]]:
    """(low, high) along both sides, as torchvision (one range, or two in one tuple) and albumentations (one for each side) keep them."""
    if isinstance(value, Mapping):
        return [_floats(value["x"]), _floats(value["y"])]
    bounds = _floats(value) if value is not None else (neutral, neutral)
    other = bounds if neutral else (neutral, neutral)  # one range of zoom is for both sides, one of shear for the first
    return [bounds[:2], bounds[2:] or other]


def _shifts(value: Any) -> list[tuple[float, ...]]:
    """(low, high) along both sides; torchvision keeps the largest shifts, albumentations ranges."""
    if isinstance(value, Mapping):
        return [_floats(value["x"]), _floats(value["y"])]
    return [(-float(bound), float(bound)) for bound in value or (0.0, 0.0)]


def empty_share(ranges: Sequence[Sequence[float]]) -> float:
    """Share of a square image that its affine maps leave empty, mean over uniform draws.

    Args:
        ranges: (low, high) of the angle in degrees, two shifts as shares of the side, two zooms and two shears in degrees.
    """
    engine = torch.quasirandom.SobolEngine(len(ranges))  # type: ignore[no-untyped-call]
    draws = engine.draw(257, dtype=torch.float64)[1:]
    low, high = torch.tensor([(float(found[0]), float(found[-1])) for found in ranges], dtype=torch.float64).T
    angle, right, down, wide, tall, lean, fall = (low + (high - low) * draws).T
    turn = torch.deg2rad(angle)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).reshape(-1, 2, 2)
    one = torch.ones_like(wide)
    shear = torch.stack([one, torch.deg2rad(lean).tan(), torch.deg2rad(fall).tan(), one], -1).reshape(-1, 2, 2)
    back = torch.linalg.inv(rotation @ shear @ torch.diag_embed(torch.stack([wide, tall], -1)))
    side = (torch.arange(64, dtype=torch.float64) + 0.5) / 64 - 0.5
    points = torch.cartesian_prod(side, side) - torch.stack([right, down], -1)[:, None]
    return float(((points @ back.mT).abs() > 0.5).any(-1).double().mean())


def _candidate(found: Found, _: tuple[int, int]) -> Candidate | None:
    return Candidate(name_of(found.transform), found.where) if _is_constant(found.transform) else None


def _resize(found: Found, _: tuple[int, int]) -> Candidate:
    transform = found.transform
    sizes = [getattr(transform, name, None) for name in ("size", "max_size", "height", "width", "min_size")]
    shown = ", ".join(str(size) for size in sizes if size is not None)
    return Candidate(f"{type(transform).__name__}({shown})", found.where)


_CANDIDATES = (
    *(
        "RandomResizedCrop",
        "ColorJitter",
        "RandomPerspective",
        "RandomZoomOut",
        "RandAugment",
        "TrivialAugmentWide",
        "AutoAugment",
        "AugMix",
    ),
    *("RandomBrightnessContrast", "RandomPhotometricDistort"),
)

_READERS: dict[tuple[str, str], Callable[[Found, tuple[int, int]], Step | None]] = {
    ("torchvision", "Normalize"): _normalize,
    ("albumentations", "Normalize"): _normalize,
    **{("torchvision", name): _normalize for name in ("ImageClassification", "SemanticSegmentation")},  # what weights.transforms() gives
    ("timm", "Mixup"): _timm_mixup,
    ("timm", "FastCollateMixup"): _timm_mixup,
    ("torchvision", "MixUp"): _torchvision_mixup,
    ("timm", "RandomErasing"): _timm_erasing,
    ("torchvision", "RandomErasing"): _torchvision_erasing,
    **{("albumentations", name): _coarse_dropout for name in ("CoarseDropout", "Erasing", "GridDropout")},
    **{(library, "Pad"): _pad for library in ("torchvision", "albumentations")},
    ("torchvision", "RandomCrop"): _random_crop,
    **{("torchvision", name): _affine for name in ("RandomRotation", "RandomAffine")},
    **{("albumentations", name): _affine for name in ("Rotate", "Affine", "ShiftScaleRotate")},
    **{("torchvision", name): _candidate for name in _CANDIDATES},
    **{("albumentations", name): _candidate for name in (*_CANDIDATES, "PadIfNeeded", "SafeRotate", "Perspective")},
    **{("timm", name): _candidate for name in ("RandomResizedCropAndInterpolation", "RandAugment", "AutoAugment", "AugMixAugment")},
    **{("timm", name): _candidate for name in ("RandomCropOrPad", "RandomPad")},
    **{("torchvision", name): _resize for name in ("Resize", "RandomResize")},
    **{("albumentations", name): _resize for name in ("Resize", "SmallestMaxSize", "LongestMaxSize")},
    ("timm", "ResizeKeepRatio"): _resize,
}
