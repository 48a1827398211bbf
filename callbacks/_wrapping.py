"""How a callback stands around one call of a method of the LightningModule, and keeps what it logs out."""

from __future__ import annotations

__all__ = ["silenced_logs", "wrap_once"]

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def wrap_once(owner: Any, method: str, around: Callable[[functools.partial[Any]], Any]) -> None:
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


@contextmanager
def silenced_logs(pl_module: Any) -> Iterator[None]:
    """`self.log`, which `log_dict` calls too, does nothing within the block."""
    own = vars(pl_module)
    before = own.get("log")
    own["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if before is None:
            del own["log"]
        else:
            own["log"] = before
