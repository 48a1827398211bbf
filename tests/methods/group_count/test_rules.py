"""NK811: what it says, when it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pl_normkit import audit
from pl_normkit.auditing import fix_findings


def _places(model: nn.Module, inputs: Any, **options: Any) -> list[list[str]]:
    found = audit(model, inputs, select=["NK811"], **options).findings
    return [[place.module for place in finding.places] for finding in found]


@pytest.mark.parametrize(("channels", "groups", "expected"), [(64, 32, [["1"]]), (96, 32, [["1"]]), (128, 32, []), (64, 1, []), (8, 8, [])])
def test_channels_per_group(channels: int, groups: int, expected: list[list[str]]) -> None:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.GroupNorm(groups, channels))
    assert _places(model, torch.randn(4, 3, 8, 8)) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((8, 8), (8, 32), [["1"]]), ((8, 8), (16, 16), []), ((8, 8), (8, 8), []), ((8, 8), (8, 16), [["1", "3"]])],
    ids=["eight groups everywhere", "instance norms", "instance norms of one width", "eight groups, twice too many"],
)
def test_one_channel_per_group(first: tuple[int, int], second: tuple[int, int], expected: list[list[str]]) -> None:
    layers = [nn.Conv2d(3, first[1], 3), nn.GroupNorm(*first), nn.Conv2d(first[1], second[1], 3), nn.GroupNorm(*second)]
    assert _places(nn.Sequential(*layers), torch.randn(4, 3, 8, 8)) == expected


@pytest.mark.parametrize(("batch", "expected"), [(1, [["1"]]), (2, [["1"]]), (3, []), (16, [])])
def test_batch_norms_of_few_samples(batch: int, expected: list[list[str]]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert _places(model, torch.randn(batch, 3, 8, 8), optimizers=optimizer) == expected


def test_a_batch_that_was_made_up_says_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert _places(model, torch.randn(2, 3, 8, 8)) == []


def test_it_is_a_preview_and_its_fix_converts() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert audit(model, x, optimizers=optimizer).findings == []
    report = audit(model, x, select=["NK811"], optimizers=optimizer)
    fix_findings(model, x, report.findings, allow_unsafe=True)
    assert type(model[1]) is nn.GroupNorm
