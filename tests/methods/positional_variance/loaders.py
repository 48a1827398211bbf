"""Loaders of small pictures as people build them, and what the rules find in them."""

from __future__ import annotations

from typing import Any

import albumentations as A
import torch
import torchvision.transforms as v1
from timm.data import create_loader
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from pl_normkit import audit
from pl_normkit.findings import Finding
from pl_normkit.rules import Loaders
from tests.methods.positional_variance.images import MEAN, SIZE, STD, Pictures

INPUTS = torch.zeros(2, 3, SIZE, SIZE)


def timm_loader(*, training: bool = True, prefetch: bool = False, **options: Any) -> Any:
    device = torch.device("cpu")
    options = {"is_training": training, "use_prefetcher": prefetch, "device": device, "num_workers": 0, **options}
    return create_loader(Pictures(), (3, SIZE, SIZE), 16, **options)


def loader(transform: Any, **options: Any) -> Any:
    return DataLoader(Pictures(transform), 16, **options)


def normalised(*before: Any, after: Any = (), mean: Any = MEAN, std: Any = STD) -> Any:
    return v1.Compose([*before, v1.ToTensor(), v1.Normalize(mean, std), *after])


def albumented(*before: Any) -> Any:
    return A.Compose([*before, A.Normalize(), A.ToTensorV2()])


def found(model: nn.Module, train: Any, evaluation: Any = None, transforms: Any = (), **options: Any) -> list[Finding]:
    evaluation = loader(normalised()) if evaluation is None else evaluation
    loaders = Loaders(train, evaluation, transforms)
    report = audit(model, INPUTS, loaders=loaders, **{"select": ["NK7"], "measure": False, **options})
    assert report.notes == []
    return report.findings


def codes(findings: list[Finding]) -> list[str]:
    return sorted(finding.code for finding in findings)


V2 = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
