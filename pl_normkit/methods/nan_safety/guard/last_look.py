"""What no later step would look at: the state that a checkpoint stores, validation reads, or a run ends with. Derived here."""

from __future__ import annotations

__all__ = ["LastLook"]

from typing import TYPE_CHECKING

import torch

from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis
from pl_normkit.methods.nan_safety.guard.causes import lasting_cause
from pl_normkit.methods.nan_safety.guard.decision import shared
from pl_normkit.methods.nan_safety.guard.running import device_of

if TYPE_CHECKING:
    from pl_normkit.methods.nan_safety.guard.step_guard import StepGuard


class LastLook:
    """Looks at the buffers and weights of a guard's run where no optimizer step does."""

    def __init__(self, guard: StepGuard) -> None:
        self._guard = guard

    def at_open_step(self) -> None:
        """A batch after which no optimizer step was made: part of a window, or one that trains nothing, as when statistics are renewed."""
        run = self._guard.running
        if not run.losses.heard:
            if names := run.shadow.bad_names():
                run.shadow.restore()
                self._guard.report_buffers(names, "in a batch without a loss")
            run.shadow.accept()
        if run.around.manual and run.losses.may_be_bad():
            cause = lasting_cause(run.module, run.optimizers, run.excused)
            if cause is not None:
                self._guard.end_for(cause)

    def at_buffers(self) -> None:
        """Put bad ones back. A step that is still open is bad then; else it was other code, validation say."""
        run = self._guard.running
        names = run.shadow.restore_bad()
        if run.decided:
            self._guard.report_buffers(names)
        elif names:
            run.spoiled = True

    def at_weights(self, *, together: bool) -> None:
        """End the run, or roll it back, where the last step has left a parameter or optimizer state that is not finite.

        Args:
            together: every rank is here; else each decides by itself, as it can where all hold the same weights.
        """
        run = self._guard.running
        if not run.decisions or run.last_bad or not run.optimizers or (run.around.sharded and not together):
            return
        cause = lasting_cause(run.module, run.optimizers, run.excused | run.watched.suspects)
        asks_others = together and run.around.distributed
        flag = shared(torch.tensor(float(cause is not None), device=device_of(run.optimizers[0])), distributed=asks_others)
        if bool(flag.item()):
            self._guard.end_for(cause or Diagnosis("unknown", detail="another rank found the cause"), gather=asks_others)
