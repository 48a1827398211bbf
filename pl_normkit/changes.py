"""What a fix did, and the way back: plain data."""

from __future__ import annotations

__all__ = ["Change", "Changes", "Undo"]

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

Undo = Callable[[], None]


@dataclass(frozen=True)
class Change:
    """One edit that was made: the module path and what happened there."""

    module: str
    what: str

    def __str__(self) -> str:
        return f"{self.module or '(the model)'}: {self.what}"


@dataclass
class Changes:
    """What a fix did.

    Attributes:
        made: the edits, in the order they were made; empty when the model already was as the fix wants it.
        skipped: what the fix had to leave alone, and why.
    """

    made: list[Change] = field(default_factory=list)
    skipped: list[Change] = field(default_factory=list)
    _undo: list[Undo] = field(default_factory=list, repr=False)

    def add(self, later: Changes) -> None:
        """Take in what was done after this; `undo` then takes both back, the later first."""
        self.made += later.made
        self.skipped += later.skipped
        self._undo.append(later.undo)

    def undo(self) -> None:
        """Give back the original model: the same module objects, hooks and attributes. A second call does nothing.

        Where an edit cannot be taken back, because something was changed over it, the error says which, and a later call goes on there.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also in another process, tells what was done; only the original, which knows the model, takes it back."""
        return vars(self) | {"_undo": []}

    def __bool__(self) -> bool:
        """Whether anything was changed."""
        return bool(self.made)

    def __str__(self) -> str:
        lines = [*map(str, self.made), *(f"{change} (skipped)" for change in self.skipped)]
        return "\n".join(lines) or "nothing to change"

    def _repr_html_(self) -> str:
        """How a notebook shows what was done."""
        rows = [(change, "made") for change in self.made] + [(change, "skipped") for change in self.skipped]
        cells = [f"<tr><td>{how}</td><td><code>{escape(str(change))}</code></td></tr>" for change, how in rows]
        return f"<table>{''.join(cells)}</table>" if cells else "<p>nothing to change</p>"
