"""Modes that are meant, and norms with enough values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit import Loaders
from tests.methods.wiring.clean.gradients import LoRA
from tests.methods.wiring.setups import Setup, classes, clean, cnn, cross_entropy, mlp


@clean
def frozen_encoder_in_eval_mode() -> Setup:
    net = cnn()
    net[:3].requires_grad_(False).eval()
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@clean
def norms_alone_in_eval_mode() -> Setup:
    net = cnn()
    net[1].eval()
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@clean
def adapters_before_a_frozen_norm() -> Setup:
    net = nn.Sequential(LoRA(nn.Linear(32, 64)), nn.BatchNorm1d(64), nn.ReLU(), LoRA(nn.Linear(64, 10)))
    net[1].requires_grad_(False)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


class Student(nn.Module):
    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.student = cnn(out=16)
        self.teacher = copy.deepcopy(self.student).requires_grad_(not frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x + 0.1 * torch.ones_like(x)), wanted


@clean
def frozen_teacher_in_training_mode() -> Setup:
    return Setup(Student(frozen=True), torch.randn(8, 3, 16, 16), lambda output: F.mse_loss(*output))


@clean
def teacher_under_no_grad_alone() -> Setup:
    return Setup(Student(frozen=False), torch.randn(8, 3, 16, 16), lambda output: F.mse_loss(*output))


@clean
def latent_that_is_sampled() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(32, 16), nn.Linear(8, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_variance = self.encoder(x).chunk(2, -1)
            return self.decoder(mean + torch.randn_like(mean) * (0.5 * log_variance).exp()), mean, log_variance

    x = torch.randn(16, 32)

    def loss(output: Any) -> Tensor:
        rebuilt, mean, log_variance = output
        return F.mse_loss(rebuilt, x) + 0.0 * (mean.square() + log_variance.exp() - log_variance - 1).mean()

    return Setup(Net(), x, loss)


@clean
def loader_without_a_last_batch_of_one() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    data = TensorDataset(torch.randn(33, 32), classes(33))
    loaders = Loaders(DataLoader(data, batch_size=16, drop_last=True), None)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), loaders=loaders)


class Noisy(nn.Module):
    """Features that something random happens to, as it is meant."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.change = nn.Linear(32, 64), nn.Linear(64, 10), change
        self.token = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self, torch.relu(self.first(x))) + 0 * self.token)


def _noisy(name: str, change: Callable[[Noisy, Tensor], Tensor]) -> None:
    def build() -> Setup:
        return Setup(Noisy(change), torch.randn(16, 32), cross_entropy(classes(16)))

    build.__name__ = f"random_{name}"
    clean(build)


def _with_tokens(net: Noisy, x: Tensor) -> Tensor:
    mask = (torch.rand(x.shape[0], 1) < 0.4).float()
    return x * (1 - mask) + net.token * mask


_noisy("noise", lambda net, x: x + 0.1 * torch.randn_like(x))
_noisy("units_by_their_own_chance", lambda net, x: torch.bernoulli(x.detach().sigmoid()) * x)
_noisy("gates_by_the_data", lambda net, x: x * (torch.rand_like(x) < x.sigmoid()))
_noisy("scale", lambda net, x: x * (0.5 + torch.rand(x.shape[0], 1)))
_noisy("mask_that_keeps_all", lambda net, x: x * (torch.rand_like(x) < 1.0))
_noisy("bernoulli_that_keeps_all", lambda net, x: x * torch.bernoulli(torch.ones_like(x)))
_noisy("tokens", _with_tokens)
_noisy("mask_in_training_alone", lambda net, x: x * (torch.rand_like(x) > 0.1) / 0.9 if net.training else x)


@clean
def reconstruction_of_what_a_mask_hides() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decode = nn.Linear(32, 64), mlp(64, 64, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = (torch.rand(x.shape[0], 64) < 0.75).float()
            return self.decode(self.embed(x) * (1 - hidden)), hidden

    x = torch.randn(16, 32)
    return Setup(Net(), x, lambda output: ((output[0] - x).square().mean(1) * output[1].mean(1)).mean())
