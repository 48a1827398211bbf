"""Searches the losses of smp, timm, torchvision, torchmetrics and transformers for arguments at which they are not finite.

    python benchmarks/loss_zoo.py

Writes results/loss_zoo.csv: a row a loss and finding, one with an empty code where nothing was found, and whether
`replace_unsafe_losses` has a stable form for it. Each witness is one that the installed version fails on.
"""

from __future__ import annotations

import csv
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import segmentation_models_pytorch.losses as smp
import timm.loss
import torch
import torchmetrics.functional as tm
import torchvision.ops as tv
from torch import Tensor, nn
from transformers.loss import loss_utils as hf

from pl_normkit import audit_loss, bounded, replace_unsafe_losses
from pl_normkit.errors import NothingMatchedError
from pl_normkit.report import Report

RESULTS = Path(__file__).parent / "results" / "loss_zoo.csv"
COLUMNS = ["library", "version", "loss", "code", "severity", "operation", "witness", "replaced"]

G = torch.Generator().manual_seed(0)


def r(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=G)


def free(*shape: int) -> Tensor:
    return (2 * r(*shape) - 1).requires_grad_()


def binary() -> tuple[Tensor, ...]:
    return free(2, 1, 8, 8), (r(2, 1, 8, 8) > 0.5).float()


def several() -> tuple[Tensor, ...]:
    return free(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8), generator=G)


def multilabel() -> tuple[Tensor, ...]:
    return free(4, 5), (r(4, 5) > 0.5).float()


def classes() -> tuple[Tensor, ...]:
    return free(4, 5), torch.randint(0, 5, (4,), generator=G)


def soft() -> tuple[Tensor, ...]:
    return free(4, 5), r(4, 5).softmax(1)


def boxes() -> tuple[Tensor, ...]:
    corner = r(4, 2)
    return torch.cat([corner, corner + 0.1 + r(4, 2)], 1).requires_grad_(), torch.cat([corner + 0.05, corner + 0.4], 1)


def pair() -> tuple[Tensor, ...]:
    return (0.1 + r(16)).requires_grad_(), 0.1 + r(16)


def waves() -> tuple[Tensor, ...]:
    return free(2, 64), 2 * r(2, 64) - 1


def images() -> tuple[Tensor, ...]:
    return r(2, 3, 24, 24).requires_grad_(), r(2, 3, 24, 24)


def chances() -> tuple[Tensor, ...]:
    return bounded(r(4, 5).softmax(1).requires_grad_(), 0, 1), r(4, 5).softmax(1)


Zoo = Iterator[tuple[str, str, Callable[..., Any], Callable[[], tuple[Tensor, ...]]]]


def losses() -> Zoo:
    """Library, name, loss and example."""
    for name in ("DiceLoss", "JaccardLoss", "TverskyLoss", "FocalLoss", "LovaszLoss"):
        for mode, example in (("binary", binary), ("multiclass", several)):
            yield "segmentation_models_pytorch", f'{name}("{mode}")', getattr(smp, name)(mode), example
    for name in ("DiceLoss", "JaccardLoss", "TverskyLoss"):
        yield "segmentation_models_pytorch", f'{name}("binary", log_loss=True)', getattr(smp, name)("binary", log_loss=True), binary
    yield "segmentation_models_pytorch", 'TverskyLoss("binary", gamma=0.75)', smp.TverskyLoss("binary", gamma=0.75), binary
    yield "segmentation_models_pytorch", 'FocalLoss("binary", gamma=0.5)', smp.FocalLoss("binary", gamma=0.5), binary
    yield "segmentation_models_pytorch", 'FocalLoss("binary", normalized=True)', smp.FocalLoss("binary", normalized=True), binary
    yield "segmentation_models_pytorch", 'FocalLoss("multiclass", ignore_index=255)', smp.FocalLoss("multiclass", ignore_index=255), several
    yield "segmentation_models_pytorch", 'LovaszLoss("multiclass", ignore_index=3)', smp.LovaszLoss("multiclass", ignore_index=3), several
    yield "segmentation_models_pytorch", "SoftBCEWithLogitsLoss()", smp.SoftBCEWithLogitsLoss(), binary
    yield "segmentation_models_pytorch", "SoftCrossEntropyLoss(smooth_factor=0.1)", smp.SoftCrossEntropyLoss(smooth_factor=0.1), several
    yield (
        "segmentation_models_pytorch",
        "MCCLoss()",
        smp.MCCLoss(),
        lambda: (bounded(r(2, 1, 8, 8).requires_grad_(), 0, 1), (r(2, 1, 8, 8) > 0.5).float()),
    )
    of_timm = {"AsymmetricLossMultiLabel": multilabel, "AsymmetricLossSingleLabel": classes, "BinaryCrossEntropy": classes,
               "LabelSmoothingCrossEntropy": classes, "SoftTargetCrossEntropy": soft, "PolyBinaryCrossEntropy": multilabel,
               "PolyCrossEntropy": classes, "TwoWayLoss": multilabel, "ZlprLoss": multilabel}  # fmt: skip
    for name, example in of_timm.items():
        if hasattr(timm.loss, name):
            yield "timm", f"{name}()", getattr(timm.loss, name)(), example
    yield "timm", "JsdCrossEntropy()", timm.loss.JsdCrossEntropy(), lambda: (free(6, 5), torch.tensor([0, 1]))
    for name in ("complete_box_iou_loss", "distance_box_iou_loss", "generalized_box_iou_loss"):
        yield "torchvision", name, getattr(tv, name), boxes
    yield "torchvision", "sigmoid_focal_loss", tv.sigmoid_focal_loss, multilabel
    yield "torchvision", "sigmoid_focal_loss(gamma=0.5)", lambda z, y: tv.sigmoid_focal_loss(z, y, gamma=0.5), multilabel
    of_torchmetrics: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
        **{name: (getattr(tm, name), pair) for name in (
            "concordance_corrcoef", "explained_variance", "log_cosh_error", "mean_absolute_error", "mean_absolute_percentage_error",
            "mean_squared_error", "mean_squared_log_error", "pearson_corrcoef", "r2_score", "relative_squared_error",
            "symmetric_mean_absolute_percentage_error", "tweedie_deviance_score", "weighted_mean_absolute_percentage_error")},
        "mean_squared_error(squared=False)": (lambda p, t: tm.mean_squared_error(p, t, squared=False), pair),
        "minkowski_distance(p=3)": (lambda p, t: tm.minkowski_distance(p, t, p=3), pair),
        "normalized_root_mean_squared_error": (tm.normalized_root_mean_squared_error, pair),
        **{name: (getattr(tm, name), waves) for name in (
            "scale_invariant_signal_distortion_ratio", "scale_invariant_signal_noise_ratio", "signal_noise_ratio")},
        **{name: (getattr(tm, name), images) for name in (
            "peak_signal_noise_ratio", "spectral_angle_mapper", "structural_similarity_index_measure",
            "universal_image_quality_index", "error_relative_global_dimensionless_synthesis")},
        "total_variation": (tm.total_variation, lambda: (r(2, 3, 24, 24).requires_grad_(),)),
        "cosine_similarity": (tm.cosine_similarity, multilabel),
        "kl_divergence": (tm.kl_divergence, chances),
        "pairwise_euclidean_distance": (tm.pairwise_euclidean_distance, lambda: (free(4, 5),)),
        "pairwise_cosine_similarity": (tm.pairwise_cosine_similarity, lambda: (free(4, 5),)),
    }  # fmt: skip
    for name, (loss, example) in of_torchmetrics.items():
        yield "torchmetrics", name, loss, example
    tokens = torch.randint(0, 7, (2, 6), generator=G)
    yield "transformers", "ForCausalLMLoss", lambda z, y: hf.ForCausalLMLoss(z, y, vocab_size=7), lambda: (free(2, 6, 7), tokens)
    yield "transformers", "ForMaskedLMLoss", lambda z, y: hf.ForMaskedLMLoss(z, y, vocab_size=7), lambda: (free(2, 6, 7), tokens)


def audited(loss: Callable[..., Any], example: Callable[[], tuple[Tensor, ...]]) -> Report:
    return audit_loss(loss, example)


def is_replaced(loss: Callable[..., Any]) -> bool:
    if not isinstance(loss, nn.Module):
        return False
    holder = nn.Module()
    holder.loss = loss
    try:
        return bool(replace_unsafe_losses(holder).made)
    except NothingMatchedError:
        return False


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for library, name, loss, example in losses():
        base = {"library": library, "version": importlib.metadata.version(library), "loss": name}
        found = [finding for finding in audited(loss, example).findings if finding.witness is not None]
        replaced = "yes" if is_replaced(loss) else "no"
        rows += [base | {"code": finding.code, "severity": str(finding.severity), "operation": finding.cause,
                         "witness": " and ".join(finding.witness.changed), "replaced": replaced} for finding in found]  # fmt: skip
        rows += [] if found else [base]
        for row in rows[-max(1, len(found)) :]:
            print(*row.values(), sep=" | ")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
