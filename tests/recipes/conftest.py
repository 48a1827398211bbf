from pathlib import Path

import pytest
from segmentation_tree import CLASSES, write_pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images with palette masks and a class list."""
    root = tmp_path / "data"
    write_pairs(root, 6)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root
