"""A batch norm that stays in eval mode."""

from __future__ import annotations

__all__ = ["KeptInEval"]

from torch import nn


class KeptInEval(nn.Module):
    """Mixed into a norm: `train()` leaves it in eval mode, so that its running statistics stay as they are."""

    def train(self, mode: bool = True) -> KeptInEval:
        super().train(False)
        return self
