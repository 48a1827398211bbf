"""What the network will be called with, guessed from the training data before the first step."""

from __future__ import annotations

__all__ = ["first_samples", "guess_inputs", "inputs_in"]

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pl_normkit.preserve import preserved


def guess_inputs(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Inputs for the module's `forward` from two training samples, None where they cannot be had.

    Reads a map-style dataset through the loader's `collate_fn`; no worker starts, no loader iterates, every RNG is as before.
    Of a batch that is a sequence the first item counts, of a mapping the entries that `forward` names.
    """
    return inputs_in(first_samples(trainer, pl_module), pl_module)


def first_samples(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """A batch of the first two samples of the stage's data, None where they cannot be had; read as `guess_inputs` says."""
    with preserved(pl_module):
        try:
            return _first_samples(trainer)
        except Exception:  # data that is not ready yet, or that fails, is the run's own affair: it will say so itself
            return None


def _first_samples(trainer: pl.Trainer) -> Any:
    source = _loop(trainer)._data_source
    loader = source.dataloader() if source.is_defined() else None
    loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or len(loader.dataset) == 0:  # type: ignore[arg-type]
        return None
    samples = [loader.dataset[index] for index in range(min(2, len(loader.dataset)))]  # type: ignore[arg-type]
    return loader.collate_fn(samples)


def _loop(trainer: pl.Trainer) -> Any:
    """The loop of the stage: outside of fitting the evaluation data are what the network will be called with."""
    stages = {"validate": trainer.validate_loop, "test": trainer.test_loop, "predict": trainer.predict_loop}
    return stages.get(str(trainer.state.fn.value) if trainer.state.fn is not None else "fit", trainer.fit_loop)


def inputs_in(batch: Any, pl_module: pl.LightningModule) -> Any:
    """Of a batch that is a sequence the first item, of a mapping the entries that `forward` names; None where there is nothing such."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        wanted = inspect.signature(pl_module.forward).parameters
        named = {key: value for key, value in batch.items() if key in wanted}
        return named or None
    return (batch[0],) if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor) else None
