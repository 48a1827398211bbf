"""pl_normkit: a linter with a screwdriver for PyTorch training runs.

    from pl_normkit import audit
    audit(model, example_inputs).print()

Callbacks live in `pl_normkit.callbacks`, modules in `pl_normkit.nn`, recipes in `pl_normkit.recipes`; they are imported
where they are used, so that this import costs little more than `import torch`.
"""

from __future__ import annotations

__all__ = ["Evidence", "Finding", "FixSafety", "NormkitError", "NormkitWarning", "Place", "Report", "Severity", "__version__", "audit"]

__version__ = "0.1.0"

from pl_normkit.audit import audit
from pl_normkit.errors import NormkitError, NormkitWarning
from pl_normkit.findings import Evidence, Finding, FixSafety, Place, Severity
from pl_normkit.report import Report
