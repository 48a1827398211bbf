"""pl_normkit: a linter with a screwdriver for PyTorch training runs.

    from pl_normkit import audit
    audit(model, example_inputs).print()

Every name below is loaded when it is first asked for, so that this import costs little more than `import torch`. Callbacks live in
`pl_normkit.callbacks`, modules and losses in `pl_normkit.nn`, recipes in `pl_normkit.recipes`.
"""

from __future__ import annotations

__all__ = [
    "Changes",
    "Evidence",
    "Finding",
    "FixSafety",
    "Loaders",
    "NormkitError",
    "NormkitWarning",
    "Place",
    "Report",
    "Severity",
    "__version__",
    "add_gaussian_bias",
    "audit",
    "audit_loss",
    "effective_receptive_field",
    "equalize_scales",
    "fix_findings",
    "measure_fusion_scales",
    "measure_positional_variance",
    "measure_second_moments",
    "measure_variance_shift",
    "param_groups",
    "parameter_roles",
    "place_dropout",
    "replace_unsafe_losses",
    "rescale_positional_embedding",
    "set_atrous_rates",
    "stochastic_pooling",
    "suggest_augmentation",
]

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pl_normkit.auditing import audit, fix_findings
    from pl_normkit.errors import NormkitError, NormkitWarning
    from pl_normkit.findings import Evidence, Finding, FixSafety, Place, Severity
    from pl_normkit.methods.atrous_rates import set_atrous_rates
    from pl_normkit.methods.dropout_placement import measure_variance_shift, place_dropout
    from pl_normkit.methods.fusion_scale import equalize_scales, measure_fusion_scales
    from pl_normkit.methods.gaussian_bias import add_gaussian_bias
    from pl_normkit.methods.nan_safety import audit_loss, replace_unsafe_losses
    from pl_normkit.methods.positional_variance import measure_positional_variance, rescale_positional_embedding, suggest_augmentation
    from pl_normkit.methods.stochastic_pooling import measure_second_moments, stochastic_pooling
    from pl_normkit.methods.weight_decay import param_groups, parameter_roles
    from pl_normkit.receptive_field import effective_receptive_field
    from pl_normkit.report import Report
    from pl_normkit.rules import Loaders
    from pl_normkit.surgery import Changes

_HOMES = {
    "pl_normkit.auditing": ("audit", "fix_findings"),
    "pl_normkit.errors": ("NormkitError", "NormkitWarning"),
    "pl_normkit.findings": ("Evidence", "Finding", "FixSafety", "Place", "Severity"),
    "pl_normkit.methods.atrous_rates": ("set_atrous_rates",),
    "pl_normkit.methods.dropout_placement": ("measure_variance_shift", "place_dropout"),
    "pl_normkit.methods.fusion_scale": ("equalize_scales", "measure_fusion_scales"),
    "pl_normkit.methods.gaussian_bias": ("add_gaussian_bias",),
    "pl_normkit.methods.nan_safety": ("audit_loss", "replace_unsafe_losses"),
    "pl_normkit.methods.positional_variance": ("measure_positional_variance", "rescale_positional_embedding", "suggest_augmentation"),
    "pl_normkit.methods.stochastic_pooling": ("measure_second_moments", "stochastic_pooling"),
    "pl_normkit.methods.weight_decay": ("param_groups", "parameter_roles"),
    "pl_normkit.receptive_field": ("effective_receptive_field",),
    "pl_normkit.report": ("Report",),
    "pl_normkit.rules": ("Loaders",),
    "pl_normkit.surgery": ("Changes",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pl_normkit' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
