"""What the set-ups share: how one is described, and small networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pl_normkit import Loaders, audit
from pl_normkit.graph import call_arguments
from pl_normkit.report import Report


@dataclass
class Setup:
    """A model, its inputs, how the loss is made of its output, and the optimizers."""

    model: nn.Module
    inputs: Any
    loss: Callable[[Any], Tensor]
    optimizers: list[Optimizer] | None = None
    loaders: Loaders | None = None
    select: list[str] | None = field(default_factory=lambda: ["NK0"])

    def report(self) -> Report:
        args, kwargs = call_arguments(self.inputs)
        output = self.model(*args, **kwargs)
        optimizers = self.optimizers or [AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)]
        return audit(self.model, self.inputs, loss=self.loss(output), optimizers=optimizers, loaders=self.loaders, select=self.select)


MISTAKES: dict[str, tuple[str, Callable[[], Setup]]] = {}
"""Set-ups with a mistake, and the rule that names it."""
CLEAN: dict[str, Callable[[], Setup]] = {}
"""Set-ups that nothing may be said of."""


def names(rule: str) -> Callable[[Callable[[], Setup]], Callable[[], Setup]]:
    def register(build: Callable[[], Setup]) -> Callable[[], Setup]:
        MISTAKES[build.__name__] = (rule, build)
        return build

    return register


def clean(build: Callable[[], Setup]) -> Callable[[], Setup]:
    CLEAN[build.__name__] = build
    return build


def cross_entropy(target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: F.cross_entropy(output, target)


def classes(samples: int, count: int = 10) -> Tensor:
    return torch.randint(0, count, (samples,))


def mlp(width: int = 32, hidden: int = 64, out: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


def cnn(channels: int = 8, out: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, out),
    )


class TwoLayers(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 10)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))


def two_layers(between: Callable[[TwoLayers, Tensor], Tensor]) -> Setup:
    net = type("Net", (TwoLayers,), {"between": between})()
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


class Blocks(nn.Module):
    """Three blocks; how they are called is a set-up's to say."""

    blocks: nn.ModuleList

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.used, self.use_norm = 2, False
        for name, part in parts.items():
            self.add_module(name, part)


def blocks(forward: Callable[..., Tensor], **parts: Any) -> Setup:
    """A network whose middle is `Blocks` with this forward, and with further modules and methods."""
    methods = {name: part for name, part in parts.items() if not isinstance(part, nn.Module)}
    middle = type("Middle", (Blocks,), {"forward": forward, **methods})
    core = middle(**{name: part for name, part in parts.items() if name not in methods})
    net = nn.Sequential(nn.Linear(32, 16), core, nn.Linear(16, 10))
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))
