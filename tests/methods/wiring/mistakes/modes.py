"""Mistakes of training and eval mode, and of norms: NK005 to NK008."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit import Loaders
from tests.methods.wiring.setups import Setup, classes, cnn, cross_entropy, names, two_layers


@names("module-in-eval-mode")
def trained_in_eval_mode() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)).eval()
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("module-in-eval-mode")
def encoder_trained_in_eval_mode() -> Setup:
    net = nn.Sequential(cnn(out=16), nn.Linear(16, 10))
    net[0].eval()
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@names("dropout-active-in-evaluation")
def attention_dropout_always() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.last = nn.Linear(32, 96), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.last(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).mean(1))

    return Setup(Net(), torch.randn(8, 6, 32), cross_entropy(classes(8)))


@names("dropout-active-in-evaluation")
def dropout_kept_in_training_mode() -> Setup:
    class Always(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, self.p, training=True)

    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), Always(0.2), nn.Linear(64, 10))
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("statistics-of-frozen-norm")
def frozen_backbone_in_training_mode() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(8, 10)
            self.backbone.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.backbone(x)
            return self.head(features)

    return Setup(Net(), torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@names("norm-of-one-value")
def last_batch_of_one() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    data = TensorDataset(torch.randn(33, 32), classes(33))
    loaders = Loaders(DataLoader(data, batch_size=16), None)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), loaders=loaders)


@names("norm-of-one-value")
def layer_norm_of_one_feature() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1), nn.LayerNorm(1))
    target = torch.randn(16, 1)
    return Setup(net, torch.randn(16, 32), lambda output: F.mse_loss(output, target))


@names("module-in-eval-mode")
def recurrent_dropout_in_eval_mode() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32, 2, batch_first=True, dropout=0.3), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0][:, -1])

    return Setup(Net().eval(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("module-in-eval-mode")
def functional_dropout_in_eval_mode() -> Setup:
    setup = two_layers(lambda self, x: F.dropout(x, 0.2, self.training))
    setup.model.eval()
    return setup


class Masked(nn.Module):
    """Features with a mask on them, also in eval mode."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.mask = nn.Linear(32, 64), nn.Linear(64, 10), mask

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mask(torch.relu(self.first(x))))


def _with_zeros(x: Tensor) -> Tensor:
    x = x.clone()
    x[torch.rand(x.shape) < 0.2] = 0
    return x


def _masked(name: str, mask: Callable[[Tensor], Tensor]) -> None:
    def build() -> Setup:
        return Setup(Masked(mask), torch.randn(16, 32), cross_entropy(classes(16)))

    build.__name__ = f"dropout_by_hand_{name}"
    names("dropout-active-in-evaluation")(build)


_masked("compared", lambda x: x * (torch.rand_like(x) > 0.3).float() / 0.7)
_masked("bernoulli", lambda x: x * torch.bernoulli(torch.full_like(x, 0.8)) / 0.8)
_masked("in_place", lambda x: x * x.new_empty(x.shape[0], 1).bernoulli_(0.9).div_(0.9))
_masked("floor", lambda x: x.div(0.9) * (0.9 + torch.rand(x.shape[0], 1)).floor_())
_masked("inverted", lambda x: (1 - (torch.rand(x.shape) < 0.1).to(x.dtype)) * x)
_masked("filled", lambda x: x.masked_fill(torch.rand(x.shape) < 0.2, 0.0))
_masked("chosen", lambda x: torch.where(torch.rand_like(x) < 0.8, x / 0.8, 0.0))
_masked("set_to_zero", _with_zeros)


@names("dropout-active-in-evaluation")
def stochastic_depth_by_hand() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch, self.last = nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            keep = torch.rand(x.shape[0], device=x.device) < 0.8
            return self.last(x + self.branch(x) * keep[:, None] / 0.8)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))
