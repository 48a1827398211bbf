"""Modules that this step left out and another may call, and loops that call all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.methods.wiring.setups import Blocks, Setup, blocks, clean


def _used(forward: Callable[[Blocks, Tensor], Tensor]) -> Callable[[], Setup]:
    def build() -> Setup:
        return blocks(forward)

    build.__name__ = forward.__name__
    return clean(build)


@_used
def all_but_the_last_and_then_the_last(self: Blocks, x: Tensor) -> Tensor:
    for block in self.blocks[:-1]:
        x = torch.relu(block(x))
    return self.blocks[-1](x)


@_used
def all_by_index(self: Blocks, x: Tensor) -> Tensor:
    for index in range(len(self.blocks)):
        x = self.blocks[index](x)
    return x


@_used
def as_deep_as_an_argument_says(self: Blocks, x: Tensor, depth: int = 2) -> Tensor:
    for block in self.blocks[:depth]:
        x = block(x)
    return x


@_used
def early_exit_on_a_value(self: Blocks, x: Tensor) -> Tensor:
    for block in self.blocks:
        if x.abs().max() > 1e-6:
            return block(x)
    return x


@_used
def as_many_as_there_are_features(self: Blocks, x: Tensor) -> Tensor:
    features = [x, 2 * x]
    for block, feature in zip(self.blocks, features, strict=False):
        x = x + block(feature)
    return x


@_used
def chosen_by_a_shape(self: Blocks, x: Tensor) -> Tensor:
    level = min(x.shape[0] // 8, 2)
    return self.blocks[level](x)


@_used
def dropped_at_random(self: Blocks, x: Tensor) -> Tensor:
    keep = torch.ones(len(self.blocks)) * torch.tensor([1.0, 1.0, 0.0])
    for index, block in enumerate(self.blocks):
        if keep[index] > 0:
            x = block(x)
    return x


@_used
def task_in_an_attribute(self: Blocks, x: Tensor) -> Tensor:
    return self.blocks[self.used](x)


@_used
def only_in_evaluation(self: Blocks, x: Tensor) -> Tensor:
    for block in self.blocks[: 2 if self.training else 3]:
        x = block(x)
    return x


@clean
def stage_that_chooses_between_branches() -> Setup:
    def forward(self: Blocks, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.use_norm:
            x = self.norm(x)
        else:
            x = self.other(x)
        return x

    return blocks(forward, norm=nn.LayerNorm(16), other=nn.LayerNorm(16))


@clean
def depth_that_grows() -> Setup:
    def forward(self: Blocks, x: Tensor) -> Tensor:
        for block in self.blocks[: self.grown]:
            x = block(x)
        return x

    def grow(self: Blocks) -> None:
        self.grown += 1

    setup = blocks(forward, grow=grow)
    vars(setup.model[1])["grown"] = 2
    return setup


@clean
def depth_that_the_loop_sets() -> Setup:
    def forward(self: Blocks, x: Tensor) -> Tensor:
        for block in self.blocks[: self.stage]:
            x = block(x)
        return x

    setup = blocks(forward)
    setup.model[1].stage = 2
    return setup


@clean
def blocks_that_another_class_calls() -> Setup:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def refine(self, x: Tensor) -> Tensor:
            return self.inner.blocks[2](x)

    def forward(self: Blocks, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        return x

    setup = blocks(forward)
    setup.model = Outer(setup.model)
    return setup


@clean
def block_that_a_method_it_calls_names_too() -> Setup:
    def forward(self: Blocks, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        return self.last(x) if self.grown else x

    def last(self: Blocks, x: Tensor) -> Tensor:
        return self.blocks[2](x)

    def grow(self: Blocks) -> None:
        self.grown = True

    setup = blocks(forward, last=last, grow=grow)
    vars(setup.model[1])["grown"] = False
    return setup


@clean
def stage_that_the_overridden_forward_may_call() -> Setup:
    class Whole(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[2](x) if x.abs().max() > 1e6 else x

    class Features(Whole):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks[:2]:
                x = block(x)
            return super().forward(x)

    setup = blocks(Blocks.forward)
    setup.model[1] = Features()
    return setup
