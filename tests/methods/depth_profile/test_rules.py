"""Each rule fires at what it names and keeps quiet on real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import audit
from pl_normkit.findings import Severity
from tests.methods.depth_profile.networks import NETWORKS, Network

CODES = ["NK901", "NK902", "NK903", "NK904", "NK905", "NK906", "NK907"]


class Blocks(nn.Module):
    """x + gain * linear(norm(x)), or without the norm."""

    def __init__(self, depth: int = 8, *, gain: float = 1.0, norm: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8) if norm else nn.Identity(), nn.Linear(8, 8)) for _ in range(depth))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.gain * block(x)
        return x


def found(model: nn.Module, inputs: Any) -> list[tuple[str, Severity, int]]:
    report = audit(model, inputs, select=CODES)
    assert [str(note) for note in report.notes] == []
    return [(finding.code, finding.severity, len(finding.places)) for finding in report.findings]


def trained(model: Blocks) -> Blocks:
    for block in model.blocks:
        nn.init.uniform_(block[0].weight, 0.5, 1.5)
    return model


def dead_from(model: Blocks, start: int) -> Blocks:
    for block in list(model.blocks)[start:]:
        nn.init.zeros_(block[1].weight)
        nn.init.zeros_(block[1].bias)
    return model


def with_gradients(model: Blocks, sizes: list[float]) -> Blocks:
    for block, size in zip(model.blocks, sizes, strict=True):
        block[1].weight.grad = torch.full((8, 8), size)
    return model


def alive_at(model: Blocks, index: int) -> Blocks:
    for block in [block for number, block in enumerate(model.blocks) if number != index]:
        nn.init.zeros_(block[1].weight)
        nn.init.zeros_(block[1].bias)
    return model


class TwoStacks(nn.Module):
    """An encoder and a decoder, the first of which gets its gradient through the second."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = with_gradients(Blocks(4), [0.01] * 4), with_gradients(Blocks(4), [1.0] * 4)

    def forward(self, x: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(self.encoder(x))
        return decoded


X = torch.linspace(-1.0, 1.0, 2 * 5 * 8).reshape(2, 5, 8).sin()

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, list[tuple[str, Severity, int]]]] = {
    "healthy": (Blocks, X, []),
    "stuck": (lambda: with_gradients(Blocks(), [0.01] * 2 + [1.0] * 6), X, [("NK901", Severity.WARNING, 1)]),
    "an encoder and its decoder": (TwoStacks, X, []),
    "even gradients": (lambda: with_gradients(Blocks(), [0.06] * 2 + [1.0] * 6), X, []),
    "growing": (lambda: Blocks(gain=3.0, norm=False), X, [("NK902", Severity.WARNING, 1)]),
    "one step from a small start": (lambda: alive_at(Blocks(), 1), X * 0.01, []),
    "dead": (lambda: dead_from(trained(Blocks()), 6), X, [("NK903", Severity.NOTE, 2)]),
    "one in four dead": (lambda: dead_from(trained(Blocks()), 7), X, []),
    "zero at initialization": (lambda: dead_from(Blocks(), 6), X, []),
    "massive": (
        lambda: dead_from(Blocks(), 0),
        torch.where(torch.arange(80).reshape(2, 5, 8) == 3, 300.0, X * 0.1),
        [("NK904", Severity.NOTE, 8)],
    ),
    "near the limit": (
        lambda: dead_from(Blocks(), 0).half(),
        (17000.0 * X / X.abs().max()).half(),
        [("NK905", Severity.WARNING, 8)],
    ),
    "below a quarter": (lambda: dead_from(Blocks(), 0).half(), (16000.0 * X / X.abs().max()).half(), []),
    "over the limit": (lambda: Blocks(2, gain=60000.0).half(), X.half(), [("NK905", Severity.ERROR, 2)]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_fires_where_it_should(case: str) -> None:
    torch.manual_seed(0)
    build, inputs, expected = CASES[case]
    assert found(build(), inputs) == expected


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_real_networks_are_quiet(network: Network) -> None:
    assert found(network.build(), network.batch()) == []


def test_only_the_limit_of_float16_is_on_by_default() -> None:
    torch.manual_seed(0)
    growing, over = Blocks(gain=3.0, norm=False), Blocks(2, gain=60000.0).half()
    assert [finding.code for finding in audit(growing, X).findings if finding.code in CODES] == []
    assert [finding.code for finding in audit(over, X.half()).findings if finding.code in CODES] == ["NK905"]


def test_inputs_that_only_the_trace_takes_are_not_judged() -> None:
    assert found(Blocks().half(), X) == []


def test_without_leave_to_measure_nothing_runs() -> None:
    assert audit(Blocks(gain=3.0, norm=False), X, select=CODES, measure=False).findings == []
