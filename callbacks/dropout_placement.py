"""`DropoutPlacement`: dropout where it shifts no variance that a batch norm sees."""

from __future__ import annotations

__all__ = ["DropoutPlacement"]

from typing import Any, Literal

from pl_normkit.callbacks._fit import warn_of_nothing
from pl_normkit.callbacks.model_audit import ModelAudit
from pl_normkit.errors import NothingMatchedError


class DropoutPlacement(ModelAudit):
    """`ModelAudit` for the dropout rules alone, which by default also moves the dropouts (`place_dropout`).

    Args:
        fix: "safe" moves them when the fit is set up (where there is nothing to move one warning says so), "none" only reports.
        example_inputs: as for `ModelAudit`; needed for the fix where the LightningModule has no `example_input_array`.
    """

    def __init__(self, fix: Literal["none", "safe"] = "safe", example_inputs: Any = None) -> None:
        super().__init__(example_inputs, select=["NK101", "NK102", "NK103", "NK104"], fix=fix)

    def _fix(self) -> None:
        super()._fix()
        if not self.changes and self._watched is not None and self._watched.had_inputs:
            warn_of_nothing(
                self._watched.trainer, self, "dropouts whose noise a norm layer sees", NothingMatchedError("There are none to move")
            )
