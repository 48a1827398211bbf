"""Training data whose order and augmentation do not depend on what else draws random numbers."""

from __future__ import annotations

__all__ = ["isolate_train_data"]

import functools
import random
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from pl_normkit.preserve import random_states


class RandomStream:
    """A state of torch's, numpy's and Python's global generators; inside `with` it stands in for theirs."""

    def __init__(self, seed: int) -> None:
        put_back = random_states()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        self._resume = random_states()
        put_back()

    def __enter__(self) -> None:
        self._put_back = random_states()
        self._resume()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._resume = random_states()
        self._put_back()


class IsolatedLoader(DataLoader[Any]):
    """Another loader with random numbers of its own: those of an iteration depend on what `choose_seed` then returns alone."""

    def __init__(self, loader: DataLoader[Any], choose_seed: Callable[[], int]) -> None:
        # Not DataLoader.__init__: the other loader's settings as they are, whatever they were given as.
        vars(self).update(vars(loader))
        vars(self)["choose_seed"] = choose_seed

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        stream = RandomStream(vars(self)["choose_seed"]())
        with stream:
            batches = super().__iter__()
        while True:
            with stream:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def isolate_train_data(data: L.LightningDataModule, trainer: L.Trainer, seed: int) -> None:
    """From now on the training batches of `data` depend on `seed` and the epoch alone, with and without loader workers."""
    build = data.train_dataloader

    @functools.wraps(build)
    def build_isolated() -> Any:
        def choose_seed() -> int:
            return seed * 1_000_003 + trainer.current_epoch

        return tree_map_only(DataLoader, lambda loader: IsolatedLoader(loader, choose_seed), build())

    data.train_dataloader = build_isolated  # type: ignore[method-assign]
