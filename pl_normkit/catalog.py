"""What `--help`, `rules` and `explain` show, kept as data so that they need not load torch: `make docs` writes it, a test compares it."""

from __future__ import annotations

__all__ = ["CATALOG", "CatalogRule", "catalog_of_code", "catalog_rules", "read_catalog", "rules_of_code"]

import importlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

CATALOG = Path(__file__).with_name("catalog.json")
ENTRY_POINT_GROUP = "pl_normkit.rules"


@dataclass(frozen=True)
class CatalogRule:
    """The part of a `Rule` that people read."""

    code: str
    name: str
    severity: str
    mark: str
    source: str
    fix_safety: str
    preview: bool
    summary: str
    sections: dict[str, str]


@cache
def read_catalog() -> dict[str, Any]:
    """What the file says; where there is none yet, what the code says."""
    if not CATALOG.is_file():
        return catalog_of_code()
    catalog: dict[str, Any] = json.loads(CATALOG.read_text(encoding="utf-8"))
    return catalog


def catalog_of_code() -> dict[str, Any]:
    """Rules by code, commands by name with their arguments, and the options that rooms add to `lint`. Loads every room."""
    commands = importlib.import_module("pl_normkit.commands")
    return {
        "rules": {rule.code: asdict(rule) for rule in rules_of_code() if rule.code.startswith("NK")},
        "commands": {
            command.name: {"help": command.help, "arguments": _as_data(command.arguments)} for command in commands.load_commands()
        },
        "lint": [_as_data(part.arguments) for part in commands.load_lint_parts()],
    }


def _as_data(arguments: Any) -> dict[str, dict[str, Any]]:
    """Arguments of argparse in JSON's types; a converter is left out, since help does not run it."""
    return {name: {key: value for key, value in settings.items() if key != "type"} for name, settings in arguments.items()}


def catalog_rules() -> list[CatalogRule]:
    """All rules by code. Only where another package brings some is any code loaded."""
    if importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        return rules_of_code()
    return [CatalogRule(**fields) for fields in read_catalog()["rules"].values()]


def rules_of_code() -> list[CatalogRule]:
    rules = importlib.import_module("pl_normkit.rules").load_rules()
    return [
        CatalogRule(
            code=rule.code,
            name=rule.name,
            severity=rule.severity.value,
            mark=rule.mark.value,
            source=rule.source,
            fix_safety=rule.fix_safety.value,
            preview=rule.preview,
            summary=rule.summary,
            sections=rule.sections(),
        )
        for rule in rules.values()
    ]
