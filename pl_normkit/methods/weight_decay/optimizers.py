"""Groups of optimizers split in place: while they are built, when they exist already, and when they get groups in mid-run."""

from __future__ import annotations

__all__ = ["OptimizerSplitter"]

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import EditError
from pl_normkit.methods.weight_decay.find import ModelRoles
from pl_normkit.methods.weight_decay.fix import Group, GroupSplitter, parameter_names
from pl_normkit.methods.weight_decay.layout import OptimizerLayout, optimizer_layout
from pl_normkit.methods.weight_decay.policy import DecayPolicy
from pl_normkit.surgery import Change, Changes

_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


class OptimizerSplitter:
    """Splits the groups of a model's optimizers by the decay that each parameter should get, for as long as they live.

        splitter = OptimizerSplitter(model, read_model(model, x), resolve_policy("no_norm"))
        with splitter.building():
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        splitter.follow([optimizer])

    Args:
        model: whose parameters they are.
        known: its roles.
        policy: which parameters are decayed.
        weight_decay: decay of the weights; None takes each group's own, so a group without decay stays without.

    Attributes:
        changes: for each group that was split or got another decay, what became of it; `undo()` gives every part its group's decay.
        optimizers: those that `follow` was given.
    """

    def __init__(self, model: nn.Module, known: ModelRoles, policy: DecayPolicy, weight_decay: float | None = None) -> None:
        self.changes = Changes()
        self.optimizers: list[Optimizer] = []
        self._model = model
        self._names = parameter_names(model)
        self._splitter = GroupSplitter(known, policy, self._names, weight_decay)
        self._built: list[Optimizer] = []

    @contextmanager
    def building(self) -> Iterator[None]:
        """While the block runs, every optimizer that is built gets its groups split, so before a scheduler reads them.

        Groups pass through `Optimizer.add_param_group` while the optimizer is built. Optimizers that know no weight decay keep theirs.
        """
        original = Optimizer.add_param_group
        made: list[Group] = []

        def add_split(optimizer: Optimizer, param_group: Group) -> None:
            if not any(optimizer is known for known in self._built):
                self._built.append(optimizer)
            is_ours = any(param_group is part for part in made)
            parts = [param_group] if is_ours else self._split(optimizer, param_group)
            made.extend(parts)
            for part in parts:
                original(optimizer, part)

        Optimizer.add_param_group = add_split  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            Optimizer.add_param_group = original  # type: ignore[method-assign]

    def follow(self, optimizers: Sequence[Optimizer], configured: Any = None) -> None:
        """Split those that were not built in `building`, warn of unknown roles, and split from now on what the optimizers get added.

        Args:
            optimizers: all of the model's.
            configured: containers that hold their schedulers, as `configure_optimizers` returns them.

        Raises:
            EditError: when an optimizer that exists already has stepped or is driven by a scheduler that is not torch's.
        """
        for optimizer in optimizers:
            if not any(optimizer is known for known in self._built):
                self._split_existing(optimizer, _schedulers_of(optimizer, configured))
        self._splitter.warn_unknown(_parameters_of(optimizers))
        for optimizer in optimizers:
            optimizer.add_param_group = partial(self._add, optimizer)  # type: ignore[method-assign]
        self.optimizers = list(optimizers)

    def layouts(self) -> list[OptimizerLayout]:
        """Which parameter is where in each optimizer now."""
        return [optimizer_layout(optimizer, self._names) for optimizer in self.optimizers]

    def release(self) -> None:
        """Groups stay as they are, later ones are no longer split."""
        for optimizer in self.optimizers:
            vars(optimizer).pop("add_param_group", None)

    def summary(self) -> str:
        """The changes in one line, or why there are none."""
        if self.changes:
            return "; ".join(map(str, self.changes.made))
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if not groups:
            return "There is no optimizer"
        if not any("weight_decay" in group for group in groups):
            return f"{type(self.optimizers[0]).__name__} has no weight decay"
        if not any(group.get("weight_decay") for group in groups):
            return "No optimizer has a weight decay; set it there, or pass weight_decay="
        return f"Every parameter has the decay already that policy {self._splitter.policy.name!r} gives it"

    def _add(self, optimizer: Optimizer, param_group: Group) -> None:
        self._names.update(parameter_names(self._model))
        parts = self._split(optimizer, param_group)
        self._splitter.warn_unknown(item for part in parts for item in part["params"])
        for part in parts:
            type(optimizer).add_param_group(optimizer, part)

    def _split(self, optimizer: Optimizer, group: Group) -> list[Group]:
        """`group` in parts; one part, as it was given, for an optimizer without weight decay."""
        if "weight_decay" not in group and "weight_decay" not in optimizer.defaults:
            return [group]
        own = float(group.get("weight_decay", optimizer.defaults.get("weight_decay", 0.0)))
        parts = self._splitter.split(group, optimizer.defaults)
        if any(part["weight_decay"] != own for part in parts):
            told = ", ".join(f"{len(part['params'])} with {part['weight_decay']:g}" for part in parts)
            change = Change(type(optimizer).__name__, f"decay {own:g} of {group.get('name', 'a group')} becomes {told}")
            self.changes.add(Changes([change], _undo=[partial(_give_back, optimizer, parts, own)]))
        return parts

    def _split_existing(self, optimizer: Optimizer, schedulers: Iterable[Any]) -> None:
        """Split the groups of an optimizer that exists, and repeat what its schedulers keep per group accordingly.

        Adding groups under a scheduler shifts its lists; here every list is rewritten from the old group each new one came from, so
        the schedule is the one that a scheduler built afterwards would follow. Nothing is changed where it raises.
        """
        if self._is_split(optimizer):
            return
        known = _unfold(schedulers)
        foreign = [type(scheduler).__name__ for scheduler in known if not _is_torch(scheduler)]
        if foreign or optimizer.state:
            reason = f"its scheduler {foreign[0]} may keep a value per group" if foreign else "it has stepped"
            raise EditError(
                f"{type(optimizer).__name__} exists already, and {reason}, so its groups cannot be split",
                where="configure_optimizers",
                fix="build optimizer and scheduler inside configure_optimizers, or build the groups with param_groups",
            )
        parts = [self._split_named(optimizer, group) for group in optimizer.param_groups]
        origin = [index for index, split in enumerate(parts) for _ in split]
        optimizer.param_groups[:] = [part for split in parts for part in split]
        for scheduler in known:
            for name in _PER_GROUP:
                values = getattr(scheduler, name, None)
                if isinstance(values, list) and len(values) == len(parts):
                    setattr(scheduler, name, [values[index] for index in origin])

    def _is_split(self, optimizer: Optimizer) -> bool:
        """Whether every group has the decay already that its parameters should have: an optimizer of an earlier fit, or one without."""
        groups = [group for group in optimizer.param_groups if "weight_decay" in group]
        return all(part["weight_decay"] == group["weight_decay"] for group in groups for part in self._splitter.split(group, {}))

    def _split_named(self, optimizer: Optimizer, group: Group) -> list[Group]:
        names = group.get("param_names")
        if names is None:
            return self._split(optimizer, group)
        parts = self._split(optimizer, {**group, "params": list(zip(names, group["params"], strict=True))})
        for part in parts:
            part["param_names"] = [name for name, _ in part["params"]]
            part["params"] = [tensor for _, tensor in part["params"]]
        return parts


def _give_back(optimizer: Optimizer, parts: Sequence[Group], decay: float) -> None:
    """Every live group that holds a parameter of `parts` gets `decay` again."""
    held = {id(item[1] if isinstance(item, tuple) else item) for part in parts for item in part["params"]}
    for group in optimizer.param_groups:
        if any(id(parameter) in held for parameter in group["params"]):
            group["weight_decay"] = decay


def _parameters_of(optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    return (parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"])


def _schedulers_of(optimizer: Optimizer, configured: Any) -> list[Any]:
    """The schedulers among the leaves of `configured` that drive `optimizer`."""
    return [leaf for leaf in tree_leaves(configured) if leaf is not optimizer and getattr(leaf, "optimizer", None) is optimizer]


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
