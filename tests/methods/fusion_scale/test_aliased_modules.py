"""Fusions in modules that are called by another name than the first they have (monai's DynUNet builds its skip layers so)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pl_normkit import audit


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.join = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.join(torch.cat([self.up(x), skip], dim=1))


class SkipLayer(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.down, self.below, self.up = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1), up

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.up(self.below(skip), skip)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList([Up()])
        self.skip_layer = SkipLayer(self.ups[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.skip_layer(x)


def test_fusion_in_a_module_with_two_names_is_measured() -> None:
    torch.manual_seed(0)
    report = audit(Net(), torch.randn(2, 1, 16, 16), select=["NK301"])

    assert list(report.notes) == []


def test_its_scale_is_reported_under_the_first_name() -> None:
    from pl_normkit.methods.fusion_scale import measure_fusion_scales

    torch.manual_seed(0)
    (scale,) = measure_fusion_scales(Net(), [torch.randn(2, 1, 16, 16)])

    assert scale.module == "ups.0"
    assert all(branch.std > 0 for branch in scale.branches)
