"""Which parameters without a gradient are written to by other code than an optimizer: a teacher's, a codebook's. Derived here."""

from __future__ import annotations

__all__ = ["WrittenParameters", "is_plain", "mark_of"]

from typing import Any

import torch
from torch import Tensor, nn

ALWAYS_CHANGED = -1


def is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def mark_of(tensor: Tensor) -> tuple[Any, ...]:
    """Differs after a write that torch counts."""
    version = ALWAYS_CHANGED if tensor.is_inference() else tensor._version
    place = tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and is_plain(tensor) else 0
    return version, place, tensor.shape


class WrittenParameters:
    """Frozen parameters that were seen to change while they were frozen.

    Nothing is copied: a write shows by version, storage or shape, and one that torch does not count (`.data.copy_`) by the sum of all
    entries, which is taken at updates 1, 2, 4, 8, ...

    Attributes:
        ids: of those parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.ids: set[int] = set()
        self._module = module
        self._seen: dict[int, tuple[Tensor, tuple[Any, ...], float]] = {}
        self._updates = 0
        self.update()

    def update(self) -> bool:
        """Look again; whether one more parameter has changed since."""
        self._updates += 1
        sums = self._updates & (self._updates - 1) == 0
        found = False
        for parameter in self._module.parameters():
            key = id(parameter)
            if parameter.requires_grad:
                self._seen.pop(key, None)  # trained now, perhaps frozen for a moment
                self.ids.discard(key)
            elif key not in self.ids and type(parameter) is nn.Parameter and is_plain(parameter) and not parameter.is_meta:
                mark, before = mark_of(parameter), self._seen.get(key)
                known = before is not None and not sums
                total = before[2] if before is not None and known else _total(parameter)
                if before is not None and (mark != before[1] or total != before[2]):
                    self.ids.add(key)
                    found = True
                self._seen[key] = parameter, mark, total
        return found


def _total(tensor: Tensor) -> float:
    values = tensor.detach()
    return float(values.nan_to_num().sum(dtype=torch.float64)) if values.is_floating_point() else 0.0
