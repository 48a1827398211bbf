"""What a rule is: the decorator, the registry, the subject it judges, selection and suppression."""

from __future__ import annotations

__all__ = ["Fix", "Loaders", "Mark", "Needs", "Observation", "Rule", "Selection", "Subject", "load_of_rooms", "load_rules", "rule"]

import fnmatch
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from pl_normkit.errors import ConfigError, NormkitWarning, nearest
from pl_normkit.findings import Evidence, Finding, FixSafety, Place, Severity
from pl_normkit.wrappers import unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from pl_normkit.graph import ModelGraph
    from pl_normkit.surgery import Changes, Filter

T = TypeVar("T")

ENTRY_POINT_GROUP = "pl_normkit.rules"
SECTIONS = ("What it does", "Why it hurts", "Evidence", "Example", "Use instead", "Fix and its safety", "Source")


class Mark(StrEnum):
    """Where a rule's claim comes from: the paper states it, we derived it, or only our numbers show it."""

    PUBLISHED = "published"
    DERIVED = "derived"
    MEASURED = "measured"


class Needs(StrEnum):
    """What a subject must hold before a rule can judge it."""

    MODEL = "model"
    GRAPH = "graph"
    OPTIMIZERS = "optimizers"
    LOSS = "loss"
    BATCH = "batch"
    LOADERS = "loaders"


@dataclass(frozen=True)
class Loaders:
    """Where a run's batches come from. Rules read how they are made, and draw batches only where `Subject.measure` allows it.

    Attributes:
        train: iterable of batches as the training loop draws them, None where unknown.
        evaluation: the same for validation.
        transforms: what else may change a batch on its way into the model: a timm `Mixup`, a LightningModule, a data module.
    """

    train: Iterable[Any] | None = None
    evaluation: Iterable[Any] | None = None
    transforms: Sequence[Any] = ()


@dataclass
class Subject:
    """What is judged. Every part is optional; a rule runs when the parts it needs are there.

    Attributes:
        model: the module, as the user built it; one that is compiled or wrapped for several devices stands for the original.
        root: the module that reported paths are relative to, where `model` is a part of it (a LightningModule's network).
        example_inputs: what `model` is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        graph: the traced model; None where there was nothing to trace or tracing failed.
        optimizers: the optimizers of the run.
        loss: the scalar loss of a real step, with its autograd graph.
        batch: a real batch, as the data loader gave it.
        loaders: the data of the run.
        measure: whether rules may run the model and draw batches to measure (never done on meta-device models or under sharding).
        cannot_be_traced: tracing failed and was reported; it is not tried again.
    """

    model: nn.Module | None = None
    root: nn.Module | None = None
    example_inputs: Any = None
    graph: ModelGraph | None = None
    optimizers: Sequence[Optimizer] = ()
    loss: Tensor | None = None
    batch: Any = None
    loaders: Loaders | None = None
    measure: bool = True
    cannot_be_traced: bool = False
    _memo: dict[Callable[..., Any], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.model is not None:
            self.model = unwrapped(self.model)

    def has(self, need: Needs) -> bool:
        value = getattr(self, need.value)
        return value is not None and not (isinstance(value, Sequence) and len(value) == 0)

    def once(self, probe: Callable[[Subject], T]) -> T:
        """`probe(self)`, run at most once per subject however many rules ask for it."""
        if probe not in self._memo:
            self._memo[probe] = probe(self)
        return cast(T, self._memo[probe])


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
        fix: what mends the findings of the rule.
        preview: off until selected by its own code or name, or by ALL.
        check: the function itself.
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

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.check) or ""

    @property
    def summary(self) -> str:
        """First sentence of the "What it does" section; of the docstring where another package's rule has no such section."""
        return re.split(r"(?<=\.)\s", self.sections().get("What it does") or " ".join(self.doc.split()), maxsplit=1)[0]

    def sections(self) -> dict[str, str]:
        """The docstring by section title; a missing section is absent."""
        found: dict[str, list[str]] = {}
        current: list[str] = []
        for line in self.doc.splitlines():
            if line.strip() in SECTIONS:
                current = found.setdefault(line.strip(), [])
            elif set(line.strip()) != {"-"}:
                current.append(line)
        return {title: " ".join(" ".join(lines).split()) for title, lines in found.items()}

    def judge(self, subject: Subject) -> Iterator[Finding]:
        """The rule's findings on `subject`."""
        for seen in self.check(subject):
            yield Finding(
                code=self.code,
                name=self.name,
                severity=seen.severity or self.severity,
                message=seen.message,
                places=tuple(seen.places),
                evidence=tuple(seen.evidence),
                advice=seen.advice,
                fix_safety=seen.fix_safety or self.fix_safety,
                cause=seen.cause,
            )


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
) -> Callable[[Check], Check]:
    """Register the decorated check under `code`. The function's docstring is the rule's page (see `SECTIONS`).

    Raises ConfigError when the code is malformed or already taken by another function.
    """
    if not re.fullmatch(r"NK\d{3}|[A-Z]{3,8}\d{3}", code):
        raise ConfigError(
            f"{code!r} is not a rule code", mend="use NK and three digits; other packages use their own prefix of 3-8 capitals"
        )

    def register(check: Check) -> Check:
        known = _registry.get(code)
        if known is not None and (known.check.__module__, known.check.__qualname__) != (check.__module__, check.__qualname__):
            raise ConfigError(
                f"rule code {code} is taken twice",
                where=f"{known.check.__module__}.{known.check.__qualname__} and {check.__module__}.{check.__qualname__}",
                mend="give one of them another code",
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
    except Exception as error:
        _failed_entry_points.add(entry_point.value)
        warnings.warn(
            f"rules of entry point {entry_point.name!r} ({entry_point.value}) are left out: {type(error).__name__}: {error}",
            NormkitWarning,
            stacklevel=2,
        )


@dataclass(frozen=True)
class Selection:
    """Which rules run, and where.

    Attributes:
        select: codes, code prefixes ("NK1"), names, "DEFAULT" or "ALL"; None is the default set (all but previews).
        ignore: codes, prefixes or names that do not run.
        per_module_ignore: module-path pattern (fnmatch) -> codes, prefixes or names silenced there.
    """

    select: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    per_module_ignore: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A bare string is a sequence too, of letters that name rules by prefix: refuse it. Raises ConfigError."""
        for words in (self.select or (), self.ignore, *self.per_module_ignore.values()):
            if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
                raise ConfigError("rules are given as a list of codes, prefixes or names", evidence=repr(words), mend='write ["NK101"]')

    @classmethod
    def from_pyproject(cls, start: Path | None = None) -> Selection:
        """Read `[tool.pl-normkit]` from the nearest pyproject.toml at or above `start` (default: the working directory).

        Raises ConfigError on a key or a value type that is not known.
        """
        folder = (start or Path.cwd()).resolve()
        for candidate in (folder, *folder.parents):
            path = candidate / "pyproject.toml"
            if path.is_file():
                return cls._from_file(path)
        return cls()

    @classmethod
    def _from_file(cls, path: Path) -> Selection:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("pl-normkit", {})
        except (OSError, ValueError) as error:
            raise ConfigError("pyproject.toml cannot be read", where=str(path), evidence=str(error)) from error
        if not isinstance(table, dict):
            raise ConfigError("[tool.pl-normkit] must be a table", where=str(path), evidence=repr(table))
        known = {"select": list, "ignore": list, "per-module-ignore": dict}
        for key, value in table.items():
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} in [tool.pl-normkit]",
                    where=str(path),
                    mend=nearest(key, known) or f"known keys: {', '.join(known)}",
                )
            if not isinstance(value, known[key]):
                raise ConfigError(f"{key!r} in [tool.pl-normkit] must be a {known[key].__name__}", where=str(path), evidence=repr(value))
        try:
            return cls(table.get("select"), table.get("ignore", ()), table.get("per-module-ignore", {}))
        except ConfigError as error:
            raise ConfigError(error.what, where=f"[tool.pl-normkit] in {path}", evidence=error.evidence, mend=error.mend) from error

    def override(
        self,
        select: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        per_module_ignore: Mapping[str, Sequence[str]] | None = None,
    ) -> Selection:
        """Put what is given over this selection: `select` replaces, the two ignores are added."""
        given = Selection(select, ignore or (), per_module_ignore or {})
        merged = dict(self.per_module_ignore)
        for pattern, words in given.per_module_ignore.items():
            merged[pattern] = [*merged.get(pattern, ()), *words]
        return replace(
            self, select=self.select if select is None else select, ignore=(*self.ignore, *given.ignore), per_module_ignore=merged
        )

    def rules(self) -> list[Rule]:
        """The rules to run, by code. Raises ConfigError for a word that names no rule."""
        rules = load_rules()
        chosen = self._resolve(["DEFAULT"] if self.select is None else self.select, rules, previews=False)
        return [rules[code] for code in sorted(chosen - self._resolve(self.ignore, rules))]

    def silence(self, findings: Iterable[Finding], module_names: Iterable[str]) -> list[Finding]:
        """Findings without the places silenced by `per_module_ignore`.

        Raises ConfigError for a pattern that matches no name in `module_names`.
        """
        if not self.per_module_ignore:
            return list(findings)
        names = list(module_names)
        rules = load_rules()
        silenced: list[tuple[str, set[str]]] = []
        for pattern, words in self.per_module_ignore.items():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"the per-module-ignore pattern {pattern!r} matches no module",
                    mend=nearest(pattern, names) or "see model.named_modules()",
                )
            silenced.append((pattern, self._resolve(words, rules)))
        return [kept for finding in findings if (kept := _without_silenced(finding, silenced)) is not None]

    @staticmethod
    def _resolve(words: Sequence[str], rules: Mapping[str, Rule], *, previews: bool = True) -> set[str]:
        """Codes that `words` name; `previews` says whether a code prefix reaches preview rules."""
        chosen: set[str] = set()
        for word in words:
            if word == "ALL":
                matched = set(rules)
            elif word == "DEFAULT":
                matched = {code for code, known in rules.items() if not known.preview}
            elif word in rules:
                matched = {word}
            else:
                matched = {code for code, known in rules.items() if known.name == word}
                matched |= {code for code, known in rules.items() if word and code.startswith(word) and (previews or not known.preview)}
            if not matched:
                names = [*rules, *(known.name for known in rules.values())]
                raise ConfigError(f"unknown rule {word!r}", mend=nearest(word, names) or "see `pl-normkit rules`")
            chosen |= matched
        return chosen


def _without_silenced(finding: Finding, silenced: Sequence[tuple[str, set[str]]]) -> Finding | None:
    def is_silenced(place: Place) -> bool:
        return any(finding.code in codes and fnmatch.fnmatchcase(place.module, pattern) for pattern, codes in silenced)

    places = tuple(place for place in finding.places if not is_silenced(place))
    if finding.places and not places:
        return None
    return replace(finding, places=places)
