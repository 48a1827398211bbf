"""Losses as people write them: errors, images, embeddings and logits."""

from __future__ import annotations

__all__ = ["CASES"]

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.nan_safety.losses.loss_cases import CASES, O, Z, add, full, rand


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
