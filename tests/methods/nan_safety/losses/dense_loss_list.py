"""Losses as people write them: of pixels, likelihoods, boxes and depth."""

from __future__ import annotations

__all__ = ["CASES"]

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.nan_safety.losses.loss_cases import CASES, O, Z, add, full, rand

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
