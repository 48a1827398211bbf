"""Writes what follows from the code: docs/rules/ (a page a rule and an index), the tables of README.md and docs/norm_operators.md, the
rooms' lines of `pl_normkit/__init__.py`, and the catalog that the command line's help reads. The test-suite compares each with what is
committed."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import pkgutil
import re
from collections import defaultdict
from pathlib import Path

import pl_normkit.methods
from pl_normkit.catalog import CATALOG, catalog_of_code
from pl_normkit.methods.norm_operators.operators import operators
from pl_normkit.rules import Rule, load_rules

ROOT = Path(__file__).parents[1]
FAMILIES = {
    "NK0": "wiring of the run",
    "NK1": "dropout placement",
    "NK2": "weight decay",
    "NK3": "feature fusion, boxes, guided upsampling",
    "NK4": "numerics",
    "NK5": "atrous rates",
    "NK6": "attention prior",
    "NK7": "positions of vision transformers",
    "NK8": "groups and time embedding",
    "NK9": "depth and norm placement",
}


def page(rule: Rule) -> str:
    preview = " Preview: off until selected." if rule.preview else ""
    head = f"# {rule.code} {rule.name}\n\nSeverity: {rule.severity.value}. Mark: {rule.mark.value} ({rule.source}).{preview}\n"
    sections = [f"\n## {title}\n\n{text}\n" for title, text in rule.sections().items()]
    silence = f'\n## Silence\n\n`ignore=["{rule.code}"]`, `--ignore {rule.code}`, or `ignore = ["{rule.code}"]` in `[tool.pl-normkit]`.\n'
    return head + "".join(sections) + silence


def index(rules: list[Rule]) -> str:
    rows = [
        f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.mark.value} | {rule.fix_safety.value} | {rule.summary} |" for rule in rules
    ]
    return "\n".join(["# Rules", "", "| code | name | mark | fix | what it does |", "|---|---|---|---|---|", *rows, ""])


def families_table(rules: list[Rule]) -> str:
    """One row a family: its rules by name, previews apart."""
    members: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        members[rule.code[:3]].append(rule)
    rows = [f"| {prefix}xx | {FAMILIES[prefix]} | {_listed(found)} |" for prefix, found in sorted(members.items())]
    return "\n".join(["| codes | family | rules |", "|---|---|---|", *rows])


def _listed(rules: list[Rule]) -> str:
    shown = ", ".join(f"{rule.name} ({rule.code})" for rule in rules if not rule.preview)
    previews = ", ".join(f"{rule.name} ({rule.code})" for rule in rules if rule.preview)
    return "; ".join(part for part in (shown, f"previews: {previews}" if previews else "") if part)


def callbacks_table() -> str:
    """One row a callback: the first sentence of its docstring, and its page where docs/ has one of the module's name."""
    callbacks = importlib.import_module("pl_normkit.callbacks")
    rows = [_callback_row(getattr(callbacks, name)) for name in sorted(callbacks.__all__)]
    return "\n".join(["| callback | what it does | page |", "|---|---|---|", *rows])


def _callback_row(kind: type) -> str:
    sentence = re.split(r"(?<=\.)\s", " ".join((inspect.getdoc(kind) or "").split()), maxsplit=1)[0].rstrip(".")
    page = next((name for name in (kind.__module__.rpartition(".")[2], _room_of(kind)) if (ROOT / f"docs/{name}.md").exists()), "")
    return f"| `{kind.__name__}` | {sentence} | {f'[{page}](docs/{page}.md)' if page else ''} |"


def _room_of(callback: type) -> str:
    """The room that the callback's module takes its remedy or probe from."""
    sources = [str(getattr(value, "__module__", "")) for value in vars(importlib.import_module(callback.__module__)).values()]
    return next((source.split(".")[2] for source in sources if source.startswith("pl_normkit.methods.")), "-")


def norms_table() -> str:
    """One row a norm of `swap_norms`, from its file, with the time of a training step where benchmarks/results has it."""
    with (ROOT / "benchmarks/results/norm_step.csv").open(encoding="utf-8") as file:
        times = {row["norm"]: f"{row['time']} ({row['low']} to {row['high']})" for row in csv.DictReader(file)}
    head = "| `to` | formula | in place of | function at the start | options | needs | step time | when to try it | source (mark) |"
    rows = []
    for name, norm in sorted(operators().items()):
        options = ", ".join(f"`{key}={value!r}`" for key, value in norm.options.items())
        cells = [f"`{name}`", norm.formula, norm.replaces, norm.kept, options, norm.needs, times.get(name, "not measured"), norm.when]
        rows.append(" | ".join(["", *(cell.replace("|", "\\|") for cell in cells), f"{norm.source} ({norm.mark})", ""]).strip())
    return "\n".join([head, "|" + "---|" * 9, *rows])


def front_door() -> str:
    """The block that shows type checkers what `pl_normkit` exports: the core's names, and all that rooms export."""
    core = [(home, f"import {name} as {name}") for home, names in pl_normkit._CORE.items() for name in names]
    rooms = [(room.name, "import *") for room in pkgutil.iter_modules(pl_normkit.methods.__path__, "pl_normkit.methods.")]
    return "\n".join(f"    from {home} {names}" for home, names in sorted(core + rooms))


def between(text: str, start: str, end: str, new: str) -> str:
    """`text` with what stands between the lines `start` and `end` replaced. Raises ValueError where they are missing."""
    before, found, rest = text.partition(f"{start}\n")
    _, closed, after = rest.partition(f"{end}\n")
    if not (found and closed):
        raise ValueError(f"the lines {start.strip()!r} and {end.strip()!r} are missing")
    return f"{before}{start}\n{new}\n{end}\n{after}"


def documents() -> dict[Path, str]:
    """Every generated file with its content."""
    rules = list(load_rules().values())
    pages = {ROOT / f"docs/rules/{rule.code}.md": page(rule) for rule in rules}
    readme = (ROOT / "README.md").read_text()
    readme = between(readme, "<!-- callbacks: make docs -->", "<!-- end of callbacks -->", callbacks_table())
    readme = between(readme, "<!-- rules: make docs -->", "<!-- end of rules -->", families_table(rules))
    norms = ROOT / "docs/norm_operators.md"
    catalogue = between(norms.read_text(), "<!-- norms: make docs -->", "<!-- end of norms -->", norms_table())
    door = ROOT / "pl_normkit/__init__.py"
    exports = between(
        door.read_text(), "    # from here to the next comment: one line a room, written by `make docs`", "    # end of rooms", front_door()
    )
    catalog = json.dumps(catalog_of_code(), indent=1) + "\n"
    return pages | {
        ROOT / "docs/rules/README.md": index(rules),
        ROOT / "README.md": readme,
        norms: catalogue,
        door: exports,
        CATALOG: catalog,
    }


def main() -> None:
    for path, text in documents().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
