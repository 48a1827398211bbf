"""What an audit finds: plain data, no behaviour beyond its own fields."""

from __future__ import annotations

__all__ = [
    "Evidence",
    "Finding",
    "FixSafety",
    "Note",
    "NoteKind",
    "Place",
    "Severity",
    "Witness",
    "read_baseline",
    "subtract_baseline",
    "write_baseline",
]

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pl_normkit.errors import ConfigError


class Severity(StrEnum):
    """How much a finding matters; `note` < `warning` < `error`."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class FixSafety(StrEnum):
    """What applying the fix does: `safe` keeps the function now or in eval mode, `unsafe` changes what is trained,
    `display` means there is advice only."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    DISPLAY = "display"


@dataclass(frozen=True)
class Place:
    """One spot in the user's program.

    Attributes:
        module: path as in `model.named_modules()`, or a parameter name; "" is the model itself.
        source: `file.py:line` of the code that runs there, "" where unknown.
        library: `file.py:line` in a library's code, where `source` names the line of the user's that leads to it.
    """

    module: str
    source: str = ""
    library: str = ""

    def __str__(self) -> str:
        name = self.module or "(the model)"
        sources = ", ".join(source for source in (self.source, self.library) if source)
        return f"{name} ({sources})" if sources else name


@dataclass(frozen=True)
class Evidence:
    """A number for this very subject.

    Attributes:
        what: the quantity, such as "variance of the input of bn2, eval over train".
        value: its value.
        expected: what it should be, as a number or a range in words.
        unit: unit of `value`, "" for ratios and counts.
        is_measured: False for what is read off the settings or follows from them by a formula.
    """

    what: str
    value: float
    expected: str = ""
    unit: str = ""
    is_measured: bool = True

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        expected = f" (should be {self.expected})" if self.expected else ""
        return f"{self.what}: {self.value:.4g}{unit}{expected}"


@dataclass(frozen=True)
class Witness:
    """A case in which what a finding says happens.

    Attributes:
        arguments: what to call the audited function with: a tuple (positional) or a dict (keywords) of values without a gradient.
        changed: how they differ from the example, one line an argument; empty where the example itself is the case.
        outcome: what happens then.
        script: the file that shows it (`python SCRIPT`), "" where none was written.
    """

    arguments: Any = field(repr=False)
    changed: tuple[str, ...]
    outcome: str
    script: str = ""

    def __str__(self) -> str:
        reproduce = f"; reproduce: python {self.script}" if self.script else ""
        return f"{' and '.join(self.changed) or 'the example itself'}: {self.outcome}{reproduce}"


@dataclass(frozen=True)
class Finding:
    """One cause, with all the places it shows at.

    `cause` tells two findings of one rule apart when they share their places; it enters the fingerprint. `witness` is a case in
    which it happens, where one was looked for and found.
    """

    code: str
    name: str
    severity: Severity
    message: str
    places: tuple[Place, ...]
    evidence: tuple[Evidence, ...]
    advice: str
    fix_safety: FixSafety
    cause: str = ""
    witness: Witness | None = field(default=None, compare=False)

    @property
    def fingerprint(self) -> str:
        """Stable over runs, line numbers and library versions: made of the code, the cause and the module paths."""
        return _digest(self.code, self.cause, *sorted({place.module for place in self.places}))

    @property
    def silence(self) -> str:
        return f'ignore=["{self.code}"]'


class NoteKind(StrEnum):
    """What a note of a report says: something `failed`, something was `not run` for lack of a part, or plain `information`."""

    FAILED = "failed"
    NOT_RUN = "not run"
    INFORMATION = "information"


@dataclass(frozen=True)
class Note:
    """What an audit says beside its findings; as text it is the text alone."""

    text: str
    kind: NoteKind = NoteKind.FAILED

    def __str__(self) -> str:
        return self.text


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode(errors="surrogatepass")).hexdigest()[:20]


def _place_key(finding: Finding, place: Place) -> str:
    return _digest(finding.code, finding.cause, place.module)


_BASELINE_VERSION = 1


def write_baseline(path: Path, findings: Iterable[Finding]) -> None:
    """Accept today's findings: write one key per (rule, cause, module path) to `path` as JSON."""
    accepted = sorted({_place_key(finding, place) for finding in findings for place in finding.places or (Place(""),)})
    path.write_text(json.dumps({"version": _BASELINE_VERSION, "accepted": accepted}, indent=1) + "\n")


def read_baseline(path: Path) -> frozenset[str]:
    """Keys accepted in `path`. Raises ConfigError when it is missing or no baseline."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        accepted = document["accepted"]
        if document.get("version") != _BASELINE_VERSION:
            raise ValueError(f"version {document.get('version')!r}, and this is for version {_BASELINE_VERSION}")
        if not isinstance(accepted, list) or not all(isinstance(key, str) for key in accepted):
            raise TypeError("'accepted' is no list of texts")
        return frozenset(accepted)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            "the baseline file cannot be read",
            where=str(path),
            evidence=f"{type(error).__name__}: {error}",
            fix="write one with --write-baseline",
        ) from error


def subtract_baseline(findings: Sequence[Finding], accepted: frozenset[str]) -> list[Finding]:
    """Findings with the accepted places taken out; a finding with no place left is gone."""
    remaining = []
    for finding in findings:
        places = tuple(place for place in finding.places or (Place(""),) if _place_key(finding, place) not in accepted)
        if places:
            remaining.append(replace(finding, places=places if finding.places else ()))
    return remaining
