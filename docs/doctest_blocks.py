"""For `make site`: examples in docstrings, which stand in no section of their own, become blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class DoctestBlocks(griffe.Extension):
    """Fences every run of lines that starts with a prompt."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?:^>>> .*\n?)(?:.+\n?)*", _fenced, obj.docstring.value, flags=re.MULTILINE)


def _fenced(example: re.Match[str]) -> str:
    return f"```python\n{example[0].rstrip()}\n```\n"
