"""Weight decay that knows what each parameter is for: roles from the graph, groups by policy, rules NK201 to NK206."""

from __future__ import annotations

__all__ = [
    "HISTORY_FILE",
    "PRESETS",
    "DecayLine",
    "DecayPolicy",
    "GroupSplitter",
    "ModelRoles",
    "OptimizerLayout",
    "Role",
    "build_optimizer",
    "check_group_sizes",
    "check_layouts",
    "describe_decay",
    "gamma_norms",
    "optimizer_layout",
    "param_groups",
    "parameter_names",
    "parameter_roles",
    "plot_gamma_norms",
    "read_history",
    "read_model",
    "read_part",
    "resolve_policy",
    "split_prebuilt",
    "splitting_optimizer_groups",
    "squared_gamma_norms",
    "write_history",
]

from pl_normkit.methods.weight_decay.find import ModelRoles, parameter_roles, read_model, read_part
from pl_normkit.methods.weight_decay.fix import (
    GroupSplitter,
    describe_decay,
    param_groups,
    parameter_names,
    splitting_optimizer_groups,
)
from pl_normkit.methods.weight_decay.layout import OptimizerLayout, check_group_sizes, check_layouts, optimizer_layout
from pl_normkit.methods.weight_decay.measure import (
    HISTORY_FILE,
    gamma_norms,
    plot_gamma_norms,
    read_history,
    squared_gamma_norms,
    write_history,
)
from pl_normkit.methods.weight_decay.optimizer_text import build_optimizer
from pl_normkit.methods.weight_decay.policy import PRESETS, DecayLine, DecayPolicy, resolve_policy
from pl_normkit.methods.weight_decay.prebuilt import split_prebuilt
from pl_normkit.methods.weight_decay.roles import Role
