"""The transforms between stored images and the model, in the order in which they act, read off loaders without drawing a batch."""

from __future__ import annotations

__all__ = ["BATCH_HOOKS", "MIXUP", "Found", "class_path", "held_by", "name_of", "own_hook", "read_loader", "read_owner", "read_value"]

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.utils.data import Dataset

# Where the classes that rules recognise live; the libraries themselves are never imported here.
_LIBRARIES = ("torchvision.transforms", "timm.data", "albumentations", "kornia.augmentation", "pl_normkit.methods.positional_variance")
BATCH_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
_DEPTH = 6
MIXUP = re.compile(r"mix_?up(?!.*(criterion|loss|target|label))", re.IGNORECASE)  # what CutMix shares with it mixes no images


@dataclass(frozen=True)
class Found:
    """One transform on the way of a batch.

    Attributes:
        transform: the object itself.
        share: probability that it is asked to act (containers such as RandomApply and OneOf); its own probability not included.
        where: where it was found, as attribute path.
    """

    transform: Any
    share: float
    where: str


def class_path(value: Any) -> str:
    """`package.module.Class` of an object, as its class names itself."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def read_loader(loader: Any, name: str) -> list[Found]:
    """What the loader does to a sample and to a batch: the transforms of its datasets, its collate function, its prefetcher."""
    walk = _Walk()
    several = loader.values() if isinstance(loader, Mapping) else loader if isinstance(loader, (list, tuple)) else [loader]
    for inner in several:  # Lightning takes lists and dicts of loaders
        if hasattr(inner, "dataset"):
            walk.loader(inner, name)
    return walk.found


def read_value(value: Any, name: str) -> list[Found]:
    """What a transform, a collate function or a container of such does."""
    walk = _Walk()
    walk.value(value, name, 1.0, 3)
    return walk.found


def held_by(function: Any) -> list[Any]:
    """What a function refers to: arguments of a partial, the object of a method, defaults, variables around it and globals it names."""
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if not isinstance(function, (FunctionType, MethodType)):
        return []
    around = inspect.getclosurevars(function)
    owner = [function.__self__] if isinstance(function, MethodType) else []
    defaults = [item.default for item in inspect.signature(function).parameters.values()]
    return [*owner, *defaults, *around.nonlocals.values(), *around.globals.values()]


def read_owner(owner: Any, name: str) -> list[Found]:
    """What a LightningModule, a data module or a transform itself does to a batch: its attributes, and what its batch hooks refer to."""
    walk = _Walk()
    if _is_of_library(owner) or isinstance(owner, FunctionType):
        walk.value(owner, name, 1.0, _DEPTH)
        return walk.found
    kept_by_torch = vars(nn.Module()).keys()  # `_modules` and the like
    attributes = {key: value for key, value in vars(owner).items() if key not in kept_by_torch}
    for attribute, value in {**attributes, **(owner._modules if isinstance(owner, nn.Module) else {})}.items():
        walk.value(value, f"{name}.{attribute}", 1.0, 2)
    for hook in (*BATCH_HOOKS, "training_step"):
        function = own_hook(owner, hook)
        if function is not None:
            walk.function(function, f"{name}.{hook}", 2)
    return walk.found


def own_hook(owner: Any, name: str) -> FunctionType | None:
    """The method as the user wrote it; None where it is Lightning's own or missing."""
    function = getattr(type(owner), name, None)
    is_own = isinstance(function, FunctionType) and not function.__module__.startswith(("lightning", "pytorch_lightning"))
    return function if is_own else None


def _is_of_library(value: Any) -> bool:
    return not isinstance(value, type) and type(value).__module__.startswith(_LIBRARIES)


class _Walk:
    """Collects transforms in order, each object once."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self._seen: set[int] = set()

    def loader(self, loader: Any, name: str) -> None:
        is_prefetcher = class_path(loader).startswith("timm.data.loader.")
        inner = loader.loader if is_prefetcher and hasattr(loader, "loader") else loader
        self.dataset(getattr(inner, "dataset", None), f"{name}.dataset", _DEPTH)
        self.value(getattr(inner, "collate_fn", None), f"{name}.collate_fn", 1.0, 3)
        if inner is not loader:
            self.found.append(Found(loader, 1.0, name))
            self.value(getattr(loader, "random_erasing", None), f"{name}.random_erasing", 1.0, 1)

    def dataset(self, dataset: Any, name: str, depth: int) -> None:
        """Inner datasets act first. Whatever attribute holds a transform counts, whatever its name."""
        if dataset is None or depth == 0 or id(dataset) in self._seen:
            return
        self._seen.add(id(dataset))
        attributes = vars(dataset) if hasattr(dataset, "__dict__") else {}
        for key, value in attributes.items():
            inner = [value] if isinstance(value, Dataset) else value if isinstance(value, (list, tuple)) else []
            for part in inner[:16]:
                if isinstance(part, Dataset):
                    self.dataset(part, f"{name}.{key}", depth - 1)
        for key, value in attributes.items():
            if not isinstance(value, Dataset):
                self.value(value, f"{name}.{key}", 1.0, depth - 1)

    def value(self, value: Any, name: str, share: float, depth: int) -> None:
        """A transform, a container of transforms, or a callable of the user's own that holds or names some."""
        if value is None or depth == 0 or isinstance(value, (str, bytes, int, float, type)) or id(value) in self._seen:
            return
        if isinstance(value, (list, tuple)) and not all(callable(item) for item in value):
            return  # samples, paths, labels
        children, is_known = _children(value), _is_of_library(value)
        if is_known or _is_named_mixup(value):
            self._seen.add(id(value))
            self.found += [] if children else [Found(value, share, name)]
        for key, child, part in children:
            self.value(child, f"{name}{key}", share * part, depth if is_known else depth - 1)
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            self.function(value, name, depth - 1)
        elif callable(value) and not children and not is_known and not isinstance(value, nn.Module):
            for key, held in (vars(value) if hasattr(value, "__dict__") else {}).items():
                self.value(held, f"{name}.{key}", share, depth - 1)

    def function(self, function: Callable[..., Any], name: str, depth: int) -> None:
        """What a function refers to: arguments of a partial, the object of a method, variables around it and globals it names."""
        if depth <= 0:
            return
        if isinstance(function, functools.partial):
            for value in (function.func, *function.args, *function.keywords.values()):
                self.value(value, name, 1.0, depth)
            return
        if isinstance(function, MethodType):
            self.value(function.__self__, name, 1.0, depth)
        around = inspect.getclosurevars(function)
        defaults = {key: item.default for key, item in inspect.signature(function).parameters.items()}
        for key, value in {**defaults, **around.nonlocals, **around.globals}.items():
            if not inspect.ismodule(value):
                self.value(value, f"{name}: {key}", 1.0, depth)


def _is_named_mixup(value: Any) -> bool:
    """Whether a callable of the user's own is a mixup by name."""
    return callable(value) and MIXUP.search(name_of(value)) is not None


def name_of(value: Any) -> str:
    """Name of a function, else of the class."""
    return value.__name__ if isinstance(value, FunctionType) else type(value).__name__


def _children(value: Any) -> list[tuple[str, Any, float]]:
    """Parts of a container of transforms: (path, transform, share of the calls that reach it)."""
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", part, 1.0) for index, part in enumerate(value)]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part, 1.0) for key, part in value.items()]
    if isinstance(value, nn.Sequential):
        return [(f"[{index}]", part, 1.0) for index, part in enumerate(value)]
    held = {**vars(value), **(value._modules if isinstance(value, nn.Module) else {})} if hasattr(value, "__dict__") else {}
    parts = held.get("transforms")
    if not isinstance(parts, (list, tuple, nn.ModuleList)):
        part = held.get("transform") if type(value).__name__ == "StandardTransform" else None
        return [] if part is None else [("", part, 1.0)]
    return [(f"[{index}]", part, share) for index, (part, share) in enumerate(zip(parts, _shares(value, len(parts)), strict=True))]


def _shares(container: Any, count: int) -> list[float]:
    """Probability that each part of a container is asked to act."""
    kind, own = type(container).__name__, getattr(container, "p", 1.0)
    if kind not in ("RandomChoice", "OneOf"):
        return [float(own) if isinstance(own, (int, float)) else 1.0] * count
    given: Any = container.transforms_ps if kind == "OneOf" else own
    weights = list(given) if hasattr(given, "__len__") else [1.0] * count
    shares = [float(weight) / max(float(sum(weights)), 1e-12) for weight in weights]
    if kind == "RandomChoice":
        return shares
    parts = zip(shares, container.transforms, strict=True)  # the chosen one acts whatever its own probability
    return [own * share / max(float(part.p), 1e-12) for share, part in parts]
