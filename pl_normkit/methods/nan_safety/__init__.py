"""NaN safety: a search for arguments at which a loss is not finite, rules that explain them, losses that stay finite, and a guard.

Paper: "Analysis of NaN Divergence in Training Monocular Depth Estimation Model", arXiv 2311.03938 (causes: published; criteria
and fixes: derived here, see docs/nan_safety.md).

    losses/      the loss linter: arguments at which a loss is not finite, and their stable forms
    rules/       NK401 to NK411: what was found is explained, what only the graph suggests is said as such
    modules.py   stable losses
    ops.py       stable functions
    fix.py       puts stable losses where unsafe ones stand
    guard/       `StepGuard`: bad optimizer steps do not happen, are counted and undone
    diagnosis/   the first operation of a step that was not finite, its line and its replay file
    commands.py  `pl-normkit lint --loss` and `pl-normkit replay`
"""

from __future__ import annotations

__all__ = ["StepGuard", "bounded", "replace_unsafe_losses", "replay", "stress_step"]

from pl_normkit.methods.nan_safety.diagnosis.replay import replay
from pl_normkit.methods.nan_safety.fix import replace_unsafe_losses
from pl_normkit.methods.nan_safety.guard.step_guard import StepGuard
from pl_normkit.methods.nan_safety.losses.arguments import bounded
from pl_normkit.methods.nan_safety.losses.stress import stress_step
