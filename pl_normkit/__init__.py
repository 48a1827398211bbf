"""pl_normkit: a linter with a screwdriver for PyTorch training runs.

    from pl_normkit import audit
    audit(model, example_inputs).print()

What the rooms under `pl_normkit.methods` export can be imported from here too (`from pl_normkit import place_dropout`). Every name is
loaded when it is first asked for, so that this import costs less than `import torch`. Callbacks live in `pl_normkit.callbacks`,
modules and losses in `pl_normkit.nn`, recipes in `pl_normkit.recipes`; `compare_runs` and `Arm` come from there and need Lightning.
"""

from __future__ import annotations

__version__ = "0.1.0"

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # from here to the next comment: one line a room, written by `make docs`
    from pl_normkit.auditing import audit as audit
    from pl_normkit.auditing import fix_findings as fix_findings
    from pl_normkit.errors import NormkitError as NormkitError
    from pl_normkit.errors import NormkitWarning as NormkitWarning
    from pl_normkit.findings import Evidence as Evidence
    from pl_normkit.findings import Finding as Finding
    from pl_normkit.findings import FixSafety as FixSafety
    from pl_normkit.findings import Note as Note
    from pl_normkit.findings import NoteKind as NoteKind
    from pl_normkit.findings import Place as Place
    from pl_normkit.findings import Severity as Severity
    from pl_normkit.loss_audit import audit_loss as audit_loss
    from pl_normkit.methods.atrous_rates import *
    from pl_normkit.methods.box_supervision import *
    from pl_normkit.methods.depth_profile import *
    from pl_normkit.methods.dropout_placement import *
    from pl_normkit.methods.fusion_scale import *
    from pl_normkit.methods.gaussian_bias import *
    from pl_normkit.methods.group_count import *
    from pl_normkit.methods.guided_upsampling import *
    from pl_normkit.methods.nan_safety import *
    from pl_normkit.methods.norm_operators import *
    from pl_normkit.methods.norm_placement import *
    from pl_normkit.methods.norm_training import *
    from pl_normkit.methods.positional_variance import *
    from pl_normkit.methods.stochastic_pooling import *
    from pl_normkit.methods.timestep_embedding import *
    from pl_normkit.methods.weight_decay import *
    from pl_normkit.methods.wiring import *
    from pl_normkit.receptive_field import ReceptiveField as ReceptiveField
    from pl_normkit.receptive_field import effective_receptive_field as effective_receptive_field
    from pl_normkit.recipes.arms import Arm as Arm
    from pl_normkit.recipes.built_runs import compare_runs as compare_runs
    from pl_normkit.report import Report as Report
    from pl_normkit.restoring import restore_edits as restore_edits
    from pl_normkit.run_audit import RunAudit as RunAudit
    from pl_normkit.subject import Loaders as Loaders
    from pl_normkit.surgery import Changes as Changes
    # end of rooms

_CORE = {
    "pl_normkit.auditing": ("audit", "fix_findings"),
    "pl_normkit.loss_audit": ("audit_loss",),
    "pl_normkit.errors": ("NormkitError", "NormkitWarning"),
    "pl_normkit.findings": ("Evidence", "Finding", "FixSafety", "Note", "NoteKind", "Place", "Severity"),
    "pl_normkit.receptive_field": ("ReceptiveField", "effective_receptive_field"),
    "pl_normkit.recipes.arms": ("Arm",),
    "pl_normkit.recipes.built_runs": ("compare_runs",),
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
