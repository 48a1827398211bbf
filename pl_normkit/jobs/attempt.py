"""One job, in whatever process: its result, or what came in between."""

from __future__ import annotations

__all__ = ["Failure", "attempt", "failure_of"]

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pl_normkit.errors import NormkitError


@dataclass(frozen=True)
class Failure:
    """A job that has no result.

    Attributes:
        text: what happened, as "ValueError: broken".
        trace: the traceback where the job raised.
        error: what it raised, where that is ours.
        is_lost: whether the process that ran it is gone.
    """

    text: str
    trace: str = ""
    error: NormkitError | None = None
    is_lost: bool = False


def attempt(work: Callable[[Any], Any], job: Any) -> Any:
    """What the job gives, or its `Failure`: nothing that it raises ends the process."""
    try:
        return work(job)
    except BaseException as error:
        return failure_of(error)


def failure_of(error: BaseException) -> Failure:
    """With what is left of an error when it leaves its process."""
    trace = "".join(traceback.format_exception(error))
    return Failure(f"{type(error).__name__}: {error}", trace, error if isinstance(error, NormkitError) else None)
