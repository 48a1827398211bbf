"""NaN safety: rules that read a loss, losses that stay finite, a guard for the optimizer step, and a diagnosis.

Paper: "Analysis of NaN Divergence in Training Monocular Depth Estimation Model", arXiv 2311.03938 (causes: published; criteria
and fixes: derived here, see docs/nan_safety.md).

The guard: `guard.py` is its state machine, `running.py` what it remembers, `raw_steps.py` and `device_flags.py` steps past a trainer and on
the device, `decision.py` whether a step is finite, `losses_seen.py`, `buffers.py`, `watched.py` what is looked at, `causes.py` what stays
bad, `undo.py` what is put back, `budget.py` limits and spikes, `events.py` reports. The diagnosis: `diagnosis.py` names the first producer,
`explanations.py` says why, `sources.py` where, `rerun.py` and `alone.py` run a step again, `replay.py` writes and reads its file.
"""

from __future__ import annotations

__all__ = ["audit_loss", "replace_unsafe_losses", "replay"]

from pl_normkit.methods.nan_safety.fix import replace_unsafe_losses
from pl_normkit.methods.nan_safety.lint import audit_loss
from pl_normkit.methods.nan_safety.replay import replay
