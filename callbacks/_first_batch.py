"""A batch of the training data before the first step, and which part of a batch a network reads where nothing tells but its form."""

from __future__ import annotations

__all__ = ["as_transferred", "first_samples", "inputs_in"]

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from pl_normkit.preserve import objects_kept, preserved

if TYPE_CHECKING:
    import lightning.pytorch as pl


def first_samples(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """A batch of the first two samples of the stage's data, as the training step would get it; None where it cannot be had.

    Reads map-style data sets through the `collate_fn` of their loaders and the transfer hooks; no worker starts, no loader iterates,
    every RNG and the data set's own objects are as before.
    """
    with preserved(pl_module), objects_kept(*pl_module.modules()):
        try:
            batch = _joint_batch(_loaders(trainer))
            return None if batch is None else as_transferred(pl_module, batch)
        except Exception:  # data that is not ready yet, or that fails, is the run's own affair: it will say so itself
            return None


def _loaders(trainer: pl.Trainer) -> Any:
    """What gives the stage's data; outside of fitting the evaluation data are what the network will be called with."""
    stages = {"validate": trainer.validate_loop, "test": trainer.test_loop, "predict": trainer.predict_loop}
    fn = str(trainer.state.fn.value) if trainer.state.fn is not None else "fit"
    source: Any = stages.get(fn, trainer.fit_loop)._data_source  # type: ignore[attr-defined]
    loaders = source.dataloader() if source.is_defined() else None
    if isinstance(loaders, (list, tuple)) and fn in stages:
        return loaders[0] if loaders else None  # evaluation takes one loader after the other
    return loaders


def _joint_batch(loaders: Any) -> Any:
    """A batch of one loader, or of several that a training step reads together."""
    if hasattr(loaders, "iterables") and hasattr(loaders, "flattened"):  # a CombinedLoader
        loaders = loaders.flattened[0] if getattr(loaders, "_mode", "") == "sequential" else loaders.iterables
    if isinstance(loaders, Mapping):
        return {key: _joint_batch(loader) for key, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_joint_batch(loader) for loader in loaders] or None
    if not isinstance(loaders, DataLoader) or isinstance(loaders.dataset, IterableDataset) or len(loaders.dataset) == 0:  # type: ignore[arg-type]
        return None
    with objects_kept(loaders.dataset, loaders.collate_fn):
        samples = [loaders.dataset[index] for index in range(min(2, len(loaders.dataset)))]  # type: ignore[arg-type]
        return loaders.collate_fn(samples)


def as_transferred(pl_module: pl.LightningModule, batch: Any) -> Any:
    """A batch of a loader as Lightning gives it to the step."""
    batch = pl_module._on_before_batch_transfer(batch)
    device = next((parameter.device for parameter in pl_module.parameters()), None)
    return pl_module._apply_batch_transfer_handler(batch, device=device)


def inputs_in(batch: Any, network: nn.Module) -> Any:
    """Of a mapping the entries that `forward` names, else its only tensor that looks like an image; of a sequence the first item; of a
    dataclass as of a mapping of its fields. None where there is nothing such."""
    if isinstance(batch, Tensor):
        return (batch,)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    elif isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, Mapping):
        wanted = inspect.signature(network.forward).parameters
        named = {key: value for key, value in batch.items() if key in wanted}
        images = [leaf for leaf in _tensors(batch) if leaf.is_floating_point() and leaf.dim() >= 3]
        return named or ((images[0],) if len(images) == 1 else None)
    return inputs_in(batch[0], network) if isinstance(batch, (tuple, list)) and batch else None


def _tensors(batch: Mapping[Any, Any]) -> Iterator[Tensor]:
    for value in batch.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
