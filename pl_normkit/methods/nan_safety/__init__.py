"""NaN safety: a search for arguments at which a loss is not finite, rules that explain them, losses that stay finite, and a guard.

Paper: "Analysis of NaN Divergence in Training Monocular Depth Estimation Model", arXiv 2311.03938 (causes: published; criteria
and fixes: derived here, see docs/nan_safety.md).

- loss_call: the loss and its example. arguments: the example as named values with roles.
- search: corners (moves to the border), steering (along gradients), in this order.
- stable_forms: from the operation that failed to the rule and the stable form. witness: what a finding carries, and its script.
- stress: a training step on corner batches.
- rules, cases, loss_graph, ranges: what the autograd graph alone suggests.
- modules, ops: stable losses and functions. fix: puts the modules in place.
- diagnosis, sources: the first tensor of a step that was not finite, by source line.
- guard, rerun, replay: NaNGuard's logic, and its files.
"""

from __future__ import annotations

__all__ = ["bounded", "replace_unsafe_losses", "replay", "stress_step"]

from pl_normkit.methods.nan_safety.arguments import bounded
from pl_normkit.methods.nan_safety.fix import replace_unsafe_losses
from pl_normkit.methods.nan_safety.replay import replay
from pl_normkit.methods.nan_safety.stress import stress_step
