"""Edits as plain data in a checkpoint, made again on a model that was just built, or not at all."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from pl_normkit.auditing import PlannedFix
from pl_normkit.errors import ConfigError, EditError
from pl_normkit.restoring import KEY, attribute_records, edit_records, fix_records, restore_edits, restore_records
from pl_normkit.surgery import SetAttributes
from tests.methods.residual_networks import BlockSpec, Net, NetSpec

SPEC = NetSpec((BlockSpec("pre-basic", (2,)),))


def root() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"net": Net(SPEC)})


def checkpoint_of(*records: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file that holds data alone."""
    file = io.BytesIO()
    torch.save({"callbacks": {"ModelAudit": {KEY: list(records)}, "Other": 3}}, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_a_fix_and_an_attribute_are_made_again_on_module_and_network() -> None:
    run = root()
    fixes = edit_records(run, run["net"], torch.zeros(2, 3, 8, 8), [PlannedFix("NK101", ("net.blocks.0.drop2",))])
    attributes = attribute_records([SetAttributes("net.blocks.0.op5", {"stride": (1, 1)}, "stride 1")])
    checkpoint = checkpoint_of(*fixes, *attributes)
    assert fix_records(checkpoint) == fixes
    for model, path in ((root(), "net.blocks.0.drop2"), (root()["net"], "blocks.0.drop2")):
        before = type(model.get_submodule(path))
        changes = restore_edits(model, checkpoint)
        assert changes.made
        assert not restore_edits(model, checkpoint_of(*fixes)).made
        changes.undo()
        assert type(model.get_submodule(path)) is before


def test_where_the_model_is_another_one_nothing_is_edited() -> None:
    model = root()["net"]
    good = attribute_records([SetAttributes("net.blocks.0.op5", {"stride": (2, 2)}, "stride 2")])
    bad = attribute_records([SetAttributes("net.nowhere", {"stride": (1, 1)}, "stride 1")])
    stride = model.get_submodule("blocks.0.op5").stride
    with pytest.raises(EditError, match=r"net\.nowhere"):
        restore_records(model, [*good, *bad])
    assert model.get_submodule("blocks.0.op5").stride == stride


@pytest.mark.parametrize("thing", [{}, {"state_dict": {}}, {"callbacks": None}, [1], None])
def test_what_is_no_checkpoint_is_refused(thing: Any) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of a Trainer"):
        restore_edits(root(), thing)
