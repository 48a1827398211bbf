"""Which parameter sits where in an optimizer: stored with a checkpoint, compared before its state is restored by position."""

from __future__ import annotations

__all__ = ["OptimizerLayout", "SavedLayouts", "check_group_sizes", "check_layouts", "optimizer_layout"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch.optim import Optimizer

from pl_normkit.errors import ConfigError
from pl_normkit.optimizer_hooks import before_loading


class OptimizerLayout(TypedDict):
    """Parameter names of each group of one optimizer, in the order in which its state is stored."""

    optimizer: str
    groups: list[list[str]]


def optimizer_layout(optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerLayout:
    """The layout of `optimizer`; `names` maps `id(parameter)` to a name (`parameter_names`), others become "(not of the model)"."""
    groups = [[names.get(id(parameter), "(not of the model)") for parameter in group["params"]] for group in optimizer.param_groups]
    return {"optimizer": type(optimizer).__name__, "groups": groups}


@dataclass
class SavedLayouts:
    """What a checkpoint tells of its optimizers' groups; compared when an optimizer loads its state, so that groups which other callbacks
    add again on resume count.

    Attributes:
        layouts: as the checkpoint stores them.
        sizes: number of parameters in each group of each optimizer, all that a checkpoint without layouts tells.
    """

    layouts: Sequence[OptimizerLayout] | None = None
    sizes: Sequence[Sequence[int]] = ()

    def take(self, checkpoint: Mapping[str, Any], state_key: str) -> None:
        """Read Lightning's checkpoint, in which GammaDecay's state, if it is there, is at `state_key`."""
        self.clear()
        state = checkpoint.get("callbacks", {}).get(state_key)
        if state is None:
            self.sizes = [[len(group["params"]) for group in known["param_groups"]] for known in checkpoint.get("optimizer_states", [])]
        else:
            self.layouts = state["layouts"]

    def check_on_load(self, optimizers: Iterable[Optimizer], current: Callable[[], Sequence[OptimizerLayout]]) -> None:
        """From now on let `load_state_dict` of these optimizers raise ConfigError where their layouts are others."""
        for optimizer in optimizers:
            before_loading(optimizer, lambda: self._check(current()))

    def clear(self) -> None:
        self.layouts, self.sizes = None, ()

    def _check(self, current: Sequence[OptimizerLayout]) -> None:
        if self.layouts is not None:
            check_layouts(self.layouts, current)
        elif self.sizes:
            check_group_sizes(self.sizes, current)


def check_layouts(saved: Sequence[OptimizerLayout], current: Sequence[OptimizerLayout]) -> None:
    """Refuse a checkpoint whose optimizer state belongs to another layout.

    Torch restores the state by position: with another layout it fails without a name, or gives one parameter the Adam moments
    of another. Raises ConfigError naming the optimizer and the parameters that moved.
    """
    if len(saved) != len(current):
        raise ConfigError(
            f"the checkpoint holds {len(saved)} optimizers, this run has {len(current)}", where="resume", fix="resume with the same ones"
        )
    for index, (before, now) in enumerate(zip(saved, current, strict=True)):
        if before["groups"] != now["groups"]:
            raise ConfigError(
                f"the checkpoint's parameter groups are not those of this run (optimizer {index}, {now['optimizer']})",
                where="resume",
                evidence="; ".join(_differences(before["groups"], now["groups"])),
                fix="resume with the same weight-decay policy, overrides and model, or load the weights alone",
            )


def check_group_sizes(saved: Sequence[Sequence[int]], current: Sequence[OptimizerLayout]) -> None:
    """The same for a checkpoint that was written without a layout: only the number of parameters in each group is known.

    Raises ConfigError when they differ.
    """
    sizes = [[len(names) for names in layout["groups"]] for layout in current]
    if [list(groups) for groups in saved] != sizes:
        raise ConfigError(
            "the checkpoint was written without GammaDecay, and its parameter groups are not those of this run",
            where="resume",
            evidence=f"parameters in each group of each optimizer: {[list(groups) for groups in saved]} before, {sizes} now",
            fix="finish that run without GammaDecay, or load the weights alone",
        )


def _differences(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> list[str]:
    was, is_now = _group_of(before), _group_of(now)
    moved = [name for name in was if name in is_now and was[name] != is_now[name]]
    facts = {
        "in another group": [f"{name} ({was[name]} -> {is_now[name]})" for name in moved],
        "only in the checkpoint": [name for name in was if name not in is_now],
        "only in this run": [name for name in is_now if name not in was],
    }
    told = [f"{len(before)} groups in the checkpoint, {len(now)} now"] if len(before) != len(now) else []
    told += [f"{what}: {_listed(names)}" for what, names in facts.items() if names]
    return told or ["the same groups in another order"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _group_of(groups: Sequence[Sequence[str]]) -> dict[str, int]:
    return {name: index for index, group in enumerate(groups) for name in group}
