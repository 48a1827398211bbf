"""Which dropouts are judged: those that always drop, written out, on gates, behind joined poolings, in post-norm and other blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit import audit, place_dropout


class Slot(nn.Module):
    """Whatever a case does between two convolutions; it knows the mode."""

    def __init__(self, act: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x, self.training)


class Residual(nn.Module):
    """A post-activation block around a slot."""

    def __init__(self, slot: nn.Module, add: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.slot, self.add = slot, add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.bn2(self.conv2(self.slot(F.relu(self.bn1(self.conv1(x)))))))


class PostNorm(nn.Module):
    def __init__(self, dropouts: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.drops = nn.ModuleList(nn.Dropout(0.3) for _ in range(dropouts))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        for drop in self.drops[1:]:
            y = drop(y)
        return self.norm(x + self.drops[0](self.second(y)))


class Gated(nn.Module):
    """Squeeze and excitation with a dropout on the gate, before a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.drop = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Dropout(0.3)
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = torch.sigmoid(self.squeeze(self.drop(x.mean((2, 3)))))
        return self.norm(self.conv(x * gate[:, :, None, None]))


class StaysInTraining(nn.Dropout):
    """Monte Carlo dropout as a module that ignores eval()."""

    def train(self, mode: bool = True) -> StaysInTraining:
        return super().train(True)


def codes(model: nn.Module, x: Tensor, select: str = "DEFAULT") -> dict[str, int]:
    found = audit(model, x, select=["NK1"] if select == "DEFAULT" else ["NK101", "NK102", "NK103", "NK104", "NK105"], measure=False)
    assert list(found.notes) == []
    return {finding.code: len(finding.places) for finding in found.findings}


FEATURES = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
SLOTS: dict[str, tuple[Callable[[Tensor, bool], Tensor], dict[str, int]]] = {
    "follows the mode": (lambda x, training: F.dropout(x, 0.2, training), {"NK101": 1}),
    "always on": (lambda x, _: F.dropout(x, 0.2), {}),
    "Bernoulli mask in training": (lambda x, training: x * torch.bernoulli(torch.full_like(x, 0.8)) / 0.8 if training else x, {"NK101": 1}),
    "Bernoulli mask, always": (lambda x, _: x * torch.bernoulli(torch.full_like(x, 0.8)) / 0.8, {}),
    "dropout of ones": (lambda x, training: x * F.dropout(torch.ones_like(x), 0.2, training), {"NK101": 1}),
    "dropout of ones, always": (lambda x, _: x * F.dropout(torch.ones_like(x), 0.2), {}),
    "stochastic depth": (lambda x, training: x * torch.bernoulli(torch.full((4, 1, 1, 1), 0.8)) if training else x, {}),
}


@pytest.mark.parametrize("name", SLOTS)
def test_a_dropout_shifts_only_where_training_and_evaluation_differ(name: str) -> None:
    act, expected = SLOTS[name]
    assert codes(Residual(Slot(act)), FEATURES) == expected


def test_module_that_ignores_eval_mode_shifts_nothing() -> None:
    assert codes(Residual(StaysInTraining(0.2)), FEATURES) == {}
    assert codes(Residual(nn.Dropout(0.2)), FEATURES) == {"NK101": 1}


@pytest.mark.parametrize(
    "add",
    [torch.add, torch.sub, lambda x, y: torch.lerp(x, y, 0.5), lambda x, y: torch.stack([x, y]).sum(0)],
    ids=["add", "sub", "lerp", "stack"],
)
def test_a_branch_is_one_however_it_is_added(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert codes(Residual(nn.Dropout(0.2), add), FEATURES, "ALL") == {"NK101": 1}


@pytest.mark.parametrize("dropouts", [1, 2])
def test_identical_post_norm_blocks_are_judged_alike(dropouts: int) -> None:
    """Their branches hold no batch norm, so that the paper's placement does not speak of them; the norm behind each does see the noise."""
    model = nn.Sequential(nn.Linear(4, 8), PostNorm(dropouts), PostNorm(dropouts), PostNorm(dropouts), nn.Linear(8, 1))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    assert codes(model, x) == {}
    assert codes(model, x, "ALL") == {"NK105": 3 * dropouts}
    assert place_dropout(model, x).made == []


def test_noise_on_a_gate_is_not_on_the_way_to_the_norm() -> None:
    assert codes(Gated(), torch.zeros(4, 3, 12, 12), "ALL") == {}


class Head(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), pool
        self.drop, self.classify = nn.Dropout(0.3), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.drop(self.pool(F.relu(self.norm(self.stem(x)))).flatten(1)))


def average(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


def both(x: Tensor) -> Tensor:
    return torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], dim=1)


@pytest.mark.parametrize(
    ("pool", "width", "side", "expected"),
    [(average, 8, 12, {"NK104": 1}), (average, 8, 3, {}), (both, 16, 12, {})],
    ids=["average", "one position", "average and maximum"],
)
def test_head_is_judged_where_averaging_lessens_the_noise(
    pool: Callable[[Tensor], Tensor], width: int, side: int, expected: dict[str, int]
) -> None:
    assert codes(Head(pool, width), torch.zeros(4, 3, side, side)) == expected
