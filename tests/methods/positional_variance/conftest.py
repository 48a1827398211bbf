"""Augmentation draws from Python's and numpy's generators too; one small ViT serves the rules' tests."""

from __future__ import annotations

import importlib
import random

import pytest
from torch import nn

from tests.methods.positional_variance.images import vit


@pytest.fixture(autouse=True)
def _seed_augmentation() -> None:
    random.seed(0)
    importlib.import_module("numpy.random").seed(0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return vit()
