"""What holds of any edits of any model: all or nothing, undone, applied twice, old keys, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit.errors import EditError
from pl_normkit.surgery import Attach, Edit, Insert, MixIn, Replace, SetAttributes, apply_edits
from tests.module_trees import Doubled, Leaf, Shift, Tree, shift_first, snapshot


class Raised(nn.Module):
    """A second one; it uses a child where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        child = self._modules.get("inserted_child")
        return super().forward(x) + (1 if child is None else child(torch.zeros(())))


def noop_hook(*_: Any) -> None:
    return


trees = st.recursive(
    st.builds(Leaf),
    lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda parts: st.booleans().map(lambda shared: Tree([*parts, parts[0]] if shared else parts))
    ),
    max_leaves=4,
)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """A random module tree with hooks, some parts shared, in a random mode."""
    torch.manual_seed(draw(st.integers(0, 5)))
    model = Tree([draw(trees), Leaf()])
    for module in list(model.modules()):
        if draw(st.integers(0, 3)) == 0:
            module.register_forward_hook(noop_hook)
        if draw(st.integers(0, 5)) == 0:
            module.eval()
    return model


@st.composite
def edits_for(draw: st.DrawFn, model: nn.Module) -> list[Edit]:
    """Edits that can be made, at most one of a kind at each module."""
    edits: list[Edit] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and draw(st.booleans()):
            edits.append(Replace(path, nn.Identity(), "switched off"))
        elif isinstance(module, (Leaf, nn.Linear, nn.BatchNorm1d, Tree)):
            for where in draw(st.sets(st.sampled_from(["before", "after"]))):
                edits.append(Insert(path, f"inserted_{where}", draw(st.sampled_from([Shift, nn.Dropout]))(), "inserted", where))
        if isinstance(module, (Leaf, nn.Linear)) and draw(st.booleans()):
            edits.append(Attach(path, "inserted_call", Shift(), "attached", shift_first))
        if isinstance(module, Leaf):
            for mixin in draw(st.sets(st.sampled_from([Doubled, Raised]))):
                edits.append(MixIn(path, mixin, "mixed in"))
            if draw(st.booleans()):
                edits.append(Attach(path, "inserted_child", Shift(7.0), "attached"))
        if isinstance(module, Leaf) and draw(st.booleans()):
            values = draw(st.sampled_from([{"p": 0.7}, {"scale_by": 3.0}, {"p": 0.1}, {"p": 0.0, "scale_by": 2.0}]))
            edits.append(SetAttributes(path, values, "set"))
    return draw(st.permutations(edits))


BAD: dict[str, Callable[[], Edit]] = {
    "replace nothing": lambda: Replace("part0.nowhere", nn.Identity(), "x"),
    "replace the model": lambda: Replace("", nn.Identity(), "x"),
    "replace and lose keys": lambda: Replace("part1.linear", nn.Identity(), "x"),
    "replace and add keys": lambda: Replace("part1.drop", nn.Linear(1, 1), "x"),
    "insert nowhere": lambda: Insert("part1.linaer", "a", nn.Identity(), "x"),
    "insert over a module": lambda: Insert("part1", "linear", nn.Identity(), "x"),
    "insert over an attribute": lambda: Insert("part1", "p", nn.Identity(), "x"),
    "insert under a dotted name": lambda: Insert("part1", "a.b", nn.Identity(), "x"),
    "insert under no name": lambda: Insert("part1", "", nn.Identity(), "x"),
    "attach nowhere": lambda: Attach("part1.linaer", "a", nn.Identity(), "x", shift_first),
    "attach over a module": lambda: Attach("part1", "linear", nn.Identity(), "x"),
    "attach under a dotted name": lambda: Attach("part1", "a.b", nn.Identity(), "x"),
    "mix in nowhere": lambda: MixIn("part1.linaer", Doubled, "x"),
    "set nowhere": lambda: SetAttributes("part7", {"p": 1.0}, "x"),
    "set what is not there": lambda: SetAttributes("part1", {"p": 1.0, "nope": 1.0}, "x"),
    "set a module": lambda: SetAttributes("part1", {"linear": 1.0}, "x"),
    "set a parameter": lambda: SetAttributes("part1.linear", {"weight": 1.0}, "x"),
    "set a buffer": lambda: SetAttributes("part1.norm", {"running_mean": 1.0}, "x"),
    "set to a module": lambda: SetAttributes("part1", {"p": nn.Identity()}, "x"),
    "set to a parameter": lambda: SetAttributes("part1", {"p": nn.Parameter(torch.zeros(1))}, "x"),
}

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)


@PROPERTY
@given(data=st.data(), bad=st.sampled_from(sorted(BAD)))
def test_one_bad_edit_leaves_the_model_untouched(data: st.DataObject, bad: str) -> None:
    model = data.draw(models())
    model.part1 = Leaf()
    edits = data.draw(edits_for(model))
    edits.insert(data.draw(st.integers(0, len(edits))), BAD[bad]())
    before = snapshot(model)
    with pytest.raises(EditError):
        apply_edits(model, edits)
    assert snapshot(model) == before


@PROPERTY
@given(data=st.data())
def test_undo_gives_back_the_same_objects_hooks_attributes_and_values(data: st.DataObject) -> None:
    model = data.draw(models())
    edits = data.draw(edits_for(model))
    before = snapshot(model)
    changes = apply_edits(model, edits)
    assert (snapshot(model) != before) == bool(changes)
    changes.undo()
    assert snapshot(model) == before
    changes.undo()
    assert snapshot(model) == before


@pytest.mark.parametrize("trains", [True, False])
def test_undo_follows_the_mode_that_the_model_is_in(trains: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5)).train(not trains)
    changes = apply_edits(model, [Replace("0", nn.Identity(), "switched off")])
    model.train(trains)
    changes.undo()
    assert model[0].training is trains


def test_an_undo_that_fails_can_go_on_later() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Leaf(), nn.Dropout(0.5))
    before = snapshot(model)
    edits = [Replace("0", nn.Identity(), "off"), MixIn("1", Doubled, "mixed in"), Replace("2", nn.Identity(), "off")]
    changes = apply_edits(model, edits)
    later = apply_edits(model, [MixIn("1", Raised, "over it")])
    with pytest.raises(EditError, match="was changed after the edit"):
        changes.undo()
    later.undo()
    changes.undo()
    assert snapshot(model) == before


@PROPERTY
@given(data=st.data())
def test_applying_twice_equals_applying_once(data: st.DataObject) -> None:
    model = data.draw(models())
    edits = data.draw(edits_for(model))
    first = apply_edits(model, edits)
    once = snapshot(model)
    second = apply_edits(model, edits)
    assert snapshot(model) == once
    assert (second.made, bool(second)) == ([], False)
    second.undo()
    assert snapshot(model) == once
    first.undo()


@PROPERTY
@given(data=st.data())
def test_existing_keys_and_parameters_stay_and_an_old_checkpoint_loads(data: st.DataObject) -> None:
    model = data.draw(models())
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    keys = list(model.state_dict())
    checkpoint = copy.deepcopy(model.state_dict())
    apply_edits(model, data.draw(edits_for(model)))
    assert [key for key in model.state_dict() if key in set(keys)] == keys
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert (unexpected, [key for key in missing if ".inserted_" not in f".{key}"]) == ([], [])


@PROPERTY
@given(data=st.data(), through=st.sampled_from(["deepcopy", "pickle"]))
def test_a_copy_of_an_edited_model_does_the_same_with_its_own_children(data: st.DataObject, through: str) -> None:
    model = data.draw(models())
    changes = apply_edits(model, data.draw(edits_for(model)))
    copied = copy.deepcopy(model) if through == "deepcopy" else saved_and_loaded(model)
    x = torch.randn(4, 3)
    assert torch.equal(output(copied, x), output(model, x))
    with torch.no_grad():
        for name, buffer in copied.named_buffers():
            if name.endswith("by"):
                buffer.add_(100)
    ours = {id(module) for module in model.modules()}
    assert [name for name, module in copied.named_modules() if id(module) in ours] == []
    expected = output(copied, x)
    changes.undo()
    assert torch.equal(output(copied, x), expected)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """In the model's own modes, with dropout drawing the same numbers, and running statistics left as they are."""
    torch.manual_seed(1)
    return copy.deepcopy(model)(x)
