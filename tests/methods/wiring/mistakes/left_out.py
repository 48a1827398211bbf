"""Modules that a forward never calls because of a slice, a loop or a condition: NK001."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.methods.wiring.setups import Blocks, Setup, blocks, names


def _left_out(forward: Callable[[Blocks, Tensor], Tensor]) -> Callable[[], Setup]:
    def build() -> Setup:
        return blocks(forward)

    build.__name__ = forward.__name__
    names("parameter-without-gradient")(build)
    return build


@_left_out
def slice_of_the_blocks(self: Blocks, x: Tensor) -> Tensor:
    for block in self.blocks[:2]:
        x = torch.relu(block(x))
    return x


@_left_out
def slice_without_the_last(self: Blocks, x: Tensor) -> Tensor:
    for index, block in enumerate(self.blocks[:-1]):
        x = block(x) if index == 0 else x + block(x)
    return x


@_left_out
def range_one_short(self: Blocks, x: Tensor) -> Tensor:
    for index in range(len(self.blocks) - 1):
        x = torch.relu(self.blocks[index](x))
    return x


@_left_out
def first_and_last_by_index(self: Blocks, x: Tensor) -> Tensor:
    x = self.blocks[0](x)
    return self.blocks[-1](x)


@_left_out
def loop_that_breaks(self: Blocks, x: Tensor) -> Tensor:
    for index, block in enumerate(self.blocks):
        if index == 2:
            break
        x = block(x)
    return x


@_left_out
def only_the_even_ones(self: Blocks, x: Tensor) -> Tensor:
    for index, block in enumerate(self.blocks):
        if index % 2 == 0:
            x = block(x)
    return x


@_left_out
def depth_of_the_constructor(self: Blocks, x: Tensor) -> Tensor:
    for block in self.blocks[: self.used]:
        x = block(x)
    return x


@_left_out
def returned_inside_the_loop(self: Blocks, x: Tensor) -> Tensor:
    for block in self.blocks:
        return block(x)
    return x


@_left_out
def named_list_of_the_first(self: Blocks, x: Tensor) -> Tensor:
    chosen = self.blocks[:2]
    states = [block(x) for block in chosen]
    return states[0] + states[1]


@names("parameter-without-gradient")
def norm_behind_a_flag_that_is_off() -> Setup:
    def forward(self: Blocks, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.use_norm:
            x = self.norm(x)
        return x

    return blocks(forward, norm=nn.LayerNorm(16))


@names("parameter-without-gradient")
def sequential_cut_short() -> Setup:
    def forward(self: Blocks, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.tail[:1](x)

    return blocks(forward, tail=nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))


@names("parameter-without-gradient")
def block_that_a_method_nobody_calls_names_too() -> Setup:
    def forward(self: Blocks, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        return x

    def stages(self: Blocks) -> list[nn.Module]:
        return list(self.blocks)

    return blocks(forward, stages=stages)


@names("parameter-without-gradient")
def stage_that_an_overridden_forward_called() -> Setup:
    class Whole(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.blocks[2](self.blocks[1](self.blocks[0](x))))

    class Features(Whole):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            if self.used >= 3:
                x = self.norm(x)
            return self.blocks[2](self.blocks[1](x))

    setup = blocks(Blocks.forward)
    setup.model[1] = Features(norm=nn.LayerNorm(16))
    return setup
