"""pl_normkit: a linter with a screwdriver for PyTorch training runs."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
