"""Edits that a checkpoint's weights were trained with, as plain data in the checkpoint, and made again on a model that was just built."""

from __future__ import annotations

__all__ = ["KEY", "attribute_records", "edit_records", "fix_records", "restore_edits", "restore_records"]

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pl_normkit.auditing import PlannedFix, apply_fixes
from pl_normkit.errors import ConfigError, EditError
from pl_normkit.surgery import Changes, SetAttributes, apply_edits, path_of
from pl_normkit.wrappers import unwrapped

KEY = "edits"
"""Where the state of a callback keeps its records."""


def restore_edits(model: nn.Module, checkpoint: Mapping[str, Any]) -> Changes:
    """Make the edits that `ModelAudit(fix=...)`, `DropoutPlacement`, `AtrousRates` or `NormPlacement` made in the run of a checkpoint.

    Call it before `load_state_dict`: some edits add parameters, none renames one. A Trainer with the callback does this by itself.

    Args:
        model: the LightningModule, or the network that was edited, as it was before the edits.
        checkpoint: what `torch.load` gives, from a Trainer's checkpoint.

    Returns:
        the edits; none where the checkpoint holds none, or where they are made already.

    Raises:
        ConfigError: for something that is no Trainer's checkpoint.
        EditError: where the model has no such modules. It is as it was then.

    >>> restore_edits(nn.Linear(2, 2), {"callbacks": {}}).made
    []
    """
    states = checkpoint.get("callbacks") if isinstance(checkpoint, Mapping) else None
    if not isinstance(states, Mapping):
        raise ConfigError("this is no checkpoint of a Trainer", evidence="it has no callbacks", fix="give what torch.load gives")
    return restore_records(model, _records(checkpoint))


def fix_records(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of fixes in a checkpoint, without those of callbacks that put back their own."""
    return [record for record in _records(checkpoint) if "fix" in record]


def _records(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    states = checkpoint.get("callbacks", {}).values()
    return [record for state in states if isinstance(state, Mapping) for record in state.get(KEY, ())]


def restore_records(model: nn.Module, records: Sequence[Mapping[str, Any]]) -> Changes:
    changes = Changes()
    try:
        for record in records:
            changes.add(_restore_record(model, record))
    except BaseException:
        changes.undo()
        raise
    return changes


def edit_records(root: nn.Module, network: nn.Module, inputs: Any, fixes: Sequence[PlannedFix]) -> list[dict[str, Any]]:
    """Records of fixes that acted on `network`, a part of `root`, which is called with `inputs`: numbers, strings and containers alone."""
    spec = tree_map(_spec, inputs)
    return [{"network": path_of(root, network), "fix": fix.code, "places": list(fix.places), "inputs": spec} for fix in fixes]


def attribute_records(edits: Sequence[SetAttributes]) -> list[dict[str, Any]]:
    return [{"module": edit.path, "values": dict(edit.values)} for edit in edits]


def _restore_record(model: nn.Module, record: Mapping[str, Any]) -> Changes:
    if "values" in record:
        path = _path_in(model, record["module"])
        return apply_edits(model, [SetAttributes(path, record["values"], ", ".join(f"{k} {v}" for k, v in record["values"].items()))])
    network = _module_at(model, record["network"])
    if "room" in record:
        return _room(record["room"]).restore(network, record)  # type: ignore[no-any-return]
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    places = tuple(_path_in(model, path) for path in record["places"])
    inputs = tree_map(lambda leaf: _from_spec(leaf, device), record["inputs"], is_leaf=_is_spec)
    return apply_fixes(unwrapped(model), inputs, [PlannedFix(record["fix"], places)], network=network)


def _room(name: str) -> Any:
    """The fixes of a room that puts back its own. Raises EditError for another name."""
    path = f"pl_normkit.methods.{name}.fix"
    if not name.isidentifier() or importlib.util.find_spec(f"pl_normkit.methods.{name}") is None:
        raise EditError(f"there is no method {name!r}", fix="load the checkpoint with the version of pl_normkit that wrote it")
    return importlib.import_module(path)


def _module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the run's LightningModule; the model itself where it is that network."""
    try:
        return unwrapped(model.get_submodule(path))
    except AttributeError:
        return unwrapped(model)


def _path_in(model: nn.Module, path: str) -> str:
    """A path of the LightningModule as this model has it: whole, or without the name of the attribute that held the network."""
    names = {name for name, _ in unwrapped(model).named_modules()}
    parts = path.split(".")
    found = next((".".join(parts[start:]) for start in range(len(parts)) if ".".join(parts[start:]) in names), None)
    if found is None:
        raise EditError(f"the model has no module {path!r}", fix="give the LightningModule of the run, or its network")
    return found


def _spec(leaf: Any) -> Any:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")} if isinstance(leaf, Tensor) else leaf


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"shape", "dtype"}


def _from_spec(leaf: Any, device: torch.device) -> Any:
    return torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"]), device=device) if _is_spec(leaf) else leaf
