"""Set-ups with one mistake each, and the rule that names it, by what the mistake is about."""

from __future__ import annotations

from tests.methods.wiring.mistakes import gradients, inputs, left_out, losses, modes
from tests.methods.wiring.setups import MISTAKES

__all__ = ["MISTAKES", "gradients", "inputs", "left_out", "losses", "modes"]
