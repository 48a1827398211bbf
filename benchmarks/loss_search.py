"""How long the search of `audit_loss` takes on segmentation-sized inputs, beside one forward and backward of the same loss.

    OMP_NUM_THREADS=1 python benchmarks/loss_search.py

Inputs are (8, 21, 64, 64) logits with labels, or a binary target of that size. Times are processor time of one thread. Writes
results/loss_search.csv: a row a loss, and the median. The target is a median below one second.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pl_normkit.methods.nan_safety.losses.loss_call import LossCall, read_loss_call
from pl_normkit.methods.nan_safety.losses.search import search
from pl_normkit.nn import BinaryFocalLoss, RMSELoss

RESULTS = Path(__file__).parent / "results" / "loss_search.csv"
SHAPE = (8, 21, 64, 64)
REPEATS = 5


def dice(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    return 1 - (2 * (p * y).sum((2, 3)) / (p + y).sum((2, 3))).mean()


def smooth_dice(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    return 1 - ((2 * (p * y).sum((2, 3)) + 1) / ((p + y).sum((2, 3)) + 1)).mean()


def focal_tversky(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    hit = (p * y).sum()
    return (1 - (hit + 1) / (hit + 0.7 * (p * (1 - y)).sum() + 0.3 * ((1 - p) * y).sum() + 1)) ** 0.75


def ssim(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    mp, my = F.avg_pool2d(p, 7, 1), F.avg_pool2d(y, 7, 1)
    vp, vy, cov = (F.avg_pool2d(a * b, 7, 1) - c for a, b, c in ((p, p, mp * mp), (y, y, my * my), (p, y, mp * my)))
    return 1 - ((2 * mp * my + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + my**2 + 1e-4) * (vp + vy + 9e-4))).mean()


LABELLED: dict[str, Callable[..., Tensor]] = {
    "cross entropy": F.cross_entropy,
    "cross entropy, void 255": lambda z, y: F.cross_entropy(z, y, ignore_index=255),
    "nll of log of softmax": lambda z, y: F.nll_loss(z.softmax(1).log(), y),
    "cross entropy and entropy": lambda z, y: F.cross_entropy(z, y) - (z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
}
VALUED: dict[str, Callable[..., Tensor]] = {
    "rmse": lambda z, y: F.mse_loss(z, y).sqrt(),
    "RMSELoss": RMSELoss(),
    "charbonnier": lambda z, y: ((z - y) ** 2 + 1e-6).sqrt().mean(),
    "bce on logits": F.binary_cross_entropy_with_logits,
    "bce by hand": lambda z, y: -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).mean(),
    "BinaryFocalLoss": BinaryFocalLoss(),
    "dice": dice,
    "dice with smoothing": smooth_dice,
    "focal tversky": focal_tversky,
    "ssim": ssim,
    "cosine": lambda z, y: 1 - F.cosine_similarity(z, y).mean(),
}


def once(call: LossCall) -> float:
    """Milliseconds of a forward and a backward."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        value, leaves = call.value(call.example)
        torch.autograd.grad(value, leaves)
        times.append(1e3 * (time.thread_time() - start))
    return statistics.median(times)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = torch.randn(SHAPE).requires_grad_()
    labels = torch.randint(0, SHAPE[1], (SHAPE[0], *SHAPE[2:]))
    values = (torch.rand(SHAPE) > 0.7).float()
    rows = []
    for losses, target in ((LABELLED, labels), (VALUED, values)):
        for name, loss in losses.items():
            call = read_loss_call(loss, (logits, target))
            search(call)  # loads what torch loads late
            found = search(call)
            row = {"loss": name, "search_s": round(found.seconds, 3), "calls": found.tries, "complete": found.is_complete}
            rows.append(row | {"witnesses": len(found.hits), "forward_backward_ms": round(once(call), 1)})
            print(rows[-1])
    middle = statistics.median(row["search_s"] for row in rows)
    rows.append(
        {"loss": "median", "search_s": middle, "forward_backward_ms": statistics.median(row["forward_backward_ms"] for row in rows)}
    )
    print(f"median search {middle:.3f} s (target: below 1); {platform.machine()}, torch {torch.__version__}")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
