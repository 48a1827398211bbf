"""Lint every model that a repository lists in its pyproject.toml: in parallel processes, from a cache where nothing has changed."""

from __future__ import annotations

__all__ = ["Entry", "lint_repository", "needed_imports", "read_entries", "within_repository"]

import hashlib
import importlib.metadata
import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.findings import Note, Place
from pl_normkit.jobs import Failure, open_workers, run_jobs
from pl_normkit.report import Report
from pl_normkit.report.json_format import from_json

CACHE = ".pl_normkit_cache"


@dataclass(frozen=True)
class Entry:
    """One model of `[tool.pl-normkit.models]`.

    Attributes:
        name: its key in the table.
        words: what `pl-normkit lint` would be called with.
        source: the file and line of the table, the place of findings in library code.
    """

    name: str
    words: tuple[str, ...]
    source: str


def read_entries(path: Path) -> list[Entry]:
    """The models that `path`, a pyproject.toml, lists, in its order.

    Each is a table with `model` (a specification) and the long options of `pl-normkit lint` without their dashes, a list where an
    option may be given more than once:

        [tool.pl-normkit.models.classifier]
        model = "timm:resnet50"
        input = ["3,224,224"]
        optimizer = "torch.optim.AdamW(lr=1e-3, weight_decay=0.05)"

    Raises:
        ConfigError: when the file cannot be read or a table is not of this form.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text).get("tool", {}).get("pl-normkit", {}).get("models", {})
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError("pyproject.toml cannot be read", where=str(path), evidence=f"{type(error).__name__}: {error}") from error
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError("[tool.pl-normkit.models] holds one table a model", where=str(path), fix="write [tool.pl-normkit.models.NAME]")
    lines = text.splitlines()
    return [Entry(name, tuple(_words(name, table, path)), f"{path.name}:{_line_of(name, lines)}") for name, table in tables.items()]


def _words(name: str, table: Mapping[str, Any], path: Path) -> Iterator[str]:
    if isinstance(table.get("model"), str):
        yield table["model"]
    elif "loss" not in table:
        raise ConfigError(f"the model {name!r} names no model", where=str(path), fix='write model = "package.module:builder"')
    for option, value in table.items():
        if option == "model":
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                yield from [f"--{option}"] if item else []
            elif isinstance(item, (str, int, float)):
                yield f"--{option}={item}"
            else:
                raise ConfigError(f"{option!r} of the model {name!r} is no text", where=str(path), evidence=repr(item))


def _line_of(name: str, lines: Sequence[str]) -> int:
    heads = {f"[tool.pl-normkit.models.{key}]" for key in (name, f'"{name}"', f"'{name}'")}
    return next((number for number, line in enumerate(lines, 1) if line.split("#")[0].strip() in heads), 1)


def lint_repository(
    entries: Sequence[Entry],
    lint: Callable[[Sequence[str]], Report],
    root: Path,
    *,
    jobs: int | None = None,
    on: str = "processes",
    limit: float | None = None,
    cache: Path | None = None,
    done: Callable[[Entry], None] = lambda _: None,
) -> dict[str, Report]:
    """The report of every entry, by name.

    Args:
        entries: as from `read_entries`.
        lint: from words to a report; an importable function, since other processes call it.
        root: the repository.
        jobs: how many at a time; one a core, a GPU or a core of the cluster by default.
        on: where they run: "processes" of this machine, its "gpus", or a "ray" cluster.
        limit: seconds after which a model is given up.
        cache: folder of reports of earlier runs; None keeps none. A report is taken from there while the entry, every Python file of the
            repository and the installed versions of all packages are the same. One that says that something failed is not kept.
        done: called with each entry as its report comes in.
    """
    state = _state(root) if cache is not None else ""
    files = {entry.name: cache / f"{_digest(state, *entry.words)}.json" if cache is not None else None for entry in entries}
    reports = {entry.name: report for entry in entries if (report := _cached(files[entry.name])) is not None}
    missing = [entry for entry in entries if entry.name not in reports]
    for entry in entries:
        if entry.name in reports:
            done(entry)
    if missing:
        at_once = _at_once(on, jobs, len(missing))
        with open_workers(on, partial(_words_to_report, lint), at_once=at_once, imports=needed_imports(missing)) as workers:
            for entry, result in run_jobs(workers, missing, limit=limit):
                reports[entry.name] = _report(result)
                _keep(files[entry.name], reports[entry.name])
                done(entry)
    return {entry.name: within_repository(replace(reports[entry.name], subject=entry.name), root, entry) for entry in entries}


def needed_imports(entries: Sequence[Entry]) -> list[str]:
    """What to import before these models are audited: ours, and the libraries that their specifications name."""
    named = {entry.words[0].partition(":")[0] for entry in entries if entry.words}
    libraries = {"timm": "timm", "smp": "segmentation_models_pytorch", "torchvision": "torchvision"}
    return ["pl_normkit.linting", "torch.export", *(library for form, library in libraries.items() if form in named)]


def _at_once(on: str, jobs: int | None, models: int) -> int | None:
    """No more processes here than models; a cluster says itself how much it can take."""
    return min(jobs or os.cpu_count() or 1, models) if on == "processes" else jobs


def _words_to_report(lint: Callable[[Sequence[str]], Report], entry: Entry) -> Report:
    return lint(entry.words)


def _report(result: Report | Failure) -> Report:
    """A model that cannot be linted is a note of its report; the others go on."""
    if not isinstance(result, Failure):
        return result
    return Report(notes=[Note(str(result.error) if result.error is not None else f"the audit failed: {result.text}")])


def _state(root: Path) -> str:
    """A digest of all that an audit depends on beside its words."""
    installed = list(importlib.metadata.distributions())
    packages = sorted(f"{found.name}=={found.version}" for found in installed)
    folders = {root.resolve(), *_python_path(), *(folder for found in installed for folder in _edited_in_place(found))}
    sources = sorted({path for folder in folders for path in _files(folder) if path.suffix in _SOURCES and path.is_file()})
    return _digest(sys.version, *packages, *map(str, sources), *map(_digest_of_file, sources))


_SOURCES = (".py", ".toml", ".json", ".yaml", ".yml")


def _python_path() -> Iterator[Path]:
    """Folders of code that is not installed and changes without a new version."""
    for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if entry and Path(entry).is_dir():
            yield Path(entry).resolve()


def _edited_in_place(package: importlib.metadata.Distribution) -> Iterator[Path]:
    """The folder of an editable installation."""
    try:
        record = json.loads(package.read_text("direct_url.json") or "{}")
    except ValueError:
        return
    folder = Path(unquote(urlparse(str(record.get("url", ""))).path))
    if record.get("dir_info", {}).get("editable") and folder.is_dir():
        yield folder.resolve()


def _files(root: Path) -> Iterator[Path]:
    """Of folders that are not hidden and hold nothing built or installed, which may be large."""
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name not in _LEFT_OUT and not (Path(folder) / name / "pyvenv.cfg").is_file()
        ]
        yield from (Path(folder) / name for name in names if not name.startswith("."))


_LEFT_OUT = {"build", "dist", "node_modules", "site-packages", "__pycache__"}


def _digest_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode(errors="surrogatepass")).hexdigest()[:32]


def _cached(file: Path | None) -> Report | None:
    try:
        return from_json(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None
    except (OSError, DataError):  # of another version, or cut off: it is written anew
        return None


def _keep(file: Path | None, report: Report) -> None:
    if file is None or report.failures:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(report.to_json(), encoding="utf-8")
    draft.replace(file)


def within_repository(report: Report, root: Path, entry: Entry) -> Report:
    """Places in code of a library stand at the line that configures the model, the library's own line second."""

    def move(place: Place) -> Place:
        file = Path(place.source.rpartition(":")[0])
        inside = bool(place.source) and (root / file).is_file() and (root / file).resolve().is_relative_to(root.resolve())
        if not inside or {"site-packages", ".venv"} & set(file.parts):
            return Place(place.module, entry.source, place.source)
        return replace(place, source=f"{(root / file).resolve().relative_to(root.resolve()).as_posix()}:{place.source.rpartition(':')[2]}")

    findings = [replace(finding, places=tuple(map(move, finding.places))) for finding in report.findings]
    return replace(report, findings=findings)
