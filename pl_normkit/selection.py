"""Which rules run, and where they are silent: from arguments, and from `[tool.pl-normkit]` of a pyproject.toml."""

from __future__ import annotations

__all__ = ["Selection"]

import fnmatch
import tomllib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pl_normkit.errors import ConfigError, NormkitWarning, nearest
from pl_normkit.findings import Finding, Place
from pl_normkit.project import nearest_pyproject
from pl_normkit.rules import Rule, load_rules


@dataclass(frozen=True)
class Selection:
    """Which rules run, and where.

    Attributes:
        select: codes, code prefixes ("NK1"), names, "DEFAULT" or "ALL"; None is the default set (all but previews).
        ignore: codes, prefixes or names that do not run.
        per_module_ignore: module-path pattern (fnmatch) -> codes, prefixes or names silenced there.
        optional: the patterns that need not match: a repository's pyproject.toml speaks of several models.
    """

    select: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    per_module_ignore: Mapping[str, Sequence[str]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """A bare string is a sequence too, of letters that name rules by prefix: refuse it. Raises ConfigError."""
        for words in (self.select or (), self.ignore, *self.per_module_ignore.values()):
            if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
                raise ConfigError("rules are given as a list of codes, prefixes or names", evidence=repr(words), fix='write ["NK101"]')

    @classmethod
    def from_pyproject(cls, start: Path | None = None) -> Selection:
        """Read `[tool.pl-normkit]` from the nearest pyproject.toml at or above `start` (default: the working directory).

        Raises ConfigError on a key or a value type that is not known.
        """
        path = nearest_pyproject(start)
        return cls() if path is None else cls._from_file(path)

    @classmethod
    def _from_file(cls, path: Path) -> Selection:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError("pyproject.toml cannot be read", where=str(path), evidence=str(error)) from error
        tools = document.get("tool", {})
        if not isinstance(tools, dict):
            raise ConfigError("[tool] must be a table", where=str(path), evidence=repr(tools)[:80])
        table = tools.get("pl-normkit", {})
        if not isinstance(table, dict):
            raise ConfigError("[tool.pl-normkit] must be a table", where=str(path), evidence=repr(table)[:80])
        known = {"select": list, "ignore": list, "per-module-ignore": dict, "models": dict}
        for key, value in table.items():
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} in [tool.pl-normkit]",
                    where=str(path),
                    fix=nearest(key, known) or f"known keys: {', '.join(known)}",
                )
            if not isinstance(value, known[key]):
                raise ConfigError(f"{key!r} in [tool.pl-normkit] must be a {known[key].__name__}", where=str(path), evidence=repr(value))
        try:
            patterns = table.get("per-module-ignore", {})
            return cls(table.get("select"), table.get("ignore", ()), patterns, frozenset(patterns))
        except ConfigError as error:
            raise ConfigError(error.what, where=f"[tool.pl-normkit] in {path}", evidence=error.evidence, fix=error.fix) from error

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
            self,
            select=self.select if select is None else select,
            ignore=(*self.ignore, *given.ignore),
            per_module_ignore=merged,
            optional=self.optional - given.per_module_ignore.keys(),
        )

    def rules(self) -> list[Rule]:
        """The rules to run, by code. Raises ConfigError for a word that names no rule."""
        rules = load_rules()
        chosen = self._resolve(["DEFAULT"] if self.select is None else self.select, rules, previews=False)
        return [rules[code] for code in sorted(chosen - self._resolve(self.ignore, rules))]

    def silence(self, findings: Iterable[Finding], module_names: Iterable[str]) -> list[Finding]:
        """Findings without the places silenced by `per_module_ignore`.

        Raises ConfigError for a pattern that matches no name in `module_names`; for one that is optional, a model gets a warning.
        """
        if not self.per_module_ignore:
            return list(findings)
        names = list(module_names)
        rules = load_rules()
        silenced: list[tuple[str, set[str]]] = []
        for pattern, words in self.per_module_ignore.items():
            codes = self._resolve(words, rules)
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                what = f"the per-module-ignore pattern {pattern!r} matches no module"
                if pattern not in self.optional:
                    raise ConfigError(what, fix=nearest(pattern, names) or "see model.named_modules()")
                if names:
                    warnings.warn(f"{what} of this model. {nearest(pattern, names)}".rstrip(), NormkitWarning, stacklevel=2)
            silenced.append((pattern, codes))
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
                raise ConfigError(f"unknown rule {word!r}", fix=nearest(word, names) or "see `pl-normkit rules`")
            chosen |= matched
        return chosen


def _without_silenced(finding: Finding, silenced: Sequence[tuple[str, set[str]]]) -> Finding | None:
    def is_silenced(place: Place) -> bool:
        return any(finding.code in codes and fnmatch.fnmatchcase(place.module, pattern) for pattern, codes in silenced)

    places = tuple(place for place in finding.places if not is_silenced(place))
    if finding.places and not places:
        return None
    return replace(finding, places=places)
