"""Mistakes in front of a loss: NK009 and NK010."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def _divergence(activation: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor], **options: Any) -> Setup:
    scores = torch.randn(16, 10)
    return Setup(mlp(), torch.randn(16, 32), lambda output: F.kl_div(activation(output), target(scores), **options))


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _log_softmax(scores: Tensor) -> Tensor:
    return scores.log_softmax(-1)


@names("activation-before-loss")
def kl_div_of_probabilities() -> Setup:
    return _divergence(_softmax, _softmax, reduction="batchmean")


@names("activation-before-loss")
def kl_div_of_scores() -> Setup:
    return _divergence(lambda scores: scores, _softmax, reduction="sum")


@names("activation-before-loss")
def kl_div_with_scores_as_target() -> Setup:
    return _divergence(_log_softmax, lambda scores: scores, reduction="batchmean")


@names("activation-before-loss")
def kl_div_with_logarithms_as_target() -> Setup:
    return _divergence(_log_softmax, _log_softmax, reduction="batchmean")


@names("activation-before-loss")
def kl_div_with_log_target_of_probabilities() -> Setup:
    return _divergence(_log_softmax, _softmax, reduction="batchmean", log_target=True)


@names("activation-before-loss")
def kl_div_of_probabilities_against_logarithms() -> Setup:
    return _divergence(_softmax, _log_softmax, reduction="batchmean", log_target=True)


@names("activation-before-loss")
def kl_div_of_maps_of_probabilities() -> Setup:
    target = torch.randn(4, 6, 8, 8).softmax(1)
    return Setup(
        nn.Conv2d(3, 6, 1), torch.randn(4, 3, 8, 8), lambda output: F.kl_div(output.softmax(1), target, reduction="none").sum(1).mean()
    )


@names("activation-before-loss")
def mutual_kl_div_of_probabilities() -> Setup:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(), mlp()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        return nn.KLDivLoss(reduction="batchmean")(output[0].softmax(-1), output[1].softmax(-1))

    return Setup(Pair(), torch.randn(16, 32), loss)
