"""Small module trees that edits are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Leaf(nn.Module):
    """A layer with every kind of state."""

    scale_by = 1.0

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(width)
        self.p = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.linear(x))) * self.scale_by


class Tree(nn.Module):
    """Runs its children one after another; the same child may stand at several names."""

    def __init__(self, children: Sequence[nn.Module]) -> None:
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(f"part{index}", child)

    def forward(self, x: Tensor) -> Tensor:
        for child in list(self._modules):
            if child.startswith("part"):
                x = self.get_submodule(child)(x)
        return x


class Shift(nn.Module):
    """Something to insert that has a buffer."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("by", torch.tensor(by))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Doubled(nn.Module):
    """Mix-in that uses a method of the class behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def shift_first(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    child = host.get_submodule("inserted_call")
    return (child(args[0]), *args[1:]), kwargs


def snapshot(model: nn.Module) -> Any:
    """Objects, hooks, attributes and values, bit for bit; the order of every registry too."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, id(inner)) for key, inner in value.items()]
        return id(value), repr(value) if isinstance(value, (bool, int, float, str)) else ""

    tree = [
        (name, id(module), type(module), [(key, plain(value)) for key, value in vars(module).items()])
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    return tree, [(key, id(value), value.detach().clone().numpy().tobytes()) for key, value in model.state_dict(keep_vars=True).items()]
