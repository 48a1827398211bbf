"""Refinements of label scores by the image: the guided filter of this library, or a dense CRF where one is installed."""

from __future__ import annotations

__all__ = ["Refinement", "refine", "require_refinement"]

import importlib
import importlib.util
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pl_normkit.errors import ConfigError
from pl_normkit.methods.box_supervision import refine_by_guide

Refinement = Literal["guided", "crf"]
"""The guided filter of this library, which is not the paper's refinement; or pydensecrf's dense CRF, which is."""

_CRF = {"weight": 4, "space": 55, "colour": 3, "near_weight": 3, "near_space": 3}
"""Of the public code for labels: bilateral weight and deviations, and those of the term without colours."""
_STEPS = 10


def require_refinement(name: Refinement) -> None:
    """Raise ConfigError unless it can run."""
    if name == "crf" and importlib.util.find_spec("pydensecrf") is None:
        raise ConfigError(
            "the dense CRF needs pydensecrf, which is not installed",
            where="--stages.refine",
            evidence="crf",
            fix="pip install pydensecrf2 (pydensecrf itself no longer builds on new Pythons), or take --stages.refine guided",
        )


def refine(image: Tensor, scores: Tensor, name: Refinement) -> Tensor:
    """Scores (classes, H, W) of at least 0 that follow the edges of an image (3, H, W) uint8; the largest wins.

    Only classes that have a score somewhere take part. Softmax over the classes comes first, as in the public code.
    """
    present = (scores.flatten(1).amax(1) > 0).nonzero()[:, 0]
    shares = scores[present].softmax(0)
    refined = _by_crf(image, shares) if name == "crf" else refine_by_guide(image.float() / 255, shares)
    return torch.zeros_like(scores).index_copy(0, present, refined.clamp_min(0))


def _by_crf(image: Tensor, shares: Tensor) -> Tensor:
    crf = importlib.import_module("pydensecrf.densecrf")
    classes, height, width = shares.shape
    if classes == 1:
        return shares
    field = crf.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy((-shares.clamp_min(1e-8).log()).flatten(1).float().contiguous().numpy())
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    field.addPairwiseGaussian(sxy=_CRF["near_space"], compat=_CRF["near_weight"])
    field.addPairwiseBilateral(sxy=_CRF["space"], srgb=_CRF["colour"], rgbim=pixels, compat=_CRF["weight"])
    found = torch.from_numpy(np.array(field.inference(_STEPS), dtype=np.float32))
    return found.view(classes, height, width)
