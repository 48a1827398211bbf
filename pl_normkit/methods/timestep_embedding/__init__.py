"""How much of the time signal survives the norms of a time-dependent network: found in the graph, measured norm by norm, remedied.

Source: "The Disappearance of Timestep Embedding in Modern Time-Dependent Neural Networks", arXiv 2405.14126, whose abstract states that
a norm can remove a time that is added or concatenated just before it; formulas, thresholds and the form of the remedies are derived here.

    find.py     `find_time_injections`: where a time, class or noise level enters, and which norms it reaches
    share.py    `surviving_share`: the derived formula
    measure.py  `measure_time_awareness`: two times on one input, norm by norm and end to end
    modules.py  positional, after-norm and scale-and-shift injection for networks of your own
    fix.py      `apply_positional_time`, `apply_time_bias`, `apply_fewer_groups`
    commands.py `lint --probe time_awareness`
    rules.py    NK801 to NK804
"""

from __future__ import annotations

__all__ = [
    "NormAwareness",
    "TimeAwareness",
    "TimeInjection",
    "TimeNorm",
    "apply_fewer_groups",
    "apply_positional_time",
    "apply_time_bias",
    "find_time_injections",
    "measure_time_awareness",
    "surviving_share",
]

from pl_normkit.methods.timestep_embedding.find import TimeInjection, TimeNorm, find_time_injections
from pl_normkit.methods.timestep_embedding.fix import apply_fewer_groups, apply_positional_time, apply_time_bias
from pl_normkit.methods.timestep_embedding.measure import NormAwareness, TimeAwareness, measure_time_awareness
from pl_normkit.methods.timestep_embedding.share import surviving_share
