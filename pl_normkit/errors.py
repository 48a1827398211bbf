"""One exception family. Every message says what, where, on what evidence, how to fix it and how to silence it."""

from __future__ import annotations

__all__ = [
    "AuditFailedError",
    "ConfigError",
    "DataError",
    "EditError",
    "ModelSpecError",
    "NonFiniteError",
    "NormkitError",
    "NormkitWarning",
    "NothingMatchedError",
    "TraceError",
    "nearest",
]

import difflib
from collections.abc import Iterable


class NormkitError(Exception):
    """Base of everything this library raises on purpose.

    Args:
        what: what is wrong, one sentence.
        where: module path, source line, file or option.
        evidence: the value that was seen.
        fix: what to do about it.
        silence: how to switch the check off, where that is possible.
    """

    def __init__(self, what: str, *, where: str = "", evidence: str = "", fix: str = "", silence: str = "") -> None:
        self.what = what
        self.where = where
        self.evidence = evidence
        self.fix = fix
        self.silence = silence
        labelled = [("where", where), ("seen", evidence), ("fix", fix), ("silence", silence)]
        super().__init__("\n".join([what, *(f"  {label}: {text}" for label, text in labelled if text)]))

    def __reduce__(self) -> tuple[object, ...]:
        state = {"where": self.where, "evidence": self.evidence, "fix": self.fix, "silence": self.silence}
        return (_rebuild, (type(self), self.what, state))


def _rebuild(kind: type[NormkitError], what: str, fields: dict[str, str]) -> NormkitError:
    return kind(what, **fields)


class ConfigError(NormkitError):
    """An option, rule code, pattern or configuration key that does not exist."""


class ModelSpecError(NormkitError):
    """A model specification that cannot be turned into a module."""


class TraceError(NormkitError):
    """A model that `torch.export` cannot read."""


class EditError(NormkitError):
    """An edit that cannot be made; the model is as it was."""


class NothingMatchedError(EditError):
    """An edit that found nothing to edit."""


class DataError(NormkitError):
    """An image, mask, folder or batch that cannot be used."""


class AuditFailedError(NormkitError):
    """Findings at or above the severity the user asked to stop at."""


class NonFiniteError(NormkitError):
    """A training step that is not finite, where the user asked to stop."""


class NormkitWarning(UserWarning):
    """Category of every warning this library gives."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A "did you mean" clause for `word`, or the empty string when nothing in `known` is close."""
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), names, n=10, cutoff=0.5)
    return f"did you mean {names[max(close, key=lambda found: _likeness(found, word.lower()))]!r}?" if close else ""


def _likeness(first: str, second: str) -> tuple[float, int]:
    """How much of the two is alike; of two that are as like, the one with the longer common beginning."""
    common = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return difflib.SequenceMatcher(None, first, second).ratio(), common
