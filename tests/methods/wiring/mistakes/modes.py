"""Mistakes of training and eval mode, and of norms: NK005 to NK008."""

from __future__ import annotations

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
