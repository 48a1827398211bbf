"""Mistakes in front of a loss: NK009 and NK010."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.wiring.setups import Setup, TwoLayers, classes, cross_entropy, mlp, names


@names("activation-before-loss")
def log_softmax_before_cross_entropy() -> Setup:
    return Setup(nn.Sequential(mlp(), nn.LogSoftmax(-1)), torch.randn(16, 32), cross_entropy(classes(16)))


@names("activation-before-loss")
def softmax_before_segmentation_loss() -> Setup:
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Softmax(1))
    return Setup(net, torch.randn(4, 3, 16, 16), cross_entropy(torch.randint(0, 5, (4, 16, 16))))


@names("activation-before-loss")
def softmax_with_soft_targets() -> Setup:
    target = torch.rand(16, 10).softmax(-1)
    return Setup(nn.Sequential(mlp(), nn.Softmax(-1)), torch.randn(16, 32), cross_entropy(target))


@names("activation-before-loss")
def softmax_before_nll() -> Setup:
    target = classes(16)
    return Setup(nn.Sequential(mlp(), nn.Softmax(-1)), torch.randn(16, 32), lambda output: F.nll_loss(output, target))


@names("activation-before-loss")
def sigmoid_squeezed_before_logits() -> Setup:
    target = torch.rand(16).round()
    net = nn.Sequential(nn.Linear(32, 1), nn.Sigmoid(), nn.Flatten(0))
    return Setup(net, torch.randn(16, 32), lambda output: F.binary_cross_entropy_with_logits(output, target, pos_weight=torch.tensor(2.0)))


@names("loss-broadcasts")
def mse_loss_of_column_and_row() -> Setup:
    target = torch.randn(16)
    return Setup(nn.Linear(32, 1), torch.randn(16, 32), lambda output: torch.nn.functional.mse_loss(output, target))


@names("loss-broadcasts")
def row_output_against_column() -> Setup:
    target = torch.randn(16, 1)
    return Setup(nn.Sequential(nn.Linear(32, 1), nn.Flatten(0)), torch.randn(16, 32), lambda output: (output - target).abs().mean())


@names("loss-broadcasts")
def smooth_l1_of_maps() -> Setup:
    target = torch.randn(4, 16, 16)
    return Setup(nn.Conv2d(3, 1, 3, padding=1), torch.randn(4, 3, 16, 16), lambda output: F.smooth_l1_loss(output, target))


@names("loss-broadcasts")
def advantage_times_log_probability() -> Setup:
    action, advantage = classes(16), torch.randn(16, 1)

    def loss(output: Tensor) -> Tensor:
        log_probability = output.log_softmax(-1).gather(1, action[:, None]).squeeze(1)
        return -(log_probability * advantage).mean()

    return Setup(mlp(), torch.randn(16, 32), loss)


@names("activation-before-loss")
def clamped_softmax_before_cross_entropy() -> Setup:
    class Net(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1).clamp(1e-7, 1 - 1e-7)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("activation-before-loss")
def policy_of_probabilities_as_scores() -> Setup:
    action, advantage = classes(16, 4), torch.randn(16)

    def loss(output: Tensor) -> Tensor:
        return -(torch.distributions.Categorical(logits=output).log_prob(action) * advantage).mean()

    return Setup(nn.Sequential(mlp(out=4), nn.Softmax(-1)), torch.randn(16, 32), loss)


@names("loss-broadcasts")
def quantile_loss_of_column_and_row() -> Setup:
    target = torch.randn(16)
    return Setup(mlp(out=1), torch.randn(16, 32), lambda output: torch.max(0.9 * (target - output), -0.1 * (target - output)).mean())
