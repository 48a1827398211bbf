"""Whether a pipeline scales and normalises images once, in the right order: read step by step, without drawing a batch."""

from __future__ import annotations

__all__ = ["Mistake", "mistakes_of_loader"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from pl_normkit.methods.positional_variance.pipelines.walk import class_path, held_by, read_value


@dataclass(frozen=True)
class Mistake:
    """What a pipeline does to the scale of its images by mistake, with what to do about it and the step where it shows."""

    what: str
    advice: str
    where: str
    is_left_over: bool = False
    """Only so where nothing behind the loader scales the images."""


class _Range(Enum):
    """What values an image holds at a point of its pipeline; what cannot be told is None."""

    BYTES = auto()
    RAW = auto()  # 0 to 255 as floating-point numbers
    UNIT = auto()
    NORMALISED = auto()


_COLOURS = frozenset(
    (
        *("ColorJitter", "RandAugment", "AutoAugment", "TrivialAugmentWide", "AugMix", "RandomPosterize", "RandomSolarize"),
        *("RandomEqualize", "RandomAutocontrast", "RandomAdjustSharpness", "RandomInvert", "RandomPhotometricDistort"),
    )
)
_OPAQUE = frozenset(("Lambda", "LinearTransformation", "RandomApply", "RandomChoice", "RandomOrder", "OneOf", "SomeOf"))
_LIBRARIES = ("torchvision.transforms", "timm.data", "albumentations")

Chain = list[tuple[Any, str]]


def mistakes_of_loader(loader: Any, name: str) -> list[Mistake]:
    """Every mistake in the pipelines of a loader's datasets, each kind once."""
    found: dict[str, Mistake] = {}
    several = loader.values() if isinstance(loader, Mapping) else loader if isinstance(loader, (list, tuple)) else [loader]
    for inner in several:
        for chain in _chains_of_loader(inner, name):
            for mistake in _judge(chain):
                found.setdefault(mistake.what, mistake)
    return list(found.values())


def _chains_of_loader(loader: Any, name: str) -> list[Chain]:
    is_prefetcher = class_path(loader).startswith("timm.data.loader.") and hasattr(loader, "loader")
    inner = loader.loader if is_prefetcher else loader
    collate = getattr(inner, "collate_fn", None)
    behind: Chain = [(found.transform, found.where) for found in read_value(collate, f"{name}.collate_fn")]
    if is_prefetcher:
        behind.append((loader, name))
    return [chain + behind for chain in _chains_of_dataset(getattr(inner, "dataset", None), f"{name}.dataset", 6)]


def _chains_of_dataset(dataset: Any, name: str, depth: int) -> list[Chain]:
    """The ways of a sample: of parts of a dataset each has its own; several transforms of one dataset may be for several images."""
    if depth == 0 or not hasattr(dataset, "__dict__"):
        return [[]]
    inner: list[Chain] = []
    own: list[Chain] = []
    for key, value in vars(dataset).items():
        parts = [part for part in (value if isinstance(value, (list, tuple)) else [value])[:16] if isinstance(part, Dataset)]
        for part in parts:
            inner += _chains_of_dataset(part, f"{name}.{key}", depth - 1)
        is_of_labels = any(word in key.lower() for word in ("target", "mask", "label"))
        if not parts and not is_of_labels and (chain := list(_steps(value, f"{name}.{key}"))):
            own.append(chain)
    whole = [chain for chain in own if not any(chain is not other and _is_within(chain, other) for other in own)]
    return [before + after for before in inner or [[]] for after in whole or [[]]]


def _is_within(chain: Chain, other: Chain) -> bool:
    """A dataset of torchvision keeps its transform twice, also inside of one for image and target."""
    return len(chain) <= len(other) and all(step is found for (step, _), (found, _) in zip(chain, other, strict=False))


def _steps(value: Any, name: str) -> Iterator[tuple[Any, str]]:
    """The transforms of a pipeline in order; a callable that is no library's stands for itself."""
    kind = type(value).__name__
    if kind == "StandardTransform":
        yield from _steps(value.transform, name)
    elif kind == "Compose" or isinstance(value, nn.Sequential):
        parts = value.transforms if kind == "Compose" else list(value)
        for index, part in enumerate(parts):
            yield from _steps(part, f"{name}[{index}]")
    elif (class_path(value).startswith(_LIBRARIES) and not isinstance(value, (Dataset, type))) or (callable(value) and "[" in name):
        yield value, name
    else:
        held = [found for found in held_by(value) if type(found).__name__ == "Compose"]
        if len(held) == 1:  # a function around a pipeline, as albumentations needs one
            yield from _steps(held[0], name)


def _judge(chain: Chain) -> Iterator[Mistake]:
    state: _Range | None = None
    for transform, where in chain:
        read = _READERS.get(type(transform).__name__) if class_path(transform).startswith(_LIBRARIES) else _opaque
        if type(transform).__name__ in _COLOURS and state is _Range.NORMALISED:
            what = f"{type(transform).__name__} comes after Normalize and takes its images for values in [0, 1]"
            yield Mistake(what, "Put colour augmentation before Normalize", where)
        elif read is not None:
            state, mistake = read(transform, state)
            if mistake is not None:
                yield Mistake(*mistake, where)
    if state is _Range.RAW:
        yield Mistake(*_UNSCALED, chain[-1][1], is_left_over=True)


_Outcome = tuple[_Range | None, tuple[str, str] | None]
_UNSCALED = (
    "Images of 0 to 255 are not scaled to [0, 1]",
    "Scale them before Normalize: v2.ToDtype(torch.float32, scale=True), or ToTensor() on the image file",
)
_TWICE = ("Images are normalised twice", "Keep one Normalize")
_SCALED_TWICE = ("Images in [0, 1] are divided by 255 once more", "Scale them once: take out one of the two steps")


def _opaque(_: Any, state: _Range | None) -> _Outcome:
    return None, None


def _to_tensor(transform: Any, state: _Range | None) -> _Outcome:
    if class_path(transform).startswith("timm."):
        return (_Range.RAW if state in (None, _Range.BYTES) else state), None
    if state in (_Range.UNIT, _Range.NORMALISED):
        return state, ("ToTensor stands twice in the pipeline", "Keep one ToTensor: the second raises, or scales nothing")
    return (_Range.UNIT if state in (None, _Range.BYTES) else state), None


def _to_bytes(_: Any, state: _Range | None) -> _Outcome:
    return (_Range.BYTES if state is None else state), None


def _to_unit(_: Any, state: _Range | None) -> _Outcome:
    return (_Range.UNIT if state in (None, _Range.BYTES) else state), None


def _to_dtype(transform: Any, state: _Range | None) -> _Outcome:
    dtype = transform.dtype
    if isinstance(dtype, Mapping):
        dtype = next((found for key, found in dtype.items() if getattr(key, "__name__", "") in ("Image", "Tensor")), dtype.get("others"))
    if dtype is None or state is not _Range.BYTES or not dtype.is_floating_point:
        return state, None
    return (_Range.UNIT if getattr(transform, "scale", True) else _Range.RAW), None


def _normalize(transform: Any, state: _Range | None) -> _Outcome:
    is_of_albumentations = class_path(transform).startswith("albumentations")
    if is_of_albumentations and getattr(transform, "normalization", "standard") != "standard":
        return _Range.NORMALISED, None  # each image by its own statistics
    means, stds = ([float(item) for item in _sequence(value)] for value in (transform.mean, transform.std))
    if min(means) < 0 or max(stds) <= 0 or (state is _Range.NORMALISED and min(stds) > 1):
        return None, None  # the way back
    if state is _Range.NORMALISED:
        return state, _TWICE
    if is_of_albumentations:
        scale = float(getattr(transform, "max_pixel_value", 255.0) or 255.0)
        return _Range.NORMALISED, _SCALED_TWICE if state is _Range.UNIT and scale > 1 else None
    if max(means) > 1.5 and state is _Range.UNIT:
        advice = "Divide mean and std by 255, as images in [0, 1] have them"
        return _Range.NORMALISED, ("Images in [0, 1] are normalised with statistics of 0 to 255", advice)
    is_unscaled = state in (_Range.BYTES, _Range.RAW) and max(means) <= 1.5
    return _Range.NORMALISED, _UNSCALED if is_unscaled else None


def _sequence(value: Any) -> Sequence[float]:
    if hasattr(value, "flatten"):
        value = value.flatten().tolist()
    return value if isinstance(value, (list, tuple)) else (value,)


def _prefetch(_: Any, state: _Range | None) -> _Outcome:
    """Timm's prefetcher takes bytes, scales and normalises them."""
    mistake = {_Range.NORMALISED: _TWICE, _Range.UNIT: _SCALED_TWICE}.get(state) if state is not None else None
    return _Range.NORMALISED, mistake


def _to_float(transform: Any, state: _Range | None) -> _Outcome:
    """Albumentations divides by the largest value of the type where none is given, which is 1 for floating-point images."""
    return _Range.UNIT, _SCALED_TWICE if state is _Range.UNIT and transform.max_value not in (None, 1, 1.0) else None


_READERS = {
    "ToTensor": _to_tensor,
    "MaybeToTensor": _to_unit,
    "PILToTensor": _to_bytes,
    "MaybePILToTensor": _to_bytes,
    "ToNumpy": _to_bytes,
    "ToImage": _to_bytes,
    "ToImageTensor": _to_bytes,
    "ConvertImageDtype": _to_dtype,
    "ToDtype": _to_dtype,
    "Normalize": _normalize,
    "PrefetchLoader": _prefetch,
    "ToFloat": _to_float,
    **dict.fromkeys(_OPAQUE, _opaque),
}
