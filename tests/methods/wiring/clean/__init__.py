"""Set-ups that look like a mistake and are none: nothing may be said of them."""

from __future__ import annotations

from tests.methods.wiring.clean import gradients, inputs, left_out, losses, modes
from tests.methods.wiring.setups import CLEAN

__all__ = ["CLEAN", "gradients", "inputs", "left_out", "losses", "modes"]
