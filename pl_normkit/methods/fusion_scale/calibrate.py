"""Statistics for equalizers, taken in execution order with the earlier ones active."""

from __future__ import annotations

__all__ = ["Granularity", "calibrate_scales", "equalizers_of"]

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_normkit.errors import DataError, EditError, NormkitWarning, NothingMatchedError
from pl_normkit.methods.fusion_scale.modules import NAME, ROUNDING, TINY_STD, ScaleEqualizer
from pl_normkit.methods.fusion_scale.moments import Moments, agree_on_problem, merge_over_ranks
from pl_normkit.methods.fusion_scale.running import InputsOf, Progress, measuring, run_batches
from pl_normkit.surgery import Change, Changes, Undo, apply_edits, get_module
from pl_normkit.wrappers import unwrapped

Granularity = Literal["branch", "channel"]


def equalizers_of(model: nn.Module) -> dict[str, ScaleEqualizer]:
    """Every equalizer by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ScaleEqualizer)}


def calibrate_scales(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    granularity: Granularity = "branch",
    max_batches: int | None = None,
    inputs: InputsOf | None = None,
    hosts: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Changes:
    """Give every equalizer that has none yet its statistics over the loader; `undo` makes them the identity again.

    Equalizers that read what others made are measured with the others active: one pass over the loader for each level. The loader
    is read anew for each pass from the same RNG state. Under `torch.distributed` the statistics are those of all ranks together.

    Args:
        model: with equalizers in it; only their statistics change.
        loader: the training loader: any iterable of batches.
        granularity: one mean and std for a branch, or for each of its channels.
        max_batches: batches of each pass; None for all.
        inputs: from a batch to the model's inputs; by default the tensor itself, the first item of a sequence, the entries of a
            dict that forward names.
        hosts: paths of the layers whose equalizers are meant; None for all.
        progress: called after each batch.

    Raises:
        NothingMatchedError: when the model holds no equalizer.
        DataError: for an empty loader, values that are not finite, or a fusion that did not run. No equalizer is set then.

    >>> import segmentation_models_pytorch as smp
    >>> from pl_normkit import insert_equalizers
    >>> model, images = smp.FPN("resnet18", encoder_weights=None, decoder_merge_policy="cat"), torch.rand(2, 3, 64, 64)
    >>> changes = insert_equalizers(model, images)
    >>> len(calibrate_scales(model, [images]).made) == len(changes.made)
    True
    """
    model = unwrapped(model)
    equalizers = equalizers_of(model)
    if not equalizers:
        raise NothingMatchedError("the model holds no scale equalizer", fix="call equalize_scales, which inserts them")
    waiting = {path: module for path, module in equalizers.items() if not module.is_calibrated and _is_meant(path, hosts)}
    batches = list(itertools.islice(loader, max_batches)) if isinstance(loader, Iterator) else loader
    changes = Changes()
    try:
        for turn, level in enumerate(sorted({module.level for module in waiting.values()})):
            group = {path: module for path, module in waiting.items() if module.level == level}
            moments = _observe(model, group, batches, max_batches, inputs, progress, turn)
            edits = [SetStatistics(path, *_statistics(path, group[path], moments[path], granularity)) for path in group]
            changes.add(apply_edits(model, edits))
    except BaseException:
        changes.undo()
        raise
    return changes


def _is_meant(path: str, hosts: Collection[str] | None) -> bool:
    return hosts is None or path.removesuffix(f".{NAME}") in hosts


@dataclass(frozen=True)
class SetStatistics:
    """Freeze these statistics in the equalizer at `path`."""

    path: str
    mean: Tensor
    std: Tensor

    def check(self, model: nn.Module) -> None:
        self._equalizer(model)

    def is_done(self, model: nn.Module) -> bool:
        return self._equalizer(model).is_calibrated

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        equalizer = self._equalizer(model)
        before = [buffer.clone() for buffer in equalizer.buffers()]
        equalizer.set_statistics(self.mean, self.std)

        def undo() -> None:
            for buffer, value in zip(equalizer.buffers(), before, strict=True):
                buffer.copy_(value)

        return Change(self.path, f"calibrated: std {_shown(self.std)}, mean {_shown(self.mean)}"), undo

    def _equalizer(self, model: nn.Module) -> ScaleEqualizer:
        module = get_module(model, self.path)
        if not isinstance(module, ScaleEqualizer):
            raise EditError(f"{type(module).__name__} is no ScaleEqualizer", where=self.path)
        return module


def _shown(values: Tensor, most: int = 6) -> str:
    return ", ".join(f"{float(value):.3g}" for value in values[:most]) + (", ..." if len(values) > most else "")


def _observe(
    model: nn.Module,
    group: dict[str, ScaleEqualizer],
    loader: Iterable[Any],
    max_batches: int | None,
    inputs: InputsOf | None,
    progress: Progress | None,
    turn: int,
) -> dict[str, Moments]:
    """Moments of what each equalizer of the group is given, over one pass and all ranks."""
    moments = {path: Moments.empty(sum(module.widths)) for path, module in group.items()}

    def observer(path: str) -> Any:
        def observe(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            moments[path] = moments[path].merge(Moments.of(arguments[0]))

        return observe

    def bad_value() -> str:
        return next((path.removesuffix(f".{NAME}") for path, found in moments.items() if not found.is_finite), "")

    with ExitStack() as stack:
        for path, module in group.items():
            stack.callback(module.register_forward_pre_hook(observer(path)).remove)
        with measuring(model):
            run_batches(
                model,
                loader,
                max_batches=max_batches,
                inputs=inputs,
                has_bad_value=bad_value,
                after_batch=lambda done: progress(done, turn) if progress is not None else None,
            )
    merged = {path: merge_over_ranks(found) for path, found in moments.items()}
    silent = [path for path, found in merged.items() if float(found.count.max()) == 0]
    if silent:
        agree_on_problem(
            DataError("a fusion did not run on the loader's batches", where=", ".join(silent), fix="pass inputs that reach it")
        )
    return merged


def _statistics(path: str, module: ScaleEqualizer, moments: Moments, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Mean and std per branch or channel; what is constant gets a std of 1, with a warning."""
    statistics = moments.pooled(module.widths) if granularity == "branch" else moments
    std = statistics.std
    constant = (std < TINY_STD) | (std < ROUNDING * std.max())
    if bool(constant.any()):
        host = path.removesuffix(f".{NAME}")
        unit = "branches" if granularity == "branch" else "channels"
        warnings.warn(
            f"{host}: {int(constant.sum())} of {len(std)} {unit} are constant over the data (std below {TINY_STD:g}, or {ROUNDING:g} of "
            f"the largest); they are centred and not scaled. A dead branch, or images without content: {unit} {_listed(constant)}",
            NormkitWarning,
            stacklevel=2,
        )
    return statistics.mean, torch.where(constant, torch.ones_like(std), std)


def _listed(chosen: Tensor, most: int = 8) -> str:
    places: Sequence[int] = chosen.nonzero().flatten().tolist()
    return ", ".join(map(str, places[:most])) + (", ..." if len(places) > most else "")
