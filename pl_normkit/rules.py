"""What a rule is: the decorator and the registry. The subject it judges is imported from here too."""

from __future__ import annotations

__all__ = [
    "SECTIONS",
    "Fix",
    "Loaders",
    "Mark",
    "Needs",
    "Observation",
    "Rule",
    "Subject",
    "load_of_rooms",
    "load_rules",
    "rule",
    "without_explained",
]

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.findings import Evidence, Finding, FixSafety, Place, Severity, Witness
from pl_normkit.subject import Loaders, Needs, Subject

if TYPE_CHECKING:
    from torch import nn

    from pl_normkit.surgery import Changes, Filter

ENTRY_POINT_GROUP = "pl_normkit.rules"
SECTIONS = ("What it does", "Why it hurts", "Evidence", "Example", "Use instead", "Fix and its safety", "Source")


class Mark(StrEnum):
    """Where a rule's claim comes from: the paper states it, we derived it, or only our numbers show it."""

    PUBLISHED = "published"
    DERIVED = "derived"
    MEASURED = "measured"


@dataclass(frozen=True)
class Observation:
    """What a rule yields: the part of a finding that differs from case to case.

    `severity` and `fix_safety` are the rule's own unless given here.
    """

    message: str
    places: Sequence[Place]
    advice: str
    evidence: Sequence[Evidence] = ()
    severity: Severity | None = None
    fix_safety: FixSafety | None = None
    cause: str = ""
    witness: Witness | None = None


Check = Callable[[Subject], Iterable[Observation]]


class Fix(Protocol):
    """Mends what a rule finds: all of it, or with `filter_fn` what stands at the modules that it chooses."""

    def __call__(self, model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes: ...


@dataclass(frozen=True)
class Rule:
    """A check with its documentation.

    Attributes:
        code: `NK` and three digits; the hundreds name the family.
        name: the mistake in kebab case.
        severity: default severity of its findings.
        mark: what stands behind the claim.
        source: the paper or test that `mark` refers to.
        needs: parts the subject must have.
        fix_safety: safety of `fix`, `display` where there is none.
        fix: what fixes the findings of the rule.
        preview: off until selected by its own code or name, or by ALL.
        check: the function itself.
        explains: codes of rules whose finding at the same places is the same cause told with less.
    """

    code: str
    name: str
    severity: Severity
    mark: Mark
    source: str
    needs: frozenset[Needs]
    fix_safety: FixSafety
    fix: Fix | None
    preview: bool
    check: Check
    explains: tuple[str, ...] = ()

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.check) or ""

    @property
    def summary(self) -> str:
        """First sentence of the "What it does" section; of the docstring where another package's rule has no such section."""
        return re.split(r"(?<=\.)\s", " ".join((self.sections().get("What it does") or self.doc).split()), maxsplit=1)[0]

    def sections(self) -> dict[str, str]:
        """The docstring by section title, code blocks as they stand and paragraphs as one line each; a missing section is absent."""
        found: dict[str, list[str]] = {}
        current: list[str] = []
        for line in self.doc.splitlines():
            if line.strip() in SECTIONS:
                current = found.setdefault(line.strip(), [])
            elif not line or set(line.strip()) != {"-"}:
                current.append(line)
        return {title: _reflowed(lines) for title, lines in found.items()}

    def judge(self, subject: Subject) -> Iterator[Finding]:
        """The rule's findings on `subject`."""
        for seen in self.check(subject):
            yield Finding(
                code=self.code,
                name=self.name,
                severity=seen.severity or self.severity,
                message=_as_sentence(seen.message),
                places=tuple(seen.places),
                evidence=tuple(seen.evidence),
                advice=_as_sentence(seen.advice),
                fix_safety=seen.fix_safety or self.fix_safety,
                cause=seen.cause,
                witness=seen.witness,
            )


def _as_sentence(text: str) -> str:
    """With a capital letter, unless it begins with a name from code."""
    return text[:1].upper() + text[1:] if text.partition(" ")[0].rstrip(",:;").replace("-", "").isalpha() else text


def _reflowed(lines: Sequence[str]) -> str:
    """Paragraphs joined to one line each; fenced code and the items of lists keep their lines."""
    parts: list[str] = []
    fenced, starts = False, True
    for line in inspect.cleandoc("\n" + "\n".join(lines)).splitlines():
        is_fence = line.startswith("```")
        if fenced or is_fence or starts or not line or line.lstrip().startswith("- "):
            parts.append(line)
        else:
            parts[-1] += " " + line.strip()
        fenced ^= is_fence
        starts = is_fence or not line
    return "\n".join(parts).strip()


def without_explained(findings: Iterable[Finding]) -> list[Finding]:
    """The findings less those whose cause others at the same places tell in full."""
    found = list(findings)
    explained: dict[str, set[str]] = defaultdict(set)
    for finding in found:
        for code in _registry[finding.code].explains if finding.code in _registry else ():
            explained[code] |= {place.module for place in finding.places}
    return [f for f in found if f.code not in explained or not {place.module for place in f.places} <= explained[f.code]]


_registry: dict[str, Rule] = {}


def rule(
    code: str,
    name: str,
    *,
    mark: Mark,
    source: str,
    needs: Iterable[Needs] = (Needs.GRAPH,),
    severity: Severity = Severity.WARNING,
    fix: Fix | None = None,
    fix_safety: FixSafety = FixSafety.DISPLAY,
    preview: bool = False,
    explains: Sequence[str] = (),
) -> Callable[[Check], Check]:
    """Register the decorated check under `code`. The function's docstring is the rule's page (see `SECTIONS`).

    Raises ConfigError when the code is malformed or already taken by another function.
    """
    if not re.fullmatch(r"NK\d{3}|[A-Z]{3,8}\d{3}", code):
        raise ConfigError(
            f"{code!r} is not a rule code", fix="use NK and three digits; other packages use their own prefix of 3-8 capitals"
        )

    def register(check: Check) -> Check:
        known = _registry.get(code)
        if known is not None and (known.check.__module__, known.check.__qualname__) != (check.__module__, check.__qualname__):
            raise ConfigError(
                f"rule code {code} is taken twice",
                where=f"{known.check.__module__}.{known.check.__qualname__} and {check.__module__}.{check.__qualname__}",
                fix="give one of them another code",
            )
        _registry[code] = Rule(
            code=code,
            name=name,
            severity=severity,
            mark=mark,
            source=source,
            needs=frozenset(needs),
            fix_safety=fix_safety,
            fix=fix,
            preview=preview,
            check=check,
            explains=tuple(explains),
        )
        return check

    return register


def load_rules() -> dict[str, Rule]:
    """All rules by code, sorted: every room under `methods` and every entry point of the group `pl_normkit.rules`.

    A foreign entry point that fails to import gives one warning and is left out.
    """
    load_of_rooms("rules")
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _load_foreign(entry_point)
    return dict(sorted(_registry.items()))


def load_of_rooms(name: str) -> None:
    """Import the module called `name` of every room that has one: `rules` and `commands` register by being imported."""
    methods = importlib.import_module("pl_normkit.methods")
    for room in pkgutil.iter_modules(methods.__path__, "pl_normkit.methods."):
        if importlib.util.find_spec(f"{room.name}.{name}") is not None:
            importlib.import_module(f"{room.name}.{name}")


_failed_entry_points: set[str] = set()


def _load_foreign(entry_point: importlib.metadata.EntryPoint) -> None:
    if entry_point.value in _failed_entry_points:
        return
    try:
        entry_point.load()
    except (Exception, SystemExit) as error:
        _failed_entry_points.add(entry_point.value)
        warnings.warn(
            f"rules of entry point {entry_point.name!r} ({entry_point.value}) are left out: {type(error).__name__}: {error}",
            NormkitWarning,
            stacklevel=2,
        )
