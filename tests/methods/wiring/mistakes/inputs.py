"""Mistakes with inputs: NK011 to NK013."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.wiring.setups import Setup, TwoLayers, classes, cnn, cross_entropy, mlp, names


@names("samples-mixed")
def lstm_without_batch_first() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0][:, -1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("samples-mixed")
def transformer_on_ids_without_batch_first() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(100, 32)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0), 2, enable_nested_tensor=False)
            self.last = nn.Linear(32, 10)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.encoder(self.table(ids)).mean(1))

    return Setup(Net(), torch.randint(0, 100, (8, 12)), cross_entropy(classes(8)))


@names("samples-mixed")
def view_after_permute() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).permute(1, 0, 2, 3)
            return self.last(x.reshape(x.shape[1], -1))

    return Setup(Net(), torch.randn(6, 3, 8, 8), cross_entropy(classes(6)))


@names("samples-mixed")
def softmax_over_the_batch() -> Setup:
    target = torch.rand(16, 10)
    return Setup(nn.Sequential(mlp(), nn.Softmax(dim=0)), torch.randn(16, 32), lambda output: F.mse_loss(output, target))


@names("input-ignored")
def condition_never_read() -> Setup:
    class Net(TwoLayers):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return super().forward(x)

    return Setup(Net(), (torch.randn(16, 32), torch.randn(16, 4)), cross_entropy(classes(16)))


@names("input-ignored")
def lengths_never_read() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 10)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.last(self.rnn(x)[1][-1])

    return Setup(Net(), {"x": torch.randn(8, 12, 16), "lengths": torch.randint(3, 13, (8,))}, cross_entropy(classes(8)))


@names("input-ignored")
def mask_read_for_its_shape_only() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(100, 32), nn.Linear(32, 10)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.last((self.table(ids) * torch.ones_like(mask).unsqueeze(-1)).sum(1) / mask.shape[1])

    mask = (torch.arange(12)[None] < torch.randint(3, 12, (8, 1))).float()
    return Setup(Net(), {"ids": torch.randint(0, 100, (8, 12)), "mask": mask}, cross_entropy(classes(8)))


@names("input-out-of-range")
def bytes_cast_to_float_inside() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image.float())

    return Setup(Net(), torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), cross_entropy(classes(8)))


@names("input-out-of-range")
def features_far_from_zero() -> Setup:
    return Setup(mlp(), torch.randn(16, 32) + 300, cross_entropy(classes(16)))


@names("input-out-of-range")
def a_year_among_the_features() -> Setup:
    rows = torch.randn(32, 8)
    rows[:, 3] = torch.randint(1990, 2021, (32,)).float()
    return Setup(mlp(8), rows, cross_entropy(classes(32)))


@names("input-out-of-range")
def codes_as_numbers() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4)

        def forward(self, codes: Tensor) -> Tensor:
            return self.net(codes.float())

    return Setup(Net(), torch.randint(0, 5000, (16, 4)), cross_entropy(classes(16)))


@names("input-out-of-range")
def flat_pixels() -> Setup:
    return Setup(mlp(784), torch.randint(0, 256, (16, 784)).float(), cross_entropy(classes(16)))


@names("samples-mixed")
def cell_stepped_over_the_batch() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.GRUCell(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            state, states = x.new_zeros(x.shape[1], 32), []
            for step in x:
                state = self.cell(step, state)
                states.append(state)
            return self.last(torch.stack(states)[:, -1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("samples-mixed")
def cumulative_sum_over_the_batch() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).cumsum(0)[:, -1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("input-out-of-range")
def patches_of_raw_pixels() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.last = nn.Linear(48, 32), nn.Linear(32, 10)

        def forward(self, image: Tensor) -> Tensor:
            patches = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
            return self.last(self.patch(patches).mean(1))

    return Setup(Net(), torch.randint(0, 256, (8, 3, 16, 16)).float(), cross_entropy(classes(8)))


class Attends(nn.Module):
    """Attention by hand; how the product is taken is a set-up's to say."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.last, self.mix = nn.Linear(16, 48), nn.Linear(16, 10), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(*self.qkv(x).chunk(3, -1)).mean(1))


def _attends(name: str, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    def build() -> Setup:
        return Setup(Attends(mix), torch.randn(8, 12, 16), cross_entropy(classes(8)))

    build.__name__ = name
    names("samples-mixed")(build)


def _over_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(0, 1)


def _heads_over_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, time, _ = q.shape
    q, k, v = (part.view(batch, time, 2, 8).permute(1, 2, 0, 3) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)


def _by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("btd,ctd->tbc", q, k).softmax(-1)
    return torch.einsum("tbc,ctd->tbd", scores, v).transpose(0, 1)


def _viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, time, width = q.shape
    return (q + v).view(time, batch, width).cumsum(0).transpose(0, 1) + 0 * k


_attends("attention_by_hand_over_the_batch", _over_the_batch)
_attends("heads_over_the_batch", _heads_over_the_batch)
_attends("einsum_over_the_batch", _by_einsum)
_attends("view_in_the_place_of_a_transpose", _viewed)


@names("samples-mixed")
def batch_first_and_transposed() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x.transpose(0, 1))[0][-1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("samples-mixed")
def layer_norm_over_the_batch() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm((5, 64), elementwise_affine=False), nn.Linear(64, 10))
    return Setup(net, torch.randn(5, 32), cross_entropy(classes(5)))
