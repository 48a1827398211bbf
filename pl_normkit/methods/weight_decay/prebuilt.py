"""Splitting an optimizer that exists already but has not stepped yet, together with the schedulers that have read its groups."""

from __future__ import annotations

__all__ = ["split_prebuilt"]

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer, lr_scheduler, swa_utils

from pl_normkit.errors import EditError
from pl_normkit.methods.weight_decay.fix import Group, GroupSplitter

_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def split_prebuilt(optimizer: Optimizer, schedulers: Iterable[Any], splitter: GroupSplitter) -> None:
    """Split the groups of `optimizer` in place, and repeat what its schedulers keep per group accordingly.

    Adding groups under a scheduler shifts its lists; here every list is rewritten from the old group each new one came from, so
    the schedule is the one that a scheduler built afterwards would follow.

    Raises:
        EditError: when the optimizer has stepped, or a scheduler is of a class whose lists we do not know; nothing is changed then.
    """
    known = _unfold(schedulers)
    foreign = [type(scheduler).__name__ for scheduler in known if not _is_torch(scheduler)]
    if foreign or optimizer.state:
        reason = f"its scheduler {foreign[0]} may keep a value per group" if foreign else "it has stepped"
        raise EditError(
            f"GammaDecay came too late: {type(optimizer).__name__} exists already, and {reason}",
            where="configure_optimizers",
            mend="build optimizer and scheduler inside configure_optimizers, or build the groups with param_groups",
        )
    parts = [_split_named(group, optimizer, splitter) for group in optimizer.param_groups]
    origin = [index for index, split in enumerate(parts) for _ in split]
    optimizer.param_groups[:] = [part for split in parts for part in split]
    for scheduler in known:
        for name in _PER_GROUP:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == len(parts):
                setattr(scheduler, name, [values[index] for index in origin])


def _unfold(schedulers: Iterable[Any]) -> list[Any]:
    """The schedulers and those that chains and sequences hold."""
    found: list[Any] = []
    for scheduler in schedulers:
        found += [scheduler, *_unfold(getattr(scheduler, "_schedulers", ()))]
    return found


def _is_torch(scheduler: Any) -> bool:
    """Whether torch made the class (Lightning's plateau scheduler is torch's with a monitor's name)."""
    home = type(scheduler).__module__
    is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) and home.startswith(("lightning.", "pytorch_lightning."))
    return home in (lr_scheduler.__name__, swa_utils.__name__) or is_plateau


def _split_named(group: Group, optimizer: Optimizer, splitter: GroupSplitter) -> Sequence[Group]:
    names = group.get("param_names")
    if "weight_decay" not in group:
        return [group]
    if names is None:
        return splitter.split(group, optimizer.defaults)
    pairs = list(zip(names, group["params"], strict=True))
    parts = splitter.split({**group, "params": pairs}, optimizer.defaults)
    return [
        {**part, "params": [tensor for _, tensor in part["params"]], "param_names": [name for name, _ in part["params"]]} for part in parts
    ]
