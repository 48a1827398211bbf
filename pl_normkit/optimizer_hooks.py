"""Hooks of an optimizer's `step` and `load_state_dict`, also of wrappers that have none.

Those are no torch optimizers, or torch's `__init__` did not run in them (Lookahead, SAM and others in use).
"""

from __future__ import annotations

__all__ = ["around_steps", "before_loading"]

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Before = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], tuple[Any, Any] | None]
After = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


def around_steps(optimizer: Optimizer, before: Before | None, after: After | None) -> Callable[[], Any]:
    """Call `before` and `after` with each `step`, as torch's step hooks are; the value ends that."""
    if getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
        handles = [optimizer.register_step_pre_hook(before)] if before is not None else []
        handles += [optimizer.register_step_post_hook(after)] if after is not None else []
        return partial(_remove, handles)
    return _wrap(optimizer, "step", before, after)


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def before_loading(optimizer: Optimizer, act: Callable[[], None]) -> None:
    """Call `act` before each `load_state_dict`."""
    if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        optimizer.register_load_state_dict_pre_hook(lambda *_: act())
    else:
        _wrap(optimizer, "load_state_dict", lambda *_: act(), None)


def _wrap(optimizer: Any, method: str, before: Callable[..., Any] | None, after: Callable[..., Any] | None) -> Callable[[], Any]:
    original, own = getattr(optimizer, method), vars(optimizer)
    was_own = own.get(method)
    over: list[bool] = []

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if over:  # a scheduler may have wrapped the method since: it cannot be taken off then
            return original(*args, **kwargs)
        changed = before(optimizer, (optimizer, *args), kwargs) if before is not None else None
        (_, *used), options = changed or ((optimizer, *args), kwargs)
        result = original(*used, **options)
        if after is not None:
            after(optimizer, args, kwargs)
        return result

    def undo() -> None:
        over.append(True)
        if own.get(method) is wrapped:
            del own[method]
            own.update({} if was_own is None else {method: was_own})

    own[method] = wrapped
    return undo
