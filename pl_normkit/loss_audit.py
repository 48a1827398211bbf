"""`audit_loss`: search a loss for arguments at which it is not finite, and explain what was found."""

from __future__ import annotations

__all__ = ["audit_loss"]

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_normkit.auditing import audit_subject
from pl_normkit.methods.nan_safety.losses.arguments import Domain
from pl_normkit.methods.nan_safety.losses.loss_call import read_loss_call
from pl_normkit.report import Report
from pl_normkit.selection import Selection
from pl_normkit.subject import Subject

if TYPE_CHECKING:
    import torch


def audit_loss(
    loss: str | Callable[..., Any],
    example: Any = None,
    *,
    domain: Domain | None = None,
    fixed: Iterable[str | int] = (),
    autocast: torch.dtype | None = None,
    seconds: float = 1.0,
    folder: str | Path | None = None,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Report:
    """Whether a loss can give NaN or infinity, value or gradient, with the arguments that show it.

    From the example's arguments the search goes to the borders: zeros, ones, large, equal to another, one sample, empty and full masks,
    labels all of one class or ignored; along gradients to where an operation of the loss is singular; to pairs of borders. What needs a
    gradient moves freely (up to 6e4). Other floating tensors stay within the range seen; beyond it, at 0, 1 and -1, a finding is a
    warning. Labels stay among the values seen and the index that the loss ignores. All calls run on the CPU, with the same random numbers;
    a loss module's buffers are put back.

    Args:
        loss: a function, a loss module, a loss class that needs no arguments, or "package.module:name" of one.
        example: the arguments (a tuple, a dict of keywords or one tensor), or a function without arguments that makes them, or its
            "package.module:name". Without it `name_example` beside the loss is called if it is there; else arguments are made from the
            signature. Where no tensor needs a gradient the first floating one gets it. `bounded(tensor, low, high)` bounds one.
        domain: argument name or number -> (low, high) that it stays within, or "not empty" for a mask.
        fixed: arguments that are not moved.
        autocast: search under autocast to this dtype.
        seconds: how long to search, in processor time.
        folder: where to write, for every witness, its arguments and a short script that shows it.
        select: codes, prefixes ("NK4") or names of the rules to run instead of the default set.
        ignore: rules not to run.

    Returns:
        A report. A finding of severity error carries a witness: `finding.witness.arguments` are what to call the loss with (set
        `requires_grad_()` to see a gradient). What only the loss's graph suggests is a note.

    Raises:
        ModelSpecError: the loss or the example cannot be found or called, or has no gradient.
        ConfigError: `domain` or `fixed` name no argument, or an unknown rule.
        DataError: there is no such folder.

    >>> import torch
    >>> from pl_normkit import audit_loss
    >>> def rmse(pred, target):
    ...     return (pred - target).square().mean().sqrt()
    >>> (finding,) = audit_loss(rmse, (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))).findings
    >>> finding.code, finding.witness.changed
    ('NK401', ('pred := target',))
    """
    call = read_loss_call(
        loss,
        example,
        domain=domain,
        fixed=fixed,
        autocast=autocast,
        seconds=seconds,
        folder=None if folder is None else Path(folder).resolve(),
    )
    return audit_subject(Subject(loss=call.recorded(), loss_call=call, measure=False), Selection(select, ignore or ()))
