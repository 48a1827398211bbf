"""Layers left out by random numbers in eval mode, however the number is drawn; and choices of chance that are meant."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.methods.wiring.setups import Setup, classes, clean, cross_entropy, names

Drops = Callable[["Block"], bool]


class Block(nn.Module):
    """A residual block that leaves itself out where `drops` says so."""

    def __init__(self, drops: Drops) -> None:
        super().__init__()
        self.linear, self.drops = nn.Linear(32, 32), drops
        self.own, self.own_numpy = random.Random(3), np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.drops(self):
            return x
        return x + torch.tanh(self.linear(x))


class AfterIt(Block):
    """The branch is computed and thrown away."""

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.tanh(self.linear(x))
        return x if self.drops(self) else x + branch


class TimesZero(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * float(not self.drops(self))


class FromOutside(nn.Module):
    """The network leaves its blocks out itself."""

    def __init__(self, drops: Drops) -> None:
        super().__init__()
        self.drops = drops
        self.blocks = nn.ModuleList(Block(lambda _: False) for _ in range(3))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.drops(block):
                x = block(x)
        return self.head(x)


def setup(net: nn.Module) -> Setup:
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


def stack(block: type[Block], drops: Drops) -> Setup:
    return setup(nn.Sequential(*(block(drops) for _ in range(3)), nn.Linear(32, 10)))


DRAWS: dict[str, Drops] = {
    "python": lambda _: random.random() < 0.1,
    "python_uniform": lambda _: random.uniform(0, 10) > 9,
    "python_choices": lambda _: random.choices((True, False), (0.1, 0.9))[0],
    "numpy": lambda _: np.random.rand() < 0.1,  # noqa: NPY002
    "numpy_binomial": lambda _: not np.random.binomial(1, 0.9),  # noqa: NPY002
    "torch_item": lambda _: torch.rand(1).item() < 0.1,
    "torch_bool": lambda _: bool(torch.rand(()) < 0.1),
    "torch_uniform": lambda _: bool(torch.empty(1).uniform_() > 0.9),
    "torch_uniform_range": lambda _: bool(torch.empty(1).uniform_(2, 4) < 2.2),
    "torch_bernoulli": lambda _: not torch.bernoulli(torch.tensor(0.9)),
    "torch_bernoulli_in_place": lambda _: bool(torch.empty(1).bernoulli_(0.1)),
    "own_python": lambda block: block.own.random() < 0.4,
    "own_numpy": lambda block: block.own_numpy.random() < 0.4,
}


def _register(mark: Callable[[Callable[[], Setup]], Any], name: str, build: Callable[[], Setup]) -> None:
    def build_named() -> Setup:
        return build()

    build_named.__name__ = name
    mark(build_named)


for _name, _drops in DRAWS.items():
    _register(names("dropout-active-in-evaluation"), f"left_out_by_{_name}", lambda drops=_drops: stack(Block, drops))
    _register(clean, f"left_out_in_training_by_{_name}", lambda drops=_drops: stack(Block, lambda block: block.training and drops(block)))
for _block in (AfterIt, TimesZero):
    _register(names("dropout-active-in-evaluation"), f"left_out_{_block.__name__}", lambda block=_block: stack(block, DRAWS["python"]))
    _register(clean, f"dropped_{_block.__name__}", lambda block=_block: stack(block, lambda own: own.training and random.random() < 0.999))
for _name in ("python", "numpy", "torch_item"):
    _register(names("dropout-active-in-evaluation"), f"left_out_by_the_network_{_name}", lambda name=_name: setup(FromOutside(DRAWS[name])))


@clean
def one_of_two_paths() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.left(x) if random.random() < 0.5 else self.right(x)))

    return setup(Net())


@clean
def teacher_forcing() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell, self.head = nn.Embedding(10, 32), nn.GRUCell(32, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor, tokens: Tensor, forced: float = 0.5) -> Tensor:
            given, logits = tokens[:, 0], []
            for step in range(tokens.shape[1]):
                x = self.cell(self.embed(given), x)
                logits.append(self.head(x))
                given = tokens[:, step] if random.random() < forced else logits[-1].argmax(-1)
            return torch.stack(logits, 2)

    tokens = torch.randint(0, 10, (16, 5))
    return Setup(Net(), (torch.randn(16, 32), tokens), cross_entropy(tokens))


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(change(torch.tanh(self.first(x))))

    _register(clean, f"chance_{name}", lambda: setup(Net()))


_changed("flips", lambda x: x.flip(-1) if random.random() < 0.5 else x)
_changed("noise", lambda x: x + torch.from_numpy(np.random.randn(*x.shape)).float())  # noqa: NPY002
_changed("scale", lambda x: x * random.uniform(0.5, 1.5))
_changed("mix", lambda x: np.random.beta(0.2, 0.2) * x + x.mean())  # noqa: NPY002
_changed("draws_until_one_fits", lambda x: x * next(number for number in iter(random.random, None) if 0.2 < number < 0.3))
_changed("shuffled_units", lambda x: x[:, random.sample(range(32), 32)])
