"""Toys with an ASPP in the forms people write, and the rates expected for common crops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.methods.atrous_rates import find_aspps

TABLE = {
    224: (5, 2, 6, 3),
    256: (5, 3, 7, 4),
    384: (8, 4, 11, 5),
    512: (11, 5, 14, 7),
    513: (11, 6, 14, 7),
    640: (13, 7, 18, 9),
    769: (16, 8, 21, 11),
    896: (19, 9, 25, 12),
    1024: (21, 11, 28, 14),
}
"""Crop -> r at output stride 8 and 16 with c = 1/6, then with c = 0.22."""
CELLS = [
    (crop, stride, c, r)
    for crop, row in TABLE.items()
    for (stride, c), r in zip([(8, 1 / 6), (16, 1 / 6), (8, 0.22), (16, 0.22)], row, strict=True)
]


class Branch(nn.Module):
    """A dilated convolution in one of the forms people write."""

    def __init__(self, form: str, rate: int) -> None:
        super().__init__()
        mode = form if form in ("reflect", "circular", "replicate") else "zeros"
        padding: Any = "same" if form == "same" else rate
        groups = {"separable": 8, "grouped": 4}.get(form, 1)
        self.reduce = nn.Conv2d(8, 8, 1) if form == "reduced" else nn.Identity()
        self.conv = nn.Conv2d(8, 8, 3, padding=padding, dilation=rate, groups=groups, padding_mode=mode)
        self.point = nn.Conv2d(8, 8, 1) if form == "separable" else nn.Identity()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.point(self.conv(self.reduce(x)))))


class Toy(nn.Module):
    """A strided stem, a dilated encoder layer, an ASPP of `rates` with the usual 1x1 and pooled branches, and a head."""

    def __init__(self, rates: tuple[int, ...] = (12, 24, 36), form: str = "plain", join: str = "concat", stride: int = 8) -> None:
        super().__init__()
        self.join = join
        self.stem = nn.Conv2d(3, 8, stride, stride)
        self.encoder = nn.Conv2d(8, 8, 3, padding=4, dilation=4)
        self.point = nn.Conv2d(8, 8, 1)
        self.branches = nn.ModuleList(Branch(form, rate) for rate in rates)
        self.head = nn.Conv2d(8 * (len(rates) + 2) if join == "concat" else 8, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.encoder(self.stem(image)))
        pooled = F.interpolate(x.mean((2, 3), keepdim=True), x.shape[2:])
        parts = [self.point(x), *(branch(x) for branch in self.branches), pooled]
        joined = torch.cat(parts, 1) if self.join == "concat" else sum(parts[1:], parts[0])
        return F.interpolate(self.head(joined), image.shape[2:])


def toy(*arguments: Any, **options: Any) -> Toy:
    torch.manual_seed(0)
    return Toy(*arguments, **options).eval()


def rates_of(model: nn.Module, size: int = 96) -> list[tuple[int, ...]]:
    return [aspp.rates for aspp in find_aspps(model, torch.zeros(2, 3, size, size, device="meta"))]
