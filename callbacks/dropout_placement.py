"""`DropoutPlacement`: dropout where it shifts no variance that a batch norm sees."""

from __future__ import annotations

__all__ = ["DropoutPlacement"]

from typing import Any, Literal

from pl_normkit.callbacks.model_audit import ModelAudit


class DropoutPlacement(ModelAudit):
    """`ModelAudit` for the dropout rules alone, which by default also moves the dropouts (`place_dropout`).

    Args:
        fix: "safe" moves them when the fit is set up, "none" only reports.
        example_inputs: as for `ModelAudit`; needed for the fix where the LightningModule has no `example_input_array`.
    """

    def __init__(self, fix: Literal["none", "safe"] = "safe", example_inputs: Any = None) -> None:
        super().__init__(example_inputs, select=["NK101", "NK102", "NK103", "NK104"], fix=fix)
