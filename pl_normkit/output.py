"""What the command line writes: any name can be printed, and no text of a plugin or a user's module is taken for a command of a CI log."""

from __future__ import annotations

__all__ = ["CalmStream", "calm", "say", "screen", "tolerate_any_text"]

import io
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_BRACKETED = re.compile(r"##(?=\w*\[)")  # GitHub's older form, Azure's ##vso[, TeamCity's ##teamcity[


def calm(text: str) -> str:
    """`text` in which no line is a workflow command: GitHub reads a line that starts with `::`, after white space too."""
    return _BRACKETED.sub("# #", "".join(_calm_line(line) for line in text.splitlines(keepends=True)))


def _calm_line(line: str) -> str:
    return line.replace("::", ": :", 1) if line.lstrip().startswith("::") else line


class CalmStream:
    """A text stream that writes to `stream` what `calm` leaves."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(calm(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def screen(stream: TextIO, width: int | None) -> Console:
    """A console that writes calm text to `stream`, `width` characters wide (None: as wide as the terminal)."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            """Rich would leave the process; who reads our output may stop at any time."""
            raise BrokenPipeError

    return PipedConsole(file=CalmStream(stream), emoji=False, width=width)  # type: ignore[arg-type]


def say(text: str) -> None:
    """Write lines to standard error."""
    print(calm(text), file=sys.stderr)  # noqa: T201


def tolerate_any_text() -> None:
    """Paths and module names may hold what the terminal's encoding, or any, cannot write: they are then escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
