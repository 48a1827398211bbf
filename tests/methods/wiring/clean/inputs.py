"""Inputs, and samples that mix, as they are meant."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.wiring.setups import Setup, classes, clean, cnn, cross_entropy, mlp


@clean
def time_first_on_purpose() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0])

    target = torch.randint(0, 10, (12, 8))
    return Setup(Net(), torch.randn(12, 8, 16), lambda output: F.cross_entropy(output.flatten(0, 1), target.flatten()))


@clean
def graph_over_the_rows() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 10)
            self.register_buffer("adjacency", (torch.rand(16, 16) > 0.7).float())

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.get_buffer("adjacency") @ torch.relu(self.first(x)))

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def statistics_of_the_batch_as_a_feature() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 64), nn.Linear(65, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            spread = x.std(0).mean().expand(x.shape[0], 1)
            return self.last(torch.cat([x, spread], 1))

    return Setup(Net(), torch.randn(16, 32), lambda output: F.softplus(output).mean())


@clean
def mask_behind_a_zero_head() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(100, 32), nn.Linear(32, 10)
            nn.init.zeros_(self.last.weight)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.last((self.table(ids) * mask.unsqueeze(-1)).sum(1))

    mask = (torch.arange(12)[None] < torch.randint(3, 12, (8, 1))).float()
    return Setup(Net(), {"ids": torch.randint(0, 100, (8, 12)), "mask": mask}, cross_entropy(classes(8)))


@clean
def packed_sequences() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32, batch_first=True, bidirectional=True), nn.Linear(64, 10)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            _, (hidden, _) = self.rnn(packed)
            return self.last(torch.cat((hidden[-2], hidden[-1]), 1))

    return Setup(Net(), {"x": torch.randn(8, 12, 16), "lengths": torch.randint(3, 13, (8,))}, cross_entropy(classes(8)))


@clean
def all_ones_mask_that_python_reads() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(100, 32), nn.Linear(32, 10)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.table(ids)
            return self.last(x.mean(1) if mask.all() else (x * mask[..., None]).sum(1))

    return Setup(Net(), (torch.randint(0, 100, (8, 12)), torch.ones(8, 12)), cross_entropy(classes(8)))


@clean
def raw_pixels_normalized_inside() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image.float() / 255 - 0.5)

    return Setup(Net(), torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), cross_entropy(classes(8)))


@clean
def batch_norm_as_the_first_layer() -> Setup:
    net = nn.Sequential(nn.BatchNorm1d(32), mlp())
    return Setup(net, torch.randn(16, 32) * 50 + 3000, cross_entropy(classes(16)))


@clean
def time_steps_of_a_diffusion() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.net = mlp(16, 32, 32), mlp(out=32)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            angles = t[:, None].float() * torch.exp(-torch.arange(8) / 2)
            return self.net(x + self.time(torch.cat([angles.sin(), angles.cos()], -1)))

    noise = torch.randn(16, 32)
    return Setup(Net(), (noise, torch.randint(0, 1000, (16,))), lambda output: F.mse_loss(output, noise))


@clean
def attention_between_samples() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(48, 4, batch_first=True), nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(1, x.shape[0], -1)
            return self.last(self.attention(rows, rows, rows)[0].reshape(x.shape[0], -1))

    return Setup(Net(), torch.randn(6, 4, 12), cross_entropy(classes(6)))


@clean
def a_sequence_without_a_batch() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0])

    return Setup(Net(), torch.randn(12, 16), cross_entropy(classes(12)))


@clean
def small_integers_as_floats() -> Setup:
    return Setup(mlp(64), torch.randint(0, 17, (16, 64)).float(), cross_entropy(classes(16)))


@clean
def recurrent_cell_over_time() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.GRUCell(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(x.shape[1], 32)
            states = [state := self.cell(step, state) for step in x]
            return self.last(torch.stack(states))

    target = torch.randint(0, 10, (12, 8))
    return Setup(Net(), torch.randn(12, 8, 16), lambda output: F.cross_entropy(output.flatten(0, 1), target.flatten()))


class Attending(nn.Module):
    """Attention by hand as it should be."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.last, self.mix = nn.Linear(16, 48), nn.Linear(16, 10), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(*self.qkv(x).chunk(3, -1)).mean(1))


def _attending(name: str, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    def build() -> Setup:
        return Setup(Attending(mix), torch.randn(8, 12, 16), cross_entropy(classes(8)))

    build.__name__ = name
    clean(build)


def _over_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def _heads_over_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, 8)).permute(0, 2, 1, 3) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _over_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    between = [part.transpose(0, 1) for part in (q, k, v)]
    return _over_time(q, k, v) + _over_time(*between).transpose(0, 1)


_attending("attention_by_hand_over_time", _over_time)
_attending("heads_over_time", _heads_over_time)
_attending("attention_over_time_and_between_samples", _over_both)


@clean
def transposed_for_a_layer_that_takes_time_first() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x.transpose(0, 1))[0][-1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))
