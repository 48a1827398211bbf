"""`recalibrate_batch_norm`: running statistics measured over a loader, alone or mixed with those the model has."""

from __future__ import annotations

__all__ = ["Moments", "measure_norms", "recalibrate_batch_norm", "recalibrate_on_inputs"]

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pl_normkit.errors import ConfigError, DataError, NothingMatchedError
from pl_normkit.graph import call_arguments
from pl_normkit.preserve import preserved
from pl_normkit.surgery import Change, Changes, Edit, Filter, apply_edits
from pl_normkit.values import SetValues
from pl_normkit.wrappers import unwrapped


def recalibrate_batch_norm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    source_weight: float = 0.0,
    max_batches: int | None = None,
    inputs: Callable[[Any], Any] | None = None,
    filter_fn: Filter | None = None,
) -> Changes:
    """Give batch norms the running statistics of the data in `loader`.

    Over the training data, with augmentation as in training, these are precise statistics in place of a moving average that lags behind
    the weights or saw too few samples; over unlabelled data of another domain this is AdaBN. The batches run once with dropout off and
    with each chosen batch norm normalizing by its batch, as in training, so give batches as large as in training; the mean and variance
    over all elements of all batches are stored, whatever the sizes of the batches. Parameters, the mode and every RNG stay.

    Args:
        model: its `running_mean` and `running_var` change; `changes.undo()` puts the old ones back.
        loader: any iterable of batches, read once. Under `torch.distributed` each rank measures what its loader gives: run it on one
            rank and broadcast the buffers.
        source_weight: weight in [0, 1] of the statistics the model has: new = source_weight * old + (1 - source_weight) * measured, for
            the mean and for the variance. 0 replaces them (AdaBN); 0.9 moves them by a tenth, for few samples.
        max_batches: how many batches are read; None for all.
        inputs: from a batch to the model's inputs (a tensor, a tuple of positional or a dict of keyword arguments); by default the
            batch itself where it is a tensor or a dict, the first item of a sequence.
        filter_fn: called with (batch norm, path), says whether to recalibrate it; the others run as in evaluation.

    Returns:
        what was recalibrated; `skipped` lists batch norms left alone, and why.

    Raises:
        NothingMatchedError: when no batch norm keeps statistics.
        ConfigError: for a weight outside [0, 1].
        DataError: for an empty loader, a norm that saw one value a channel, and values that are not finite. Nothing is changed then.

    Source: AdaBN: Li et al., arXiv 1603.04779; precise statistics: Wu and Johnson, "Rethinking Batch in BatchNorm", arXiv 2105.07576,
    section 3; the mix with a weight is known as alpha-BN.

    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    >>> changes = recalibrate_batch_norm(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]] * 2)])
    >>> model[0].running_mean.item(), round(model[0].running_var.item(), 3)
    (3.75, 6.917)
    """
    if not 0 <= source_weight <= 1:
        raise ConfigError("source_weight is outside [0, 1]", evidence=repr(source_weight))
    model = unwrapped(model)
    norms, skipped = _chosen(model, filter_fn)
    moments = measure_norms(model, norms, loader, max_batches=max_batches, inputs=inputs)
    edits: list[Edit] = []
    for path, norm in norms.items():
        if moments[path].count == 0 and any(found.count for found in moments.values()):
            skipped.append(Change(path, "it did not run"))
        else:
            edits.append(_edit(path, norm, moments[path], source_weight))
    return apply_edits(model, edits, skipped)


def measure_norms(
    model: nn.Module,
    norms: Mapping[str, _BatchNorm],
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    inputs: Callable[[Any], Any] | None = None,
) -> dict[str, Moments]:
    """Statistics of what reaches `norms`, while these normalize by their batch and all else is in eval mode; the model stays as it was."""
    moments = {path: Moments() for path in norms}
    with ExitStack() as stack:
        stack.enter_context(preserved(model, buffers=True))
        stack.enter_context(torch.no_grad())
        model.eval()
        for path, norm in norms.items():
            norm.train()
            stack.callback(norm.register_forward_pre_hook(_Recorder(moments[path])).remove)
        for batch in itertools.islice(loader, max_batches):
            arguments, keywords = call_arguments(inputs(batch) if inputs is not None else _inputs_of(batch))
            model(*arguments, **keywords)
    return moments


def recalibrate_on_inputs(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """`recalibrate_batch_norm` over one batch of inputs."""
    return recalibrate_batch_norm(model, [example_inputs], inputs=lambda batch: batch, filter_fn=filter_fn)


def _chosen(model: nn.Module, filter_fn: Filter | None) -> tuple[dict[str, _BatchNorm], list[Change]]:
    norms: dict[str, _BatchNorm] = {}
    skipped: list[Change] = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if filter_fn is not None and not filter_fn(module, path):
            skipped.append(Change(path, "not chosen by the filter"))
        elif module.running_mean is None or module.running_var is None:
            skipped.append(Change(path, "it keeps no running statistics"))
        else:
            norms[path] = module
    if not norms:
        raise NothingMatchedError("no batch norm keeps running statistics", evidence="; ".join(map(str, skipped)))
    return norms, skipped


@dataclass
class Moments:
    """Count, mean and sum of squared deviations per channel in float64, merged batch by batch (Chan et al.)."""

    count: int = 0
    mean: Tensor | None = None
    deviations: Tensor | None = None

    def add(self, x: Tensor) -> None:
        rows = x.detach().transpose(0, 1).flatten(1).double()
        count, mean = rows.shape[1], rows.mean(1)
        deviations = (rows - mean[:, None]).square().sum(1)
        if self.mean is not None and self.deviations is not None:
            step = mean - self.mean
            total = self.count + count
            deviations = self.deviations + deviations + step.square() * (self.count * count / total)
            mean = self.mean + step * (count / total)
        self.count, self.mean, self.deviations = self.count + count, mean, deviations


@dataclass(frozen=True)
class _Recorder:
    moments: Moments

    def __call__(self, norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.moments.add(arguments[0])


def _inputs_of(batch: Any) -> Any:
    if isinstance(batch, (Tensor, Mapping)):
        return batch
    return batch[0]


def _edit(path: str, norm: _BatchNorm, moments: Moments, source_weight: float) -> SetValues:
    if moments.mean is None or moments.deviations is None:
        raise DataError("the loader is empty, so that no batch norm ran", fix="give at least one batch")
    if moments.count < 2:
        raise DataError("a batch norm saw one value a channel, which has no variance", where=path, fix="give more samples")
    measured = {"running_mean": moments.mean, "running_var": moments.deviations / (moments.count - 1)}
    values = {}
    for name, value in measured.items():
        if not bool(value.isfinite().all()):
            raise DataError("values that are not finite reach a batch norm", where=path, evidence=f"{name} over {moments.count} values")
        old = getattr(norm, name)
        mixed = source_weight * old.double() + (1 - source_weight) * value if source_weight else value
        values[f"{path}.{name}" if path else name] = mixed.to(old.dtype)
    return SetValues(path, values, f"running statistics of {moments.count} values a channel, weight of the old ones {source_weight:g}")
