"""The lines around a place, read from the file that its source names."""

from __future__ import annotations

__all__ = ["SourceLine", "lines_around"]

import importlib.util
import linecache
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SourceLine:
    """One line of a file; `is_meant` on the line that the place names."""

    number: int
    text: str
    is_meant: bool


def lines_around(source: str, margin: int = 2) -> list[SourceLine]:
    """Up to `margin` lines before and after the line of `file.py:line`; none where the file cannot be found."""
    name, _, line = source.rpartition(":")
    path = _file_of(name)
    if path is None or not line.isdigit():
        return []
    meant = int(line)
    found = [(number, linecache.getline(str(path), number)) for number in range(max(meant - margin, 1), meant + margin + 1)]
    return [SourceLine(number, text.rstrip("\n"), number == meant) for number, text in found if text]


def _file_of(name: str) -> Path | None:
    """Sources of libraries are given from the package on: `timm/models/resnet.py`."""
    path = Path(name)
    if not name or path.is_file():
        return path if name else None
    package = path.parts[0]
    if path.is_absolute() or not package.isidentifier():
        return None
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((file for folder in folders if (file := Path(folder).parent / path).is_file()), None)
