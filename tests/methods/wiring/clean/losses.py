"""Losses that look like a mistake and are none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.wiring.setups import Setup, classes, clean, cross_entropy, mlp


@clean
def pairwise_ranking() -> Setup:
    target = torch.randn(16)

    def loss(output: Tensor) -> Tensor:
        score = output.squeeze(1)
        return F.softplus(-(score[:, None] - score[None, :]) * (target[:, None] - target[None, :]).sign()).mean()

    return Setup(nn.Linear(32, 1), torch.randn(16, 32), loss)


@clean
def products_and_differences_with_numbers() -> Setup:
    """As torch's own C++ code calls them, with one edge in the graph instead of two."""
    target = torch.randn(16)

    def loss(output: Tensor) -> Tensor:
        halved = torch.ops.aten.mul.Scalar(F.softmax(output, 1), 0.5)
        entropy = torch.ops.aten.sub.Scalar(halved * halved.log(), 1.0)
        return (entropy - torch.ops.aten.mul.Scalar(output, 0.1)).sum() + (output[:, 0] - target).square().mean()

    return Setup(nn.Linear(32, 4), torch.randn(16, 32), loss)


@clean
def quantiles_broadcast_on_purpose() -> Setup:
    levels, target = torch.tensor([0.1, 0.5, 0.9]), torch.randn(16, 1)

    def loss(output: Tensor) -> Tensor:
        error = target - output
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    return Setup(nn.Linear(32, 1), torch.randn(16, 32), loss)


@clean
def contrastive_similarities() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text, self.scale = mlp(out=16), mlp(8, 32, 16), nn.Parameter(torch.tensor(2.0))

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            return self.scale.exp() * F.normalize(self.image(image)) @ F.normalize(self.text(text)).T

    target = torch.arange(8)
    return Setup(Net(), (torch.randn(8, 32), torch.randn(8, 8)), lambda s: (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2)


@clean
def focal_loss_by_hand() -> Setup:
    target = torch.rand(16, 1).round()

    def loss(output: Tensor) -> Tensor:
        p = torch.sigmoid(output)
        share = p * target + (1 - p) * (1 - target)
        return ((1 - share) ** 2 * F.binary_cross_entropy_with_logits(output, target, reduction="none")).mean()

    return Setup(nn.Linear(32, 1), torch.randn(16, 32), loss)


@clean
def softmax_attention_before_cross_entropy() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention(x, x, x)[0].mean(1))

    return Setup(Net(), torch.randn(8, 6, 32), cross_entropy(classes(8)))


@clean
def distillation() -> Setup:
    teacher = torch.randn(16, 10)
    target = classes(16)

    def loss(output: Tensor) -> Tensor:
        soft = F.kl_div(F.log_softmax(output / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean")
        return soft + F.cross_entropy(output, target)

    return Setup(mlp(), torch.randn(16, 32), loss)


@clean
def a_mixture_of_densities() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.share, self.mean, self.spread = nn.Linear(32, 16), nn.Linear(16, 5), nn.Linear(16, 5), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.body(x).tanh()
            return self.share(x).log_softmax(-1), self.mean(x), self.spread(x)

    target = torch.randn(16, 1)

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        share, mean, spread = output
        return -torch.logsumexp(share - 0.5 * ((target - mean) / spread.exp()) ** 2 - spread, -1).mean()

    return Setup(Net(), torch.randn(16, 32), loss)


def _teacher() -> Tensor:
    return torch.randn(16, 10)


@clean
def kl_div_with_log_target() -> Setup:
    target = _teacher().log_softmax(-1)
    return Setup(
        mlp(), torch.randn(16, 32), lambda output: F.kl_div(output.log_softmax(-1), target, reduction="batchmean", log_target=True)
    )


@clean
def kl_div_of_logarithms_by_hand() -> Setup:
    target = _teacher().softmax(-1)
    return Setup(mlp(), torch.randn(16, 32), lambda output: F.kl_div((output.softmax(-1) + 1e-8).log(), target, reduction="batchmean"))


@clean
def divergence_by_hand() -> Setup:
    target = _teacher().softmax(-1)

    def loss(output: Tensor) -> Tensor:
        return (target * target.log() - target * output.log_softmax(-1)).sum(-1).mean()

    return Setup(mlp(), torch.randn(16, 32), loss)


@clean
def divergence_of_scores_and_their_normalizer() -> Setup:
    target = _teacher().softmax(-1)

    def loss(output: Tensor) -> Tensor:
        return ((target * target.log() - target * output).sum(-1) + output.logsumexp(-1)).mean()

    return Setup(mlp(), torch.randn(16, 32), loss)


@clean
def overlap_of_probabilities() -> Setup:
    target = F.one_hot(classes(16), 10).float()
    return Setup(mlp(), torch.randn(16, 32), lambda output: 1 - (target * output.softmax(-1)).sum(-1).mean())


@clean
def brier_score() -> Setup:
    target = F.one_hot(classes(16), 10).float()
    return Setup(mlp(), torch.randn(16, 32), lambda output: (target - output.softmax(-1)).square().sum(-1).mean())


@clean
def mutual_divergence() -> Setup:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(), mlp()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        return F.kl_div(output[0].log_softmax(-1), output[1].softmax(-1), reduction="batchmean")

    return Setup(Pair(), torch.randn(16, 32), loss)
