"""The run before and after a conversion that must agree."""

from __future__ import annotations

__all__ = ["convert_checked", "refuse_sharded", "without_fast_path"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import EditError
from pl_normkit.graph import call_arguments
from pl_normkit.preserve import preserved
from pl_normkit.surgery import Change, Changes, Edit, Replace, SetAttributes, apply_edits


def refuse_sharded(model: nn.Module) -> None:
    """Raise EditError where weights have no values to compute with."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise EditError("the model is on the meta device and holds no weights to convert", fix="load the checkpoint first")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise EditError("the weights are sharded", fix="convert before sharding, or load the whole checkpoint")


def without_fast_path(model: nn.Module, edits: Sequence[Edit]) -> list[Edit]:
    """Torch's encoder layer computes layer norms in one kernel in eval mode, from the parameters of its norms and not by calling them: what
    turns that off where `edits` replace such a norm."""
    replaced = {edit.path for edit in edits if isinstance(edit, Replace)}
    return [
        SetAttributes(path, {"activation_relu_or_gelu": 0}, "torch's fast path, which takes its norms for layer norms, is off")
        for path, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and not replaced.isdisjoint(f"{path}.{name}".lstrip(".") for name in ("norm1", "norm2"))
    ]


def convert_checked(
    model: nn.Module, inputs: Any, edits: Sequence[Edit], skipped: Sequence[Change], *, precision: torch.dtype | None = None
) -> Changes:
    """Make `edits`, unless the model's outputs in eval mode then differ by more than rounding: then nothing is changed.

    `precision` is that of the narrowest computation which the edits replace, by default the outputs' own.

    Raises EditError, with the largest difference, where they do.
    """
    before = _outputs(model, inputs)
    changes = apply_edits(model, [*edits, *without_fast_path(model, edits)], skipped)
    try:
        after = _outputs(model, inputs)
        for old, new in zip(before, after, strict=True):
            _compare(old, new, precision or old.dtype)
    except BaseException:
        changes.undo()
        raise
    return changes


def _compare(old: Tensor, new: Tensor, precision: torch.dtype) -> None:
    difference = float((old.double() - new.double()).abs().max() / old.double().abs().max().clamp(min=1e-30))
    if not difference <= max(torch.finfo(dtype).eps for dtype in (old.dtype, precision)) ** 0.5:
        raise EditError(
            "the converted model does not compute the same function, so it was left as it was",
            evidence=f"largest difference {difference:.1e} of the largest output",
            fix="report the model: its graph met every condition",
        )


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    arguments, keywords = call_arguments(inputs)
    with preserved(model, buffers=True), torch.no_grad():
        model.eval()
        output = model(*arguments, **keywords)
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
