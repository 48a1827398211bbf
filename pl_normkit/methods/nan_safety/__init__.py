"""NaN safety: rules that read a loss, losses that stay finite, a guard for the optimizer step, and a diagnosis.

Paper: "Analysis of NaN Divergence in Training Monocular Depth Estimation Model", arXiv 2311.03938 (causes: published; criteria
and fixes: derived here, see docs/nan_safety.md).
"""

from __future__ import annotations

__all__ = ["audit_loss", "replace_unsafe_losses", "replay"]

from pl_normkit.methods.nan_safety.fix import replace_unsafe_losses
from pl_normkit.methods.nan_safety.lint import audit_loss
from pl_normkit.methods.nan_safety.replay import replay
