"""Frozen parameters that something writes to, told from those that are still or trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pl_normkit.methods.nan_safety.guard.written import WrittenParameters

WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.add_(1),
    "past torch's counter": lambda p: p.data.copy_(p + 1),
    "another storage": lambda p: setattr(p, "data", p.data + 1),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("frozen", [True, False])
def test_only_a_write_to_a_frozen_parameter_counts(write: str, frozen: bool) -> None:
    model = nn.ModuleList([nn.Linear(2, 2).requires_grad_(not frozen), nn.Linear(2, 2).requires_grad_(False)])
    written = WrittenParameters(model)
    with torch.no_grad():
        WRITES[write](model[0].weight)
    assert [written.update(), written.update()] == [frozen, False]
    assert written.ids == ({id(model[0].weight)} if frozen else set())
    model[0].requires_grad_(True)
    written.update()
    assert written.ids == set()


def test_what_is_frozen_for_a_moment_is_not_taken_for_written() -> None:
    layer = nn.Linear(2, 2)
    written = WrittenParameters(layer)
    for _ in range(4):
        layer.requires_grad_(False)
        assert not written.update()
        layer.requires_grad_(True)
        written.update()
        with torch.no_grad():
            layer.weight.add_(1)
