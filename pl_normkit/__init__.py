"""pl_normkit: a linter with a screwdriver for PyTorch training runs.

    from pl_normkit import audit
    audit(model, example_inputs).print()

What the rooms under `pl_normkit.methods` export can be imported from here too (`from pl_normkit import place_dropout`). Every name is
loaded when it is first asked for, so that this import costs less than `import torch`. Callbacks live in `pl_normkit.callbacks`,
modules and losses in `pl_normkit.nn`, recipes in `pl_normkit.recipes`.
"""

from __future__ import annotations

__version__ = "0.1.0"

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # written by `make docs`
    from pl_normkit.surgery import Changes as Changes

_CORE = {
    "pl_normkit.auditing": ("audit", "fix_findings"),
    "pl_normkit.loss_audit": ("audit_loss",),
    "pl_normkit.errors": ("NormkitError", "NormkitWarning"),
    "pl_normkit.findings": ("Evidence", "Finding", "FixSafety", "Note", "NoteKind", "Place", "Severity"),
    "pl_normkit.receptive_field": ("ReceptiveField", "effective_receptive_field"),
    "pl_normkit.report": ("Report",),
    "pl_normkit.restoring": ("restore_edits",),
    "pl_normkit.run_audit": ("RunAudit",),
    "pl_normkit.subject": ("Loaders",),
    "pl_normkit.surgery": ("Changes",),
}


@cache
def _homes() -> dict[str, str]:
    """Name -> the module that exports it; rooms are read, not imported."""
    rooms = sorted(Path(__file__).parent.glob("methods/*/__init__.py"))
    exports = {f"pl_normkit.methods.{room.parent.name}": _exports(room) for room in rooms}
    return {name: home for home, names in (exports | _CORE).items() for name in names}


def _exports(path: Path) -> tuple[str, ...]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(ast.literal_eval(node.value))
    return ()


def __getattr__(name: str) -> Any:
    home = None if name.startswith("_") else _homes().get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})
