"""Augmentation draws from Python's and numpy's generators too."""

from __future__ import annotations

import importlib
import random

import pytest


@pytest.fixture(autouse=True)
def _seed_augmentation() -> None:
    random.seed(0)
    importlib.import_module("numpy.random").seed(0)
