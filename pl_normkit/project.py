"""The pyproject.toml that a command belongs to."""

from __future__ import annotations

__all__ = ["nearest_pyproject"]

from pathlib import Path


def nearest_pyproject(start: Path | None = None) -> Path | None:
    """The pyproject.toml at or above `start` (default: the working directory)."""
    folder = (start or Path.cwd()).resolve()
    candidates = (candidate / "pyproject.toml" for candidate in (folder, *folder.parents))
    return next((path for path in candidates if path.is_file()), None)
