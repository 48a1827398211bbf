"""How a callback stands around one call of a method of the LightningModule."""

from __future__ import annotations

__all__ = ["wrap_once"]

import functools
from collections.abc import Callable
from typing import Any


def wrap_once(owner: Any, method: str, around: Callable[[Callable[..., Any]], Any]) -> None:
    """Let the next call of `owner.method` be `around(method)`; the instance is as before then."""
    original, was_own = getattr(owner, method), method in vars(owner)

    @functools.wraps(original)
    def call_once(*args: Any, **kwargs: Any) -> Any:
        if was_own:
            setattr(owner, method, original)
        else:
            delattr(owner, method)
        return around(functools.partial(original, *args, **kwargs))

    setattr(owner, method, call_once)
