"""Scikit-learn's 1,797 handwritten digits: real images with nothing to download."""

from __future__ import annotations

__all__ = ["DIGIT_NAMES", "split_digits"]

import importlib.util

import torch
from torch import Tensor

from pl_normkit.errors import DataError
from pl_normkit.recipes.loading import Part

DIGIT_NAMES = [str(digit) for digit in range(10)]


def split_digits(seed: int) -> dict[Part, tuple[Tensor, Tensor]]:
    """Images (N, 1, 8, 8) uint8 and labels (N,) of each part.

    A permutation by `seed` sends the first 20 % to validation, the next 20 % to the test, the rest to training. Raises DataError without
    scikit-learn.
    """
    if importlib.util.find_spec("sklearn") is None:
        fix = "pip install 'pl_normkit[demo]', or train on data of your own with --data"
        raise DataError("the digits lie in scikit-learn, which is not installed", fix=fix)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    share = len(labels) // 5
    chosen: dict[Part, Tensor] = {"val": order[:share], "test": order[share : 2 * share], "train": order[2 * share :]}
    return {part: (images[indices], labels[indices]) for part, indices in chosen.items()}
