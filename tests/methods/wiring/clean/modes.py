"""Modes that are meant, and norms with enough values."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit import Loaders
from tests.methods.wiring.clean.gradients import LoRA
from tests.methods.wiring.setups import Setup, classes, clean, cnn, cross_entropy


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
