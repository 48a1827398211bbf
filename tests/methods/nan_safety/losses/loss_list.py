"""Losses as people write them, each with ordinary arguments and with arguments that try to break it. Nothing here says which break."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Make = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A loss; `free` are the arguments that need a gradient, `trials` arguments that may break it."""

    loss: Callable[..., Tensor]
    example: Make
    trials: Sequence[Make]
    free: tuple[int, ...] = (0,)


CASES: dict[str, Case] = {}


def rand(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    seed = sum((position + 1) * size for position, size in enumerate(shape)) + int(1000 * high)
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def add(name: str, loss: Callable[..., Tensor], example: Make, *trials: Make, free: tuple[int, ...] = (0,)) -> None:
    assert name not in CASES, name
    CASES[name] = Case(loss, example, trials, free)


def full(value: float, *shape: int) -> Tensor:
    return torch.full(shape, float(value))


Z, O = torch.zeros, torch.ones  # noqa: E741


def pair() -> tuple[Tensor, ...]:
    return rand(4, 6), rand(4, 6, high=0.9)


def equal() -> tuple[Tensor, ...]:
    return rand(4, 6), rand(4, 6)


def far() -> tuple[Tensor, ...]:
    return 200 * rand(4, 6), rand(4, 6)


TWO = (equal, far, lambda: (Z(4, 6), Z(4, 6)), lambda: (O(4, 6), rand(4, 6)))

# Errors and roots of them.
add("rmse", lambda p, t: F.mse_loss(p, t).sqrt(), pair, *TWO)
add("rmse with epsilon", lambda p, t: (F.mse_loss(p, t) + 1e-8).sqrt(), pair, *TWO)
add("rmse by norm", lambda p, t: torch.linalg.vector_norm(p - t) / 24**0.5, pair, *TWO)
add("charbonnier", lambda p, t: ((p - t) ** 2 + 1e-6).sqrt().mean(), pair, *TWO)
add("mean root error", lambda p, t: (p - t).abs().sqrt().mean(), pair, *TWO)
add("mean root error, clamped", lambda p, t: (p - t).abs().clamp_min(1e-6).sqrt().mean(), pair, *TWO)
add("power 0.9 of the error", lambda p, t: ((p - t).abs() ** 0.9).mean(), pair, *TWO)
add("power 1.5 of the error", lambda p, t: ((p - t).abs() ** 1.5).mean(), pair, *TWO)
add("log of the mse", lambda p, t: F.mse_loss(p, t).log(), pair, *TWO)
add("psnr", lambda p, t: -10 * torch.log10(1 / F.mse_loss(p, t)), pair, *TWO)
add("psnr with epsilon", lambda p, t: -10 * torch.log10(1 / (F.mse_loss(p, t) + 1e-8)), pair, *TWO)
add("log cosh by hand", lambda p, t: torch.log(torch.cosh(p - t)).mean(), pair, *TWO)
add("log cosh, stable", lambda p, t: (p - t + F.softplus(-2 * (p - t)) - math.log(2)).mean(), pair, *TWO)
add("mape", lambda p, t: ((p - t) / t).abs().mean(), pair, lambda: (rand(4, 6), Z(4, 6)), *TWO[:2])
add("mape with epsilon", lambda p, t: ((p - t).abs() / t.abs().clamp_min(1e-6)).mean(), pair, lambda: (rand(4, 6), Z(4, 6)))
add("smape", lambda p, t: ((p - t).abs() / (p.abs() + t.abs())).mean(), pair, *TWO)
add("smape with epsilon", lambda p, t: ((p - t).abs() / (p.abs() + t.abs() + 1e-6)).mean(), pair, *TWO)
add("relative error by norms", lambda p, t: (p - t).norm() / t.norm(), pair, lambda: (rand(4, 6), Z(4, 6)))
add("cauchy", lambda p, t: torch.log(1 + (p - t) ** 2).mean(), pair, *TWO)
add("wing", lambda p, t: torch.log1p((p - t).abs() / 0.5).mean(), pair, *TWO)
add("huber", F.huber_loss, pair, *TWO)
add("smooth l1", F.smooth_l1_loss, pair, *TWO)
add("log error", lambda p, t: (p.log() - t.abs().log()).abs().mean(), lambda: (rand(4, 6, low=0.1), pair()[1]), pair)
add(
    "msle",
    lambda p, t: (torch.log1p(p) - torch.log1p(t.abs())).square().mean(),
    lambda: (rand(4, 6, low=0.1), pair()[1]),
    lambda: (full(-1, 4, 6), pair()[1]),
)
add(
    "msle of relu",
    lambda p, t: (torch.log1p(F.relu(p)) - torch.log1p(t.abs())).square().mean(),
    pair,
    *TWO,
    lambda: (full(-1, 4, 6), rand(4, 6)),
)
add("integer factor under the root", lambda p, t: torch.sqrt(4 * (p - t) ** 2).sum(), pair, *TWO)
add("per pixel root over channels", lambda x: (x**2).sum(1).sqrt().mean(), lambda: (rand(2, 3, 4, 4),), lambda: (Z(2, 3, 4, 4),))
add("per pixel norm over channels", lambda x: x.norm(dim=1).mean(), lambda: (rand(2, 3, 4, 4),), lambda: (Z(2, 3, 4, 4),))
IMAGE = (lambda: (Z(2, 3, 8, 8),), lambda: (O(2, 3, 8, 8),), lambda: (200 * rand(2, 3, 8, 8),))


def image() -> tuple[Tensor, ...]:
    return (rand(2, 3, 8, 8),)


def total_variation(x: Tensor, epsilon: float = 0.0) -> Tensor:
    return ((x[..., 1:, :-1] - x[..., :-1, :-1]) ** 2 + (x[..., :-1, 1:] - x[..., :-1, :-1]) ** 2 + epsilon).sqrt().mean()


add("isotropic total variation", total_variation, image, *IMAGE)
add("isotropic total variation with epsilon", lambda x: total_variation(x, 1e-8), image, *IMAGE)
add("anisotropic total variation", lambda x: x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean(), image, *IMAGE)
add(
    "gradient magnitude by hypot",
    lambda x: torch.hypot(x[..., 1:, 1:] - x[..., 1:, :-1], x[..., 1:, 1:] - x[..., :-1, 1:]).mean(),
    image,
    *IMAGE,
)
add("gram matrix style", lambda x: torch.einsum("nchw,ndhw->ncd", x, x).div(192).square().mean(), image, *IMAGE)
add("frequency amplitude", lambda x: torch.fft.rfft2(x).abs().mean(), image, *IMAGE)
add("log of the frequency amplitude", lambda x: torch.fft.rfft2(x).abs().log().mean(), image, *IMAGE)
add("contrast by std", lambda x: -x.std(dim=(2, 3)).mean(), image, *IMAGE)
add("contrast by root of var", lambda x: -x.var(dim=(2, 3)).sqrt().mean(), image, *IMAGE)
add("normalized by its largest value", lambda x: (x / x.amax(dim=(2, 3), keepdim=True)).mean(), image, *IMAGE)


def ssim(x: Tensor, y: Tensor, c: float) -> Tensor:
    mx, my = F.avg_pool2d(x, 3), F.avg_pool2d(y, 3)
    vx, vy = F.avg_pool2d(x * x, 3) - mx * mx, F.avg_pool2d(y * y, 3) - my * my
    return 1 - ((2 * mx * my + c) * (2 * (F.avg_pool2d(x * y, 3) - mx * my) + c) / ((mx**2 + my**2 + c) * (vx + vy + c))).mean()


IMAGES = (lambda: (Z(2, 1, 6, 6), Z(2, 1, 6, 6)), lambda: (O(2, 1, 6, 6), O(2, 1, 6, 6)))
add("ssim without constants", lambda x, y: ssim(x, y, 0.0), lambda: (rand(2, 1, 6, 6, low=0), rand(2, 1, 6, 6, low=0, high=0.9)), *IMAGES)
add("ssim", lambda x, y: ssim(x.sigmoid(), y, 1e-2), lambda: (rand(2, 1, 6, 6, low=0), rand(2, 1, 6, 6, low=0, high=0.9)), *IMAGES)

# Embeddings.
EMBED = (lambda: (Z(6, 8), Z(6, 8)), lambda: (rand(6, 8), rand(6, 8)), lambda: (O(6, 8), O(6, 8)), lambda: (1e3 * rand(6, 8), rand(6, 8)))


def vectors() -> tuple[Tensor, ...]:
    return rand(6, 8), rand(6, 8, high=0.8)


add("normalize by hand", lambda a, b: (a / a.norm(dim=1, keepdim=True) * b).sum(), vectors, *EMBED)
add("F.normalize", lambda a, b: (F.normalize(a, dim=1) * b).sum(), vectors, *EMBED)
add("cosine by hand", lambda a, b: 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean(), vectors, *EMBED)
add("cosine by hand with epsilon", lambda a, b: 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean(), vectors, *EMBED)
add("F.cosine_similarity", lambda a, b: 1 - F.cosine_similarity(a, b).mean(), vectors, *EMBED)
add("triplet by roots", lambda a, b: F.relu((a - b).pow(2).sum(1).sqrt() - 0.1).mean(), vectors, *EMBED)
add("triplet margin", lambda a, b: F.triplet_margin_loss(a, b, b.flip(0)), vectors, *EMBED)
add("contrastive margin", lambda a, b: F.relu(1 - (a - b).norm(dim=1)).square().mean(), vectors, *EMBED)
add("contrastive margin by roots", lambda a, b: F.relu(1 - ((a - b) ** 2).sum(1).sqrt()).square().mean(), vectors, *EMBED)
add("inverse distance", lambda a, b: (1 / (a - b).norm(dim=1)).mean(), vectors, *EMBED)
add("inverse distance plus one", lambda a, b: (1 / (1 + (a - b).norm(dim=1))).mean(), vectors, *EMBED)
add("student t kernel", lambda a, b: (1 / (1 + torch.cdist(a, b) ** 2)).log().mean(), vectors, *EMBED)
add("gaussian kernel", lambda a, b: torch.exp(-(torch.cdist(a, b) ** 2)).mean(), vectors, *EMBED)
add("log of a gaussian kernel", lambda a, b: torch.exp(-((a - b) ** 2).sum(1)).log().mean(), vectors, *EMBED)
add("uniformity", lambda a, b: torch.pdist(F.normalize(a, dim=1)).pow(2).mul(-2).exp().mean().log(), vectors, *EMBED)
add("infonce by exp", lambda a, b: -torch.log(torch.exp((a * b).sum(1) / 0.07) / torch.exp(a @ b.T / 0.07).sum(1)).mean(), vectors, *EMBED)
add("infonce by cross entropy", lambda a, b: F.cross_entropy(a @ b.T / 0.07, torch.arange(len(a))), vectors, *EMBED)
add(
    "barlow twins",
    lambda a, b: (((a - a.mean(0)) / a.std(0)).T @ ((b - b.mean(0)) / b.std(0)) / 6 - torch.eye(8)).square().sum(),
    vectors,
    *EMBED,
)
add("barlow twins with epsilon", lambda a, b: (((a - a.mean(0)) / (a.std(0, correction=0) + 1e-4)).T @ b).square().mean(), vectors, *EMBED)
add("pearson", lambda a, b: 1 - ((a - a.mean()) * (b - b.mean())).sum() / ((a - a.mean()).norm() * (b - b.mean()).norm()), vectors, *EMBED)
add(
    "concordance",
    lambda a, b: 1 - 2 * ((a - a.mean()) * (b - b.mean())).mean() / (a.var() + b.var() + (a.mean() - b.mean()) ** 2 + 1e-8),
    vectors,
    *EMBED,
)
add("r squared", lambda a, b: (a - b).square().sum() / (b - b.mean()).square().sum(), vectors, lambda: (rand(6, 8), O(6, 8)))
add("signal to noise", lambda a, b: -10 * torch.log10(b.square().sum() / (a - b).square().sum()), vectors, lambda: (rand(6, 8), rand(6, 8)))
add("geodesic angle", lambda a, b: torch.acos((F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)).mean(), vectors, *EMBED)
add(
    "geodesic angle by atan2",
    lambda a, b: torch.atan2((a[:, :3].cross(b[:, :3], 1)).norm(dim=1), (a * b)[:, :3].sum(1)).mean(),
    vectors,
    *EMBED,
)
add(
    "angle by asin of half the chord",
    lambda a, b: torch.asin((F.normalize(a, dim=1) - F.normalize(b, dim=1)).norm(dim=1) / 2).mean(),
    vectors,
    lambda: (rand(6, 8), -rand(6, 8)),
)
add("sine from the cosine", lambda a, b: torch.sqrt(1 - F.cosine_similarity(a, b) ** 2).mean(), vectors, *EMBED)
add(
    "poincare",
    lambda a, b: torch.acosh(1 + 2 * (a - b).square().sum(1) / ((1 - a.square().sum(1)) * (1 - b.square().sum(1)))).mean(),
    lambda: (rand(6, 8) / 5, rand(6, 8, high=0.8) / 5),
    lambda: (rand(6, 8) / 5, rand(6, 8) / 5),
)
add("covariance log determinant", lambda a, b: -torch.logdet(a.T @ a), lambda: (rand(12, 4), rand(12, 4)), lambda: (Z(12, 4), Z(12, 4)))
add(
    "covariance log determinant, shifted",
    lambda a, b: -torch.logdet(a.T @ a + torch.eye(4)),
    lambda: (rand(12, 4), rand(12, 4)),
    lambda: (Z(12, 4), Z(12, 4)),
)
add("inverse covariance", lambda a, b: torch.linalg.inv(a.T @ a).trace(), lambda: (rand(12, 4), rand(12, 4)), lambda: (Z(12, 4), Z(12, 4)))
add("eigenvectors", lambda a, b: torch.linalg.eigh(a.T @ a)[1].sum(), lambda: (rand(12, 4), rand(12, 4)), lambda: (Z(12, 4), Z(12, 4)))
add(
    "eigenvalues",
    lambda a, b: torch.linalg.eigvalsh(a.T @ a).square().sum(),
    lambda: (rand(12, 4), rand(12, 4)),
    lambda: (Z(12, 4), Z(12, 4)),
)
add("cdist with p=1", lambda a, b: torch.cdist(a, b, p=1).mean(), vectors, *EMBED)


def supervised_contrastive(a: Tensor, labels: Tensor, guard: int) -> Tensor:
    same = (labels[:, None] == labels[None]) & ~torch.eye(len(labels), dtype=torch.bool)
    log_p = F.log_softmax(F.normalize(a, dim=1) @ F.normalize(a, dim=1).T / 0.1, 1)
    count = same.sum(1).clamp_min(guard)
    return -((log_p * same).sum(1) / count).mean()


def classed() -> tuple[Tensor, ...]:
    return rand(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])


add(
    "supervised contrastive",
    lambda a, y: supervised_contrastive(a, y, 0),
    classed,
    lambda: (rand(6, 8), torch.arange(6)),
    lambda: (rand(1, 8), torch.tensor([0])),
)
add("supervised contrastive, guarded", lambda a, y: supervised_contrastive(a, y, 1), classed, lambda: (rand(6, 8), torch.arange(6)))

# Logits.
LABELS = torch.tensor([0, 1, 2, 3])
SURE = (
    lambda: (500 * rand(4, 5), LABELS),
    lambda: (Z(4, 5), LABELS),
    lambda: (full(-300, 4, 5), LABELS),
    lambda: (full(300, 4, 5), LABELS),
)


def logits() -> tuple[Tensor, ...]:
    return 3 * rand(4, 5), LABELS


def picked(p: Tensor, y: Tensor) -> Tensor:
    return p.gather(1, y[:, None])[:, 0]


add("nll of log of softmax", lambda z, y: -picked(z.softmax(1), y).log().mean(), logits, *SURE)
add("nll of log of softmax with epsilon", lambda z, y: -(picked(z.softmax(1), y) + 1e-8).log().mean(), logits, *SURE)
add("nll of log_softmax", lambda z, y: -picked(z.log_softmax(1), y).mean(), logits, *SURE)
add("focal by softmax", lambda z, y: (-((1 - picked(z.softmax(1), y)) ** 2) * picked(z.softmax(1), y).log()).mean(), logits, *SURE)
add(
    "focal by log_softmax",
    lambda z, y: (-((1 - picked(z.log_softmax(1), y).exp()) ** 2) * picked(z.log_softmax(1), y)).mean(),
    logits,
    *SURE,
)
add(
    "focal with gamma 0.5",
    lambda z, y: (-((1 - picked(z.log_softmax(1), y).exp()) ** 0.5) * picked(z.log_softmax(1), y)).mean(),
    logits,
    *SURE,
)
add("poly loss", lambda z, y: (-picked(z.log_softmax(1), y) + 1 - picked(z.softmax(1), y)).mean(), logits, *SURE)
add("generalized cross entropy", lambda z, y: ((1 - picked(z.softmax(1), y) ** 0.7) / 0.7).mean(), logits, *SURE)
add("generalized cross entropy, clamped", lambda z, y: ((1 - picked(z.softmax(1), y).clamp_min(1e-6) ** 0.7) / 0.7).mean(), logits, *SURE)
add("symmetric cross entropy", lambda z, y: -(z.softmax(1) * F.one_hot(y, 5).float().clamp_min(1e-4).log()).sum(1).mean(), logits, *SURE)
add("exp over sum", lambda z, y: 1 - picked(z.exp() / z.exp().sum(1, keepdim=True), y).mean(), logits, *SURE)
add(
    "exp over sum, shifted",
    lambda z, y: 1 - picked(torch.exp(z - z.amax(1, keepdim=True)) / torch.exp(z - z.amax(1, keepdim=True)).sum(1, keepdim=True), y).mean(),
    logits,
    *SURE,
)
add("log of sum of exp by hand", lambda z, y: (z.exp().sum(1).log() - picked(z, y)).mean(), logits, *SURE)
add("logsumexp", lambda z, y: (z.logsumexp(1) - picked(z, y)).mean(), logits, *SURE)
add("entropy by log of p", lambda z, y: -(z.softmax(1) * z.softmax(1).log()).sum(1).mean(), logits, *SURE)
add("entropy by Categorical", lambda z, y: torch.distributions.Categorical(logits=z).entropy().mean(), logits, *SURE)
add("entropy by special.entr", lambda z, y: torch.special.entr(z.softmax(1)).sum(1).mean(), logits, *SURE)
add("entropy of the mean prediction", lambda z, y: (z.softmax(1).mean(0) * (z.softmax(1).mean(0) + 1e-6).log()).sum(), logits, *SURE)
add("temperature made by the network", lambda z, y: F.cross_entropy(z[:, :4] / z[:, 4:], y), logits, *SURE)
add("temperature by softplus", lambda z, y: F.cross_entropy(z[:, :4] / F.softplus(z[:, 4:]), y), logits, *SURE)
add("temperature by softplus and a floor", lambda z, y: F.cross_entropy(z[:, :4] / (F.softplus(z[:, 4:]) + 0.1), y), logits, *SURE)
add("margin by relu", lambda z, y: F.relu(1 - picked(z, y)[:, None] + z).mean(), logits, *SURE)
add("multi margin", F.multi_margin_loss, logits, *SURE)
add("odds", lambda z, y: (picked(z.softmax(1), y) / (1 - picked(z.softmax(1), y))).log().mean(), logits, *SURE)
add("inverse probability weights", lambda z, y: (1 / picked(z.softmax(1), y)).mean(), logits, *SURE)
add(
    "weights from counts",
    lambda z, y: F.cross_entropy(z, y, weight=len(y) / torch.bincount(y, minlength=5)),
    lambda: (rand(5, 5), torch.arange(5)),
    lambda: (rand(5, 5), torch.zeros(5, dtype=torch.long)),
)
add(
    "weights from counts plus one",
    lambda z, y: F.cross_entropy(z, y, weight=len(y) / (1.0 + torch.bincount(y, minlength=5)), reduction="sum"),
    lambda: (rand(5, 5), torch.arange(5)),
    lambda: (rand(5, 5), torch.zeros(5, dtype=torch.long)),
)
add(
    "loss of one class by selection",
    lambda z, y: F.cross_entropy(z[y == 1], y[y == 1]),
    logits,
    lambda: (rand(4, 5), torch.zeros(4, dtype=torch.long)),
)
add(
    "ignored labels by hand",
    lambda z, y: (F.cross_entropy(z, y.clamp_min(0), reduction="none") * (y >= 0)).sum() / (y >= 0).sum(),
    lambda: (rand(4, 5), torch.tensor([0, 1, -1, 2])),
    lambda: (rand(4, 5), torch.full((4,), -1)),
)
add(
    "ignored labels by hand, guarded",
    lambda z, y: (F.cross_entropy(z, y.clamp_min(0), reduction="none") * (y >= 0)).sum() / (y >= 0).sum().clamp_min(1),
    lambda: (rand(4, 5), torch.tensor([0, 1, -1, 2])),
    lambda: (rand(4, 5), torch.full((4,), -1)),
)
add(
    "void pixels",
    lambda z, y: F.cross_entropy(z, y, ignore_index=255),
    lambda: (rand(2, 5, 4, 4), torch.arange(32).view(2, 4, 4) % 5),
    lambda: (rand(2, 5, 4, 4), torch.full((2, 4, 4), 255)),
)
add(
    "kl of softmaxes by hand",
    lambda a, b: (a.softmax(1) * (a.softmax(1) / b.softmax(1)).log()).sum(),
    lambda: (rand(4, 5), rand(4, 5, high=3)),
    lambda: (500 * rand(4, 5), 500 * rand(4, 5, high=3)),
    free=(0, 1),
)
add(
    "kl by log_softmax",
    lambda a, b: F.kl_div(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean"),
    lambda: (rand(4, 5), rand(4, 5, high=3)),
    lambda: (500 * rand(4, 5), 500 * rand(4, 5, high=3)),
    free=(0, 1),
)


def jensen_shannon(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    p, q = a.softmax(1), b.softmax(1)
    m = (p + q) / 2
    return (p * ((p + epsilon) / (m + epsilon)).log() + q * ((q + epsilon) / (m + epsilon)).log()).sum(1).mean()


LOGITS = (lambda: (500 * rand(4, 5), 500 * rand(4, 5, high=3)), lambda: (rand(4, 5), rand(4, 5)), lambda: (Z(4, 5), Z(4, 5)))
add("jensen shannon", lambda a, b: jensen_shannon(a, b, 0.0), lambda: (rand(4, 5), rand(4, 5, high=3)), *LOGITS)
add("jensen shannon with epsilon", lambda a, b: jensen_shannon(a, b, 1e-6), lambda: (rand(4, 5), rand(4, 5, high=3)), *LOGITS)
add("hellinger", lambda a, b: (a.softmax(1).sqrt() - b.softmax(1).sqrt()).square().sum(), lambda: (rand(4, 5), rand(4, 5, high=3)), *LOGITS)
add(
    "bhattacharyya",
    lambda a, b: -(a.softmax(1) * b.softmax(1)).sqrt().sum(1).log().mean(),
    lambda: (rand(4, 5), rand(4, 5, high=3)),
    *LOGITS,
)
add(
    "distillation",
    lambda a, b: F.kl_div((a / 4).log_softmax(1), (b / 4).softmax(1), reduction="batchmean"),
    lambda: (rand(4, 5), rand(4, 5, high=3)),
    *LOGITS,
)
add(
    "masked attention entropy",
    lambda s, m: -(s.masked_fill(~m, -math.inf).softmax(-1) + 1e-9).log().mean(),
    lambda: (rand(3, 4), rand(3, 4) > -0.5),
    lambda: (rand(3, 4), torch.zeros(3, 4, dtype=torch.bool)),
)
add(
    "attention masked by a large number",
    lambda s, m: s.masked_fill(~m, -1e9).softmax(-1).square().sum(),
    lambda: (rand(3, 4), rand(3, 4) > -0.5),
    lambda: (rand(3, 4), torch.zeros(3, 4, dtype=torch.bool)),
)

# One logit a pixel.
PIXELS = (
    lambda: (full(-300, 2, 1, 4, 4), Z(2, 1, 4, 4)),
    lambda: (full(300, 2, 1, 4, 4), O(2, 1, 4, 4)),
    lambda: (full(-300, 2, 1, 4, 4), O(2, 1, 4, 4)),
    lambda: (500 * rand(2, 1, 4, 4), (rand(2, 1, 4, 4) > 0).float()),
)


def binary() -> tuple[Tensor, ...]:
    return 2 * rand(2, 1, 4, 4), (rand(2, 1, 4, 4, high=1.2) > 0).float()


def tversky(z: Tensor, y: Tensor, smooth: float, power: float) -> Tensor:
    p = z.sigmoid()
    hit = (p * y).sum()
    return (1 - (hit + smooth) / (hit + 0.7 * (p * (1 - y)).sum() + 0.3 * ((1 - p) * y).sum() + smooth)) ** power


add("bce by hand", lambda z, y: -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).mean(), binary, *PIXELS)
add(
    "bce by hand, clamped",
    lambda z, y: -(y * z.sigmoid().clamp(1e-6, 1 - 1e-6).log() + (1 - y) * (1 - z.sigmoid().clamp(1e-6, 1 - 1e-6)).log()).mean(),
    binary,
    *PIXELS,
)
add("bce on logits", F.binary_cross_entropy_with_logits, binary, *PIXELS)
add("bce on the sigmoid", lambda z, y: F.binary_cross_entropy(z.sigmoid(), y), binary, *PIXELS)
add("softplus bce", lambda z, y: (F.softplus(z) - z * y).mean(), binary, *PIXELS)
add("softplus by hand", lambda z, y: (torch.log(torch.exp(z) + 1) - z * y).mean(), binary, *PIXELS)
add("sigmoid by hand", lambda z, y: (1 / (1 + torch.exp(-z)) - y).square().mean(), binary, *PIXELS)
add("inverse sigmoid depth", lambda z, y: (1 / z.sigmoid() - y).abs().mean(), binary, *PIXELS)
add("inverse sigmoid depth with a floor", lambda z, y: (1 / (z.sigmoid() + 0.01) - y).abs().mean(), binary, *PIXELS)
add("binary focal by sigmoid", lambda z, y: -(y * (1 - z.sigmoid()) ** 2 * z.sigmoid().log()).mean(), binary, *PIXELS)
add("binary focal by logsigmoid", lambda z, y: -(y * (1 - z.sigmoid()) ** 2 * F.logsigmoid(z)).mean(), binary, *PIXELS)
add("dice", lambda z, y: 1 - 2 * (z.sigmoid() * y).sum() / (z.sigmoid().sum() + y.sum()), binary, *PIXELS)
add("dice with smoothing", lambda z, y: 1 - (2 * (z.sigmoid() * y).sum() + 1) / (z.sigmoid().sum() + y.sum() + 1), binary, *PIXELS)
add("dice with squares", lambda z, y: 1 - 2 * (z.sigmoid() * y).sum() / (z.sigmoid().square().sum() + y.square().sum()), binary, *PIXELS)
add(
    "dice a sample",
    lambda z, y: 1 - (2 * (z.sigmoid() * y).sum((1, 2, 3)) / (z.sigmoid().sum((1, 2, 3)) + y.sum((1, 2, 3)))).mean(),
    binary,
    *PIXELS,
)
add("soft iou", lambda z, y: 1 - (z.sigmoid() * y).sum() / (z.sigmoid() + y - z.sigmoid() * y).sum(), binary, *PIXELS)
add("log of soft dice", lambda z, y: -((2 * (z.sigmoid() * y).sum()) / (z.sigmoid().sum() + y.sum() + 1)).log(), binary, *PIXELS)
add(
    "log cosh of dice",
    lambda z, y: torch.log(torch.cosh(1 - (2 * (z.sigmoid() * y).sum() + 1) / (z.sigmoid().sum() + y.sum() + 1))),
    binary,
    *PIXELS,
)
add("focal tversky", lambda z, y: tversky(z, y, 1.0, 0.75), binary, *PIXELS)
add("tversky", lambda z, y: tversky(z, y, 1.0, 1.0), binary, *PIXELS)
add("tversky to the 4/3", lambda z, y: tversky(z, y, 1.0, 4 / 3), binary, *PIXELS)
add("recall", lambda z, y: 1 - (z.sigmoid() * y).sum() / y.sum(), binary, *PIXELS)
add("balanced bce", lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=(1 - y).sum() / y.sum()), binary, *PIXELS)
add(
    "balanced bce, guarded",
    lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=(1 - y).sum() / y.sum().clamp_min(1)),
    binary,
    *PIXELS,
)
add("positives by selection", lambda z, y: z[y > 0].sigmoid().mean(), binary, *PIXELS)
add("logit of the sigmoid", lambda z, y: (torch.logit(z.sigmoid()) - y).square().mean(), binary, *PIXELS)
add("logit of the sigmoid, clamped", lambda z, y: (torch.logit(z.sigmoid(), eps=1e-4) - y).square().mean(), binary, *PIXELS)
add(
    "matthews",
    lambda z, y: (
        1
        - ((z.sigmoid() - z.sigmoid().mean()) * (y - y.mean())).sum()
        / (((z.sigmoid() - z.sigmoid().mean()) ** 2).sum() * ((y - y.mean()) ** 2).sum()).sqrt()
    ),
    binary,
    *PIXELS,
)
add("gumbel noise", lambda z, y: (-torch.log(-torch.log(z.sigmoid())) - y).abs().mean(), binary, *PIXELS)

# Likelihoods.
NOISE = (lambda: (200 * rand(4, 2), rand(4)), lambda: (-200 * rand(4, 2, low=0), rand(4)), lambda: (Z(4, 2), Z(4)))


def uncertain() -> tuple[Tensor, ...]:
    return rand(4, 2), rand(4)


add(
    "gaussian nll with log variance",
    lambda x, t: (0.5 * torch.exp(-x[:, 1]) * (x[:, 0] - t) ** 2 + 0.5 * x[:, 1]).mean(),
    uncertain,
    *NOISE,
)
add(
    "gaussian nll with clamped log variance",
    lambda x, t: (0.5 * torch.exp(-x[:, 1].clamp(-10, 10)) * (x[:, 0] - t) ** 2 + 0.5 * x[:, 1]).mean(),
    uncertain,
    *NOISE,
)
add(
    "gaussian nll with softplus deviation",
    lambda x, t: (F.softplus(x[:, 1]).log() + 0.5 * ((x[:, 0] - t) / F.softplus(x[:, 1])) ** 2).mean(),
    uncertain,
    *NOISE,
)
add(
    "gaussian nll with a floor",
    lambda x, t: ((F.softplus(x[:, 1]) + 1e-3).log() + 0.5 * ((x[:, 0] - t) / (F.softplus(x[:, 1]) + 1e-3)) ** 2).mean(),
    uncertain,
    *NOISE,
)
add("F.gaussian_nll_loss", lambda x, t: F.gaussian_nll_loss(x[:, 0], t, x[:, 1].square()), uncertain, *NOISE)
add("laplace nll", lambda x, t: ((x[:, 0] - t).abs() / x[:, 1].abs() + x[:, 1].abs().log()).mean(), uncertain, *NOISE)
add("vae kl", lambda x, t: -0.5 * (1 + x[:, 1] - x[:, 0] ** 2 - x[:, 1].exp()).sum(), uncertain, *NOISE)
add(
    "vae kl by softplus",
    lambda x, t: (0.5 * (x[:, 0] ** 2 + F.softplus(x[:, 1]) ** 2 - 1) - (F.softplus(x[:, 1]) + 1e-6).log()).sum(),
    uncertain,
    *NOISE,
)
add("poisson on the log rate", lambda x, t: F.poisson_nll_loss(x[:, 0].clamp(max=20), t.abs()), uncertain, *NOISE)
add("poisson by hand", lambda x, t: (x[:, 0].exp() - t.abs() * x[:, 0]).mean(), uncertain, *NOISE)
add(
    "poisson on the rate",
    lambda x, t: (F.relu(x[:, 0]) - t.abs() * F.relu(x[:, 0]).log()).mean(),
    lambda: (rand(4, 2, low=0.1), rand(4)),
    *NOISE,
)
add("beta nll", lambda x, t: -torch.lgamma(x.exp().sum(1)).mean() + torch.lgamma(x.exp()).sum(1).mean(), uncertain, *NOISE)
add("cox partial likelihood by exp", lambda x, t: (torch.log(torch.cumsum(torch.exp(x[:, 0]), 0)) - x[:, 0]).mean(), uncertain, *NOISE)
add("cox partial likelihood by logcumsumexp", lambda x, t: (torch.logcumsumexp(x[:, 0], 0) - x[:, 0]).mean(), uncertain, *NOISE)
add("tensor exponent", lambda x, t: (x[:, 0].abs() ** x[:, 1]).mean(), uncertain, *NOISE)
add("entropy of a product", lambda x, t: x.sigmoid().prod().log(), uncertain, *NOISE)
add("xlogy", lambda x, t: torch.xlogy(t.abs(), x[:, 0].abs()).mean(), uncertain, *NOISE)
add("inverse error function", lambda x, t: torch.erfinv(torch.tanh(x)).square().mean(), uncertain, *NOISE)
add("atanh of tanh", lambda x, t: torch.atanh(torch.tanh(x)).square().mean(), uncertain, *NOISE)
add("squashed gaussian log probability", lambda x, t: torch.log(1 - torch.tanh(x) ** 2).mean(), uncertain, *NOISE)
add("squashed gaussian log probability, stable", lambda x, t: (2 * (math.log(2) - x - F.softplus(-2 * x))).mean(), uncertain, *NOISE)
add("ppo ratio", lambda x, t: torch.min(torch.exp(x[:, 0] - t) * t, torch.exp(x[:, 0] - t).clamp(0.8, 1.2) * t).mean(), uncertain, *NOISE)
add(
    "normalized advantages",
    lambda x, t: (x[:, 0] * (t - t.mean()) / t.std()).mean(),
    uncertain,
    lambda: (rand(4, 2), O(4)),
    lambda: (rand(1, 2), rand(1)),
)
add(
    "where after a log",
    lambda x, t: torch.where(x > 0, x.log(), 0.0).sum(),
    lambda: (rand(4, 2, low=0.1), rand(4)),
    lambda: (Z(4, 2), rand(4)),
)
add(
    "where before a log",
    lambda x, t: torch.where(x > 0.01, x, 1.0).log().sum(),
    lambda: (rand(4, 2, low=0.1), rand(4)),
    lambda: (Z(4, 2), rand(4)),
)
add("nan_to_num of a ratio", lambda x, t: torch.nan_to_num(x[:, 0] / x[:, 1]).sum(), uncertain, *NOISE)
add("elu by hand", lambda x, t: torch.where(x > 0, x, x.exp() - 1).sum(), uncertain, *NOISE)
add("elu by hand, clamped", lambda x, t: torch.where(x > 0, x, x.clamp(max=0).exp() - 1).sum(), uncertain, *NOISE)

# Boxes: x1, y1, x2, y2.
BOX = (lambda: (Z(4, 4), Z(4, 4)), lambda: (boxes()[1], boxes()[1]), lambda: (rand(4, 4), Z(4, 4)))


def boxes() -> tuple[Tensor, ...]:
    corner = rand(4, 2, low=0, high=0.5)
    return torch.cat([corner, corner + rand(4, 2, low=0.1, high=0.4)], 1), torch.cat([corner + 0.05, corner + 0.3], 1)


def iou(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    inner = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    area = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner
    return inner / (area.clamp_min(epsilon) if epsilon else area)


add("iou of boxes", lambda a, b: 1 - iou(a, b, 0.0).mean(), boxes, *BOX)
add("iou of boxes, guarded", lambda a, b: 1 - iou(a, b, 1e-6).mean(), boxes, *BOX)
add("log of the iou", lambda a, b: -iou(a, b, 1e-6).log().mean(), boxes, *BOX)
add("aspect ratio", lambda a, b: (torch.atan(a[:, 2] / a[:, 3]) - torch.atan(b[:, 2] / b[:, 3])).square().mean(), boxes, *BOX)
add("aspect ratio by atan2", lambda a, b: (torch.atan2(a[:, 2].abs() + 1e-6, a[:, 3].abs() + 1e-6) - b[:, 0]).square().mean(), boxes, *BOX)
add("centerness", lambda a, b: (a[:, :2].amin(1) / a[:, :2].amax(1) * a[:, 2:].amin(1) / a[:, 2:].amax(1)).sqrt().mean(), boxes, *BOX)
add("log size", lambda a, b: ((a[:, 2] / b[:, 2]).log()).square().mean(), boxes, *BOX)
add("exp size", lambda a, b: (a[:, 2].exp() * b[:, 2] - b[:, 3]).abs().mean(), boxes, *BOX, lambda: (full(300, 4, 4), boxes()[1]))


# Depth under a mask.
def depth() -> tuple[Tensor, ...]:
    return rand(2, 1, 6, 6, low=0.5, high=5), rand(2, 1, 6, 6, low=0.6, high=5), rand(2, 1, 6, 6) > -0.4


def nothing() -> tuple[Tensor, ...]:
    return (*depth()[:2], torch.zeros(2, 1, 6, 6, dtype=torch.bool))


def single() -> tuple[Tensor, ...]:
    mask = nothing()[2]
    mask[0, 0, 0, 0] = True
    return (*depth()[:2], mask)


DEPTHS = (nothing, single, lambda: (depth()[1], depth()[1], depth()[2]))
add("silog", lambda p, t, m: ((p[m].log() - t[m].log()).var() + 0.15 * (p[m].log() - t[m].log()).mean() ** 2).sqrt(), depth, *DEPTHS)
add(
    "silog of zero or more",
    lambda p, t, m: ((p.clamp_min(1e-3).log() - t.clamp_min(1e-3).log()) * m).square().sum() / m.sum().clamp_min(1),
    depth,
    *DEPTHS,
)
add("masked l1 by selection", lambda p, t, m: F.l1_loss(p[m], t[m]), depth, *DEPTHS)
add("masked l1 by where", lambda p, t, m: torch.where(m, (p - t).abs(), 0.0).mean(), depth, *DEPTHS)
add("masked l1 over the count", lambda p, t, m: ((p - t).abs() * m).sum() / m.sum(), depth, *DEPTHS)
add("masked median alignment", lambda p, t, m: (p / p[m].median() - t / t[m].median()).abs()[m].mean(), depth, *DEPTHS)
add("masked mean with nanmean", lambda p, t, m: torch.where(m, (p - t).abs(), math.nan).nanmean(), depth, *DEPTHS)
add("masked sum", lambda p, t, m: ((p - t).abs() * m).sum(), depth, *DEPTHS)
add("a sample's own mean", lambda p, t, m: (((p - t).abs() * m).sum((1, 2, 3)) / m.sum((1, 2, 3))).mean(), depth, *DEPTHS)
add("inverse depth", lambda p, t, m: ((1 / p - 1 / t).abs() * m).sum(), depth, *DEPTHS, lambda: (Z(2, 1, 6, 6), *depth()[1:]))
add(
    "inverse depth, clamped",
    lambda p, t, m: ((1 / p.clamp_min(0.1) - 1 / t.clamp_min(0.1)).abs() * m).sum(),
    depth,
    *DEPTHS,
    lambda: (Z(2, 1, 6, 6), *depth()[1:]),
)

# Half precision.
HALF = (
    lambda: (full(300, 8, 8), rand(8, 8)),
    lambda: (Z(8, 8), Z(8, 8)),
    lambda: (full(6e4, 8, 8), rand(8, 8)),
    lambda: (-full(6e4, 8, 8), rand(8, 8)),
)


def square() -> tuple[Tensor, ...]:
    return rand(8, 8), rand(8, 8, high=0.9)


add("half squares", lambda p, t: ((p.half() - t.half()) ** 2).mean().float(), square, *HALF)
add("half errors squared in float", lambda p, t: ((p.half().float() - t.half().float()) ** 2).mean(), square, *HALF)
add("half sum", lambda p, t: (p.half().abs() * 100).sum().float(), square, *HALF)
add("half epsilon", lambda p, t: (p.half().abs() + 1e-8).log().float().mean(), square, *HALF)
add("half epsilon that holds", lambda p, t: (p.half().abs() + 1e-3).log().float().mean(), square, *HALF)
add("half exp", lambda p, t: p.half().exp().float().mean(), square, *HALF)
add("half exp below 0", lambda p, t: (-p.half().abs()).exp().float().mean(), square, *HALF)
add("half product", lambda p, t: (p.half() @ p.half().T).float().softmax(1).square().sum(), square, *HALF)
add("half product, scaled before", lambda p, t: ((p / 8).half().float() @ p.half().float().T).softmax(1).square().sum(), square, *HALF)
add("half log of sigmoid", lambda p, t: (80 * p.half().sigmoid()).log().float().mean(), square, *HALF)
add("bfloat16 squares", lambda p, t: ((p.bfloat16() - t.bfloat16()) ** 2).float().mean(), square, *HALF)
add(
    "bfloat16 clamp of a cosine", lambda p, t: torch.acos(torch.tanh(p).bfloat16().clamp(-1 + 1e-4, 1 - 1e-4)).float().mean(), square, *HALF
)
add("half norm", lambda p, t: p.half().norm().float(), square, *HALF)
add("half norm in float", lambda p, t: p.half().float().norm(), square, *HALF)
