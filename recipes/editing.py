"""Callbacks that edit the network of a recipe, by the words of `--with`."""

from __future__ import annotations

__all__ = ["EditingCallback", "add_callbacks", "editing_callbacks"]

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from pl_normkit.errors import ConfigError
from pl_normkit.surgery import Changes


class EditingCallback(Protocol):
    """What the editing callbacks of this library have in common."""

    changes: Changes


def editing_callbacks(trainer: L.Trainer) -> list[EditingCallback]:
    """The callbacks that keep what they changed."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [cast(EditingCallback, callback) for callback in callbacks if isinstance(getattr(callback, "changes", None), Changes)]


def add_callbacks(trainer: L.Trainer, builders: Sequence[Callable[[], Callback]]) -> list[Callback]:
    """Put callbacks before those the Trainer has, so that these find the network edited: audits, averages of the weights.

    Raises ConfigError for a second one that makes the same edit, and what the constructors raise.
    """
    present: set[type[object]] = {type(callback) for callback in editing_callbacks(trainer)}
    added = [build() for build in builders]
    for kind in map(type, added):
        if kind in present:
            evidence = "another one comes from `with:` or `trainer.callbacks` of the options"
            raise ConfigError(f"{kind.__name__} would edit the network twice", where="--with", evidence=evidence, fix="name it once")
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:0] = added
    return added
