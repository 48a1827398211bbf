"""NK321 to NK323 on filters that go wrong in one way each, and on sound ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import audit
from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.guided_upsampling import measure_filter
from pl_normkit.nn import DeformableKernelNetwork, JointFilter

CODES = ["NK321", "NK322", "NK323"]


class Raw(JointFilter):
    def taps(self, weights: Tensor) -> Tensor:
        return weights


class Shifted(JointFilter):
    def forward(self, weights: Tensor, offsets: Tensor, target: Tensor) -> Tensor:
        return super().forward(weights, offsets, target) + 0.1


def network(core: JointFilter | None = None, scale: float = 1.0) -> DeformableKernelNetwork:
    torch.manual_seed(0)
    found = DeformableKernelNetwork(fast=True)
    found.filter = core or found.filter
    nn.init.constant_(found.guidance.offsets.bias, scale)
    nn.init.constant_(found.target.offsets.bias, scale)
    return found


@pytest.mark.parametrize(
    ("model", "size", "codes"),
    [
        (network(), 32, []),
        (network(JointFilter(residual=False)), 32, []),
        (network(scale=3.0), 32, ["NK321"]),
        (network(Raw()), 32, ["NK322"]),
        (network(Shifted()), 32, ["NK322"]),
        (network(), 30, ["NK323"]),
    ],
    ids=["sound", "sums to one", "far offsets", "raw taps", "shifted", "padded"],
)
def test_verdicts(model: nn.Module, size: int, codes: list[str]) -> None:
    report = audit(model, (torch.rand(1, 3, size, size), torch.rand(1, 1, size, size)), select=CODES)
    assert ([finding.code for finding in report.findings], report.notes) == (codes, [])


def test_models_without_a_filter_are_left_alone() -> None:
    assert audit(nn.Conv2d(3, 3, 3), torch.rand(1, 3, 8, 8), select=CODES).findings == []
    with pytest.raises(NothingMatchedError):
        measure_filter(nn.Conv2d(3, 3, 3), torch.rand(1, 3, 8, 8))


def test_the_share_outside_is_counted() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = JointFilter()

        def forward(self, offsets: Tensor, target: Tensor) -> Tensor:
            return self.core(torch.rand(1, 9, 40, 40), offsets, target)

    offsets = torch.zeros(1, 9, 2, 40, 40)
    offsets[:, 0] = 6.5
    (check,) = measure_filter(Fixed(), (offsets, torch.rand(1, 1, 40, 40)))
    assert (check.module, check.outside, check.size) == ("core", pytest.approx(1 / 9), (40, 40))
