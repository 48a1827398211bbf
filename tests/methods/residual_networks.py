"""Toy residual networks with dropout at any place, and what the rules must say of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYOUTS = {
    "pre-basic": "BACBAC",
    "pre-bottleneck": "BACBACBAC",
    "post-basic": "CBACB",
    "post-bottleneck": "CBACBACB",
}
"""Operations of a branch in order: B batch norm, A activation, C convolution."""


@dataclass(frozen=True)
class BlockSpec:
    """A residual block: `dropouts` are positions in its layout, 0 before the first operation."""

    layout: str
    dropouts: tuple[int, ...] = ()
    functional: bool = False
    projection: bool = False
    inner: BlockSpec | None = None

    def expected(self, path: str) -> list[tuple[str, str]]:
        """(code, module path) of every finding's place, by reading the layout alone."""
        operations = LAYOUTS[self.layout]
        places = [path if self.functional else f"{path}.drop{position}" for position in self.dropouts]
        found = []
        for position, place in zip(self.dropouts, places, strict=True):
            after = operations[position:]
            if "B" in after:
                found.append(("NK101", place))
            elif "C" not in after:
                found.append(("NK102", place))
        if len(self.dropouts) > 1:
            found += [("NK103", place) for place in places]
        return found + (self.inner.expected(f"{path}.inner") if self.inner else [])


@dataclass(frozen=True)
class NetSpec:
    """A network of residual blocks; `trunk_dropout` stands after that many blocks, `head_dropout` on the pooled features."""

    blocks: tuple[BlockSpec, ...]
    trunk_dropout: int | None = None
    head_dropout: bool = False
    functional_pool: bool = False
    width: int = 8

    def expected(self) -> list[tuple[str, str]]:
        found = [place for index, block in enumerate(self.blocks) for place in block.expected(f"blocks.{index}")]
        if self.trunk_dropout is not None:
            found.append(("NK105", "trunk_drop"))
        if self.head_dropout:
            found.append(("NK104", "head_drop"))
        return sorted(found)


class Block(nn.Module):
    def __init__(self, spec: BlockSpec, width: int, p: float = 0.5) -> None:
        super().__init__()
        self.spec = spec
        self.p = p
        for index, operation in enumerate(LAYOUTS[spec.layout]):
            if operation == "B":
                self.add_module(f"op{index}", nn.BatchNorm2d(width))
            elif operation == "C":
                self.add_module(f"op{index}", nn.Conv2d(width, width, 3, padding=1, bias=False))
        if not spec.functional:
            for position in spec.dropouts:
                self.add_module(f"drop{position}", nn.Dropout(p))
        if spec.projection:
            self.downsample = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        if spec.inner is not None:
            self.inner = Block(spec.inner, width, p)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if self.spec.projection else x
        if self.spec.inner is not None:
            x = self.inner(x)
        operations = LAYOUTS[self.spec.layout]
        for index in range(len(operations) + 1):
            if index in self.spec.dropouts:
                x = F.dropout(x, self.p, self.training) if self.spec.functional else self.get_submodule(f"drop{index}")(x)
            if index < len(operations):
                x = torch.relu(x) if operations[index] == "A" else self.get_submodule(f"op{index}")(x)
        return x + shortcut


class Net(nn.Module):
    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = nn.Conv2d(3, spec.width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(block, spec.width) for block in spec.blocks)
        self.norm = nn.BatchNorm2d(spec.width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        if spec.trunk_dropout is not None:
            self.trunk_drop = nn.Dropout(0.2)
        if spec.head_dropout:
            self.head_drop = nn.Dropout(0.2)
        self.fc = nn.Linear(spec.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if index == self.spec.trunk_dropout:
                x = self.trunk_drop(x)
            x = block(x)
        x = torch.relu(self.norm(x))
        x = x.mean((2, 3)) if self.spec.functional_pool else self.pool(x).flatten(1)
        if self.spec.head_dropout:
            x = self.head_drop(x)
        return self.fc(x)
