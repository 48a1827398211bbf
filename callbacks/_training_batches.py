"""The batches that training will see, read before the first step without moving anything that decides on them."""

from __future__ import annotations

__all__ = ["shown_passes", "training_batches"]

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    import lightning.pytorch as pl


@contextmanager
def training_batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[TrainingBatches]:
    """A copy of the training loader; generators that it and the run's own loader share are as before afterwards."""
    combined: Any = trainer.fit_loop._combined_loader
    generators = [generator for loader in combined.flattened for generator in _generators(loader)]
    states = [generator.get_state() for generator in generators]
    try:
        copied = type(combined)(tree_map(_without_iterator, combined.iterables), combined._mode)
        yield TrainingBatches(trainer, pl_module, copied)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class TrainingBatches:
    """Batches as the training step gets them: converted, passed through the transfer hooks, on their device."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        limit = self._trainer.num_training_batches
        for batch, *_ in itertools.islice(self._loader, None if math.isinf(limit) else int(limit)):
            batch = self._trainer.precision_plugin.convert_input(batch)
            batch = self._pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _without_iterator(loader: Any) -> Any:
    """A copy whose workers are its own: one loader with persistent workers has one iterator, which the run holds."""
    if not isinstance(loader, DataLoader):
        return loader
    copied = copy.copy(loader)
    copied._iterator = None
    return copied


def _generators(loader: Any) -> Iterator[torch.Generator]:
    samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    for holder in (loader, *samplers, getattr(samplers[1], "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


@contextmanager
def shown_passes(trainer: pl.Trainer, title: str, max_batches: int | None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on rank zero where the trainer shows bars, told (batches done, number of the pass); it starts anew with each pass."""
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        yield None
        return
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

    known = [count for count in (max_batches, trainer.num_training_batches) if count is not None and not math.isinf(count)]
    with Tqdm(desc=title, total=min(known, default=None), leave=False) as bar:

        def show(done: int, turn: int) -> None:
            bar.set_description(f"{title}, pass {turn + 1}")
            bar.n = done
            bar.refresh()

        yield show
