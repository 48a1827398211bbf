"""NaN safety: a search for arguments at which a loss is not finite, rules that explain them, losses that stay finite, and a guard.

Paper: "Analysis of NaN Divergence in Training Monocular Depth Estimation Model", arXiv 2311.03938 (causes: published; criteria
and fixes: derived here, see docs/nan_safety.md).

Losses:

    loss_call.py, arguments.py   the loss and its example as named values with roles
    search.py, corners.py, steering.py   moves to the border of the domain, and along gradients
    stable_forms.py, witness.py  from the operation that failed to rule and stable form; what a finding carries
    stress.py                    a training step on corner batches
    rules/, cases.py, loss_graph.py, ranges.py   what the autograd graph alone suggests
    modules.py, ops.py, fix.py   stable losses and functions, and the remedy that puts them in place

The guard:

    guard.py                     `StepGuard`, its state machine; running.py what it remembers
    decision.py                  whether a step is finite; losses_seen.py, buffers.py, watched.py what is looked at
    raw_steps.py, device_flags.py   steps past a trainer and on the device
    causes.py, undo.py, budget.py, events.py   what stays bad, what is put back, limits and spikes, reports

The diagnosis:

    diagnosis.py                 the first operation that was not finite; explanations.py says why, sources.py where
    rerun.py, alone.py, replay.py   a step run again, without collectives; the file of an event
"""

from __future__ import annotations

__all__ = ["StepGuard", "bounded", "replace_unsafe_losses", "replay", "stress_step"]

from pl_normkit.methods.nan_safety.arguments import bounded
from pl_normkit.methods.nan_safety.fix import replace_unsafe_losses
from pl_normkit.methods.nan_safety.guard import StepGuard
from pl_normkit.methods.nan_safety.replay import replay
from pl_normkit.methods.nan_safety.stress import stress_step
