"""Mistakes that keep parameters from learning: NK001 to NK003."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from tests.methods.wiring.setups import Setup, TwoLayers, classes, cnn, cross_entropy, mlp, names, two_layers


@names("parameter-without-gradient")
def parameter_never_read() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def list_of_layers_never_read() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def data_of_the_features() -> Setup:
    return two_layers(lambda self, x: x.data)


@names("parameter-without-gradient")
def encoder_under_no_grad() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = mlp(out=16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.encoder(x)
            return self.head(features)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def argmax_between() -> Setup:
    return two_layers(lambda self, x: F.one_hot(x.argmax(-1), 64).float())


@names("parameter-without-gradient")
def scale_as_a_number() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def between(self, x: Tensor) -> Tensor:
            return x * self.scale.item()

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def result_thrown_away() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(64)

        def between(self, x: Tensor) -> Tensor:
            self.norm(x)
            return x

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("gradient-always-zero")
def dead_convolution() -> Setup:
    net = cnn()
    nn.init.constant_(net[1].bias, -20.0)
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@names("gradient-always-zero")
def saturated_sigmoid() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 10))
    nn.init.constant_(net[0].bias, 200.0)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("gradient-always-zero")
def saturated_tanh_in_a_block() -> Setup:
    net = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 10))
    nn.init.constant_(net[0].weight, 1.0)
    return Setup(net, torch.rand(16, 32) + 1, cross_entropy(classes(16)))


@names("gradient-always-zero")
def rounded_features() -> Setup:
    return two_layers(lambda self, x: torch.round(x))


@names("gradient-always-zero")
def softmax_over_one_score() -> Setup:
    net = nn.Sequential(nn.Linear(32, 1), nn.Softmax(dim=1))
    target = torch.rand(16, 1).round()
    return Setup(net, torch.randn(16, 32), lambda output: F.mse_loss(output, target))


@names("gradient-always-zero")
def mask_of_zeros() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.zeros(64))

        def between(self, x: Tensor) -> Tensor:
            return x * self.get_buffer("mask")

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-not-updated")
def learning_rate_zero_in_one_group() -> Setup:
    net = mlp()
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters()}]
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [AdamW(groups, lr=1e-3)])


@names("parameter-not-updated")
def optimizer_of_a_copy() -> Setup:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.1)
    return Setup(copy.deepcopy(net), torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@names("parameter-not-updated")
def head_replaced_after_the_optimizer() -> Setup:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.1)
    net[2] = nn.Linear(64, 10)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@names("gradient-always-zero")
def inverted_padding_mask() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(100, 32), nn.Linear(32, 10)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.table(ids).masked_fill((ids != 0)[..., None], 0.0).mean(1))

    return Setup(Net(), torch.randint(1, 100, (8, 12)), cross_entropy(classes(8)))


@names("gradient-always-zero")
def loss_over_nothing() -> Setup:
    weight = torch.zeros(16)
    target = classes(16)
    return Setup(mlp(), torch.randn(16, 32), lambda output: (F.cross_entropy(output, target, reduction="none") * weight).sum())


@names("parameter-without-gradient")
def custom_function_without_the_weights_gradient() -> Setup:
    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return gradient @ ctx.saved_tensors[0], None

    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(64, 64))

        def between(self, x: Tensor) -> Tensor:
            return Multiply.apply(x, self.weight)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("gradient-always-zero")
def dead_threshold() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.Threshold(0.0, 0.0), nn.Linear(64, 10))
    nn.init.constant_(net[0].bias, -80.0)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("gradient-always-zero")
def dead_gelu() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))
    nn.init.constant_(net[0].bias, -80.0)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-not-updated")
def head_of_another_size_replaced_after_the_optimizer() -> Setup:
    net = mlp(out=1000)
    optimizer = SGD(net.parameters(), lr=0.1)
    net[2] = nn.Linear(64, 10)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@names("parameter-not-updated")
def convolution_with_a_bias_in_the_place_of_one_without() -> Setup:
    net = cnn()
    optimizer = SGD(net.parameters(), lr=0.1)
    net[0] = nn.Conv2d(3, 8, 3, padding=1)
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)), [optimizer])


@names("parameter-without-gradient")
def both_results_of_attention_thrown_away() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 10)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.rnn(x)
            self.attention(states, states, states)
            return self.last(states[:, -1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("parameter-without-gradient")
def loss_made_anew() -> Setup:
    target = classes(16)
    return Setup(mlp(), torch.randn(16, 32), lambda output: torch.tensor(F.cross_entropy(output, target).item(), requires_grad=True))
