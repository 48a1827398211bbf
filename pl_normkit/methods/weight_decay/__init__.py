"""Weight decay that knows what each parameter is for: its role is read from the graph, and groups are made by a policy over roles.

Source: the roles of norm scales are derived here from the principles in the abstract of arXiv 2205.07260, whose guidelines were not at
hand; that the default leaves norms, biases, positions and tokens out is common practice, checked against timm and transformers.

    roles.py           the roles
    find.py            `parameter_roles`: the role of every parameter
    operations.py      the role by the operation that reads the parameter, and where that stands
    walks.py           ways back and forth in the graph, views left out
    core_gammas.py     which scales the derivation speaks about
    module_types.py    the role by the type of the module, where there is no graph
    peers.py           whom timm, transformers and nanoGPT decay
    policy.py          which parameters are decayed, and on what ground
    fix.py             `param_groups`: groups from a model, or from groups that exist
    optimizers.py      `OptimizerSplitter`: groups of live optimizers
    layout.py          which parameter sits where in an optimizer, for checkpoints
    measure.py         norms of the scales by role over a run
    rules.py           what the graph and the groups tell: NK201 to NK203, NK206 to NK208
    optimizer_rules.py NK204 and NK205: what an optimizer tells without a graph
    optimizer_text.py  an optimizer from words
    commands.py        `lint --optimizer`, `roles`, a drawing of `report`
"""

from __future__ import annotations

__all__ = [
    "PRESETS",
    "DecayLine",
    "DecayPolicy",
    "ModelRoles",
    "OptimizerSplitter",
    "Role",
    "describe_decay",
    "gamma_norms",
    "measure_gamma_norms",
    "param_groups",
    "parameter_roles",
    "plot_gamma_norms",
    "read_model",
]

from pl_normkit.methods.weight_decay.find import ModelRoles, parameter_roles, read_model
from pl_normkit.methods.weight_decay.fix import describe_decay, param_groups
from pl_normkit.methods.weight_decay.measure import gamma_norms, measure_gamma_norms, plot_gamma_norms
from pl_normkit.methods.weight_decay.optimizers import OptimizerSplitter
from pl_normkit.methods.weight_decay.policy import PRESETS, DecayLine, DecayPolicy
from pl_normkit.methods.weight_decay.roles import Role
