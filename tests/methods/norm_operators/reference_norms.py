"""Each norm written out element by element, from its formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
EPS = 1e-5


def by_row(x: Tensor, one: Callable[[Tensor], list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(one(row)) for row in x.reshape(-1, x.shape[-1])]).reshape(x.shape)


def affine(x: Tensor, p: Parameters) -> Tensor:
    return x * p.get("weight", 1) + p.get("bias", 0)


def layer(row: Tensor) -> list[Tensor]:
    mean = sum(row) / len(row)
    var = sum((v - mean) ** 2 for v in row) / len(row)
    return [(v - mean) / (var + EPS) ** 0.5 for v in row]


def rmsnorm(x: Tensor, p: Parameters) -> Tensor:
    return by_row(x, lambda row: [p["weight"][i] * v / (sum(u * u for u in row) / len(row) + EPS) ** 0.5 for i, v in enumerate(row)])


def scalenorm(x: Tensor, p: Parameters) -> Tensor:
    return by_row(x, lambda row: [p["g"][0] * v / sum(u * u for u in row) ** 0.5 for v in row])


def dyt(x: Tensor, p: Parameters) -> Tensor:
    e = torch.exp(2 * p["alpha"] * x)
    return affine((e - 1) / (e + 1), p)


def eln(x: Tensor, p: Parameters) -> Tensor:
    return affine(math.sqrt(x.shape[-1] - 1) * x / (x * x + torch.exp(p["log_b"])) ** 0.5, p)


def fixed_std(x: Tensor, p: Parameters) -> Tensor:
    return affine(by_row(x, layer), p)


def tdln(x: Tensor, p: Parameters) -> Tensor:
    """All samples at time 0.5."""
    s = 1 / (1 + torch.exp(-((1 + p["slope"]) * 0.5 + p["offset"])))
    gain, shift = (s * p[name] + (1 - s) * p[f"other_{name}"] for name in ("weight", "bias"))
    return by_row(x, layer) * gain + shift


def prepbn(x: Tensor, p: Parameters) -> Tensor:
    """In training at share 0.3."""
    rows = x.reshape(-1, x.shape[-1])
    mean = sum(rows) / len(rows)
    var = sum((row - mean) ** 2 for row in rows) / len(rows)
    rep = (x - mean) / (var + EPS) ** 0.5 * p["batch_weight"] + p["batch_bias"] + p["eta"] * x
    return 0.3 * affine(by_row(x, layer), p) + 0.7 * rep


ROWS = {
    "rmsnorm": rmsnorm,
    "scalenorm": scalenorm,
    "dyt": dyt,
    "eln": eln,
    "fixed_std": fixed_std,
    "tdln": tdln,
    "prepbn": prepbn,
}
"""Those whose gradient is the derivative of their formula."""


def group(x: Tensor, groups: int) -> Tensor:
    """Group norm of each sample."""
    return torch.stack(
        [torch.cat([(part - part.mean()) / (part.var(correction=0) + EPS) ** 0.5 for part in sample.chunk(groups)]) for sample in x]
    )


def batch(x: Tensor) -> Tensor:
    channels = [x[:, i] for i in range(x.shape[1])]
    return torch.stack([(c - c.mean()) / (c.var(correction=0) + EPS) ** 0.5 for c in channels], 1)


def instance(x: Tensor) -> Tensor:
    return torch.stack([group(sample[None], len(sample))[0] for sample in x])


def images(vector: Tensor) -> Tensor:
    return vector.reshape(1, -1, 1, 1)


def power(x: Tensor, upstream: list[Tensor], p: Parameters, mask: Tensor, warmup: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """PowerNorm step by step: outputs, gradients of the groups' rows, and the running moment. `x[t]` are rows already group-scaled."""
    phi, mean, outputs, gradients = torch.ones_like(p["weight"]), torch.zeros_like(p["weight"]), [], []
    for step, (rows, back) in enumerate(zip(x, upstream, strict=True), 1):
        q = sum(row * row for row in rows[mask]) / int(mask.sum())
        z = rows / ((q if step <= warmup else phi) + EPS) ** 0.5
        if step < warmup:
            phi = phi * (step - 1) / step + q / step
        phi = 0.9 * phi + 0.1 * q
        outputs.append(z * p["weight"] + p["bias"])
        inner = back * p["weight"] - 0.1 * mean * z
        mean = mean + sum(row for row in (inner * z)[mask]) / int(mask.sum())
        gradients.append(inner / (q + EPS) ** 0.5)
    return outputs, gradients, phi


def unified(
    x: list[Tensor], upstream: list[Tensor], p: Parameters, mask: Tensor, warmup: int, window: int, outliers: bool, uncompensated: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, int]:
    """Unified normalization step by step: outputs, gradients of x and of gamma, the running moment, and how many steps were outliers."""
    width = x[0].shape[-1]
    running, record, products, average = torch.ones(width).double(), [torch.zeros(width).double()] * window, [], torch.zeros(width).double()
    products = [torch.zeros(width).double()] * window
    outputs, gradients, gammas, skipped = [], [], [], 0
    for step, (rows, back) in enumerate(zip(x, upstream, strict=True), 1):
        q = sum(row * row for row in rows[mask]) / int(mask.sum())
        spread = torch.stack(record).sqrt().var()
        record[step % window] = q
        arithmetic, geometric = sum(record) / window, torch.stack(record).prod(0) ** (1 / window)
        skip = outliers and step >= warmup and bool((arithmetic - geometric > spread * window).any())
        if skip:
            record[step % window] = running
            skipped += 1
        var = q if step <= window or step < warmup or skip else geometric
        r = ((var + EPS) / (running + EPS)) ** 0.5
        r = torch.ones(width).double() if step <= max(uncompensated, warmup) or skip else r.clamp(0.2, 5)
        running = 0.9 * running + 0.1 * var
        z = rows / (var + EPS) ** 0.5
        outputs.append(z * p["weight"] + p["bias"])
        g = back * p["weight"] * r
        product = sum((g * z)[mask]) / int(mask.sum())
        products[step % window] = average if skip else product
        mean = product if step <= window or step < warmup or skip else sum(products) / window
        average = 0.9 * average + 0.1 * mean
        gradients.append((g - (mean if skip else average) * z) / (var + EPS) ** 0.5)
        gammas.append((back * z * r).reshape(-1, width).sum(0))
    return outputs, gradients, gammas, running, skipped
