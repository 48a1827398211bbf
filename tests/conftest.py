"""Fixtures for the whole suite: every test starts from the same random state, and rules made for a test end with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import rules as rules_module
from pl_normkit.findings import Place
from pl_normkit.rules import Mark, Needs, Observation, Subject, load_rules, rule

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

DOC = "\n\n".join(f"{title}\n    Text of {title}." for title in rules_module.SECTIONS)


class DropoutBlock(nn.Module):
    """Pre-activation residual block with its dropout before bn2: NK101 fires."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.conv1(self.bn1(x).relu()))
        return x + self.conv2(self.bn2(y).relu())


class FaultyNet(nn.Module):
    """Two blocks that NK101 fires at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = DropoutBlock()
        self.layer2 = DropoutBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x)))


@pytest.fixture
def faulty_net() -> FaultyNet:
    torch.manual_seed(0)
    return FaultyNet()


MakeRule = Callable[..., str]


@pytest.fixture
def make_rule() -> Iterator[MakeRule]:
    """`make_rule(code, check)` registers a rule until the test ends; without a check it fires at the model itself."""
    load_rules()
    before = dict(rules_module._registry)

    def make(code: str, check: Callable[[Subject], Iterable[Observation]] | None = None, **options: Any) -> str:
        def fire(subject: Subject) -> Iterator[Observation]:
            yield Observation("it fired", [Place("", "net.py:1")], "do something")

        def run(subject: Subject) -> Iterable[Observation]:
            return (check or fire)(subject)

        run.__doc__ = DOC
        run.__qualname__ = f"{code}_check"
        settings: dict[str, Any] = {"mark": Mark.MEASURED, "source": "a test", "needs": (Needs.MODEL,), **options}
        rule(code, settings.pop("name", f"rule-{code.lower()}"), **settings)(run)
        return code

    yield make
    rules_module._registry.clear()
    rules_module._registry.update(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
