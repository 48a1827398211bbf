"""What is known of tensors while they live: a mapping by identity that is cheap to ask, since every operation of a forward pass asks it."""

from __future__ import annotations

__all__ = ["TensorNotes"]

from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

Note = TypeVar("Note")
_Reference: Any = torch._C._WeakTensorRef  # type: ignore[attr-defined]  # knows when the tensor itself dies, not its Python object


class TensorNotes(Generic[Note]):
    """Notes of tensors, by identity; keeps none alive, and forgets what was noted of one that died."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[Any, Note]] = {}

    @overload
    def get(self, tensor: Tensor) -> Note | None: ...
    @overload
    def get(self, tensor: Tensor, default: Note) -> Note: ...
    def get(self, tensor: Tensor, default: Note | None = None) -> Note | None:
        found = self._notes.get(id(tensor))
        return default if found is None or found[0].expired() else found[1]

    def __contains__(self, tensor: Tensor) -> bool:
        found = self._notes.get(id(tensor))
        return found is not None and not found[0].expired()

    def __getitem__(self, tensor: Tensor) -> Note:
        reference, note = self._notes[id(tensor)]
        if reference.expired():
            raise KeyError(id(tensor))
        return note

    def __setitem__(self, tensor: Tensor, note: Note) -> None:
        self._notes[id(tensor)] = (_Reference(tensor), note)

    def __bool__(self) -> bool:
        """Whether anything was noted of a tensor that may live."""
        return bool(self._notes)
