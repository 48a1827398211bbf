"""NK311 to NK314 on what pool and loss saw in their last call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import audit
from pl_normkit.nn import BackgroundAwarePool2d, NoiseAwareLoss

CODES = ["NK311", "NK312", "NK313", "NK314"]
BOX = torch.tensor([[8.0, 8.0, 40.0, 40.0]])


def codes(model: nn.Module) -> list[str]:
    report = audit(nn.Sequential(model), select=CODES)
    assert [note for note in report.notes if "failed" in str(note)] == []
    return [finding.code for finding in report.findings]


@pytest.mark.parametrize(
    ("features", "box", "expected"),
    [
        (torch.ones(1, 4, 16, 16), BOX, ["NK311"]),
        (torch.randn(1, 8, 16, 16), BOX, []),
        (torch.randn(1, 4, 16, 16), torch.tensor([[0.0, 0.0, 64.0, 64.0]]), ["NK312"]),
    ],
    ids=["all alike", "sound", "one box over all"],
)
def test_pools(features: Tensor, box: Tensor, expected: list[str]) -> None:
    pool = BackgroundAwarePool2d()
    pool(features, [box], (64, 64))
    assert codes(pool) == expected


LABELS = torch.zeros(1, 8, 8, dtype=torch.long)
SOME = LABELS.clone()
SOME[:, :2] = 1
COSINES = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("loss", "second", "expected"),
    [
        (NoiseAwareLoss(), SOME, []),
        (NoiseAwareLoss(), LABELS, ["NK313"]),
        (NoiseAwareLoss(), LABELS + 1, ["NK313"]),
        (NoiseAwareLoss(gamma=0.001), SOME, ["NK313"]),
        (NoiseAwareLoss(tau=1.0), SOME, ["NK314"]),
    ],
    ids=["sound", "all agree", "all differ", "all trusted", "flat softmax"],
)
def test_losses(loss: NoiseAwareLoss, second: Tensor, expected: list[str]) -> None:
    loss(COSINES, LABELS, second)
    assert codes(loss) == expected


def test_quiet_before_the_first_call() -> None:
    assert codes(nn.Sequential(BackgroundAwarePool2d(), NoiseAwareLoss())) == []
