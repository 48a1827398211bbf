"""Each kind of edit by example."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pl_normkit.errors import EditError
from pl_normkit.surgery import Attach, Change, Changes, Insert, MixIn, Replace, SetAttributes, apply_edits, get_module
from tests.module_trees import Doubled, Leaf, Shift, Tree, shift_first, snapshot


@pytest.fixture
def tree() -> Tree:
    torch.manual_seed(0)
    shared = Leaf()
    return Tree([shared, Leaf(), shared]).eval()


X = torch.arange(12.0).reshape(4, 3)


def test_insert_acts_before_and_after(tree: Tree) -> None:
    leaf = tree.part1
    plain = leaf(X + 2)
    apply_edits(tree, [Insert("part1", "first", Shift(2.0), "a"), Insert("part1", "last", Shift(5.0), "b", where="after")])
    assert torch.equal(leaf(X), plain + 5)


def test_insert_acts_on_a_keyword_argument(tree: Tree) -> None:
    expected = tree.part1.linear(X + 2)
    apply_edits(tree, [Insert("part1.linear", "first", Shift(2.0), "a")])
    assert torch.equal(tree.part1.linear(input=X), expected)


def test_insert_leaves_further_arguments_alone() -> None:
    attention = nn.MultiheadAttention(4, 1)
    x = torch.randn(2, 1, 4)
    expected = attention(x + 2, x, value=x)[0]
    apply_edits(attention, [Insert("", "first", Shift(2.0), "a")])
    assert torch.equal(attention(x, x, value=x)[0], expected)


def test_an_inserted_buffer_is_new_state_under_its_own_key(tree: Tree) -> None:
    before = list(tree.state_dict())
    apply_edits(tree, [Insert("part1.linear", "moved", Shift(2.0), "a")])
    assert [key for key in tree.state_dict() if key not in before] == ["part1.linear.moved.by"]
    assert tree.state_dict()["part1.linear.moved.by"].item() == 2
    assert tree.double().part1.linear.moved.by.dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_what_comes_in_has_the_mode_of_its_place_and_follows_it(tree: Tree, training: bool) -> None:
    tree.train(training)
    apply_edits(tree, [Insert("part1", "a", nn.Dropout(), "a"), Replace("part1.drop", nn.Dropout(0.2), "b")])
    assert (tree.part1.a.training, tree.part1.drop.training) == (training, training)
    tree.train(not training)
    assert (tree.part1.a.training, tree.part1.drop.training) == (not training, not training)


def test_a_shared_module_is_replaced_everywhere_and_put_back_everywhere(tree: Tree) -> None:
    tree.part3 = tree.part0.drop
    old, new = tree.part0.drop, nn.Identity()
    changes = apply_edits(tree, [Replace("part2.drop", new, "off")])
    assert [m is new for m in (tree.part0.drop, tree.part2.drop, tree.part3)] == [True] * 3
    assert tree.part1.drop is not new
    changes.undo()
    assert [m is old for m in (tree.part0.drop, tree.part2.drop, tree.part3)] == [True] * 3


def test_a_shared_host_takes_an_insertion_once(tree: Tree) -> None:
    new = Shift(2.0)
    changes = apply_edits(tree, [Insert("part0", "a", new, "x"), Insert("part2", "a", new, "x")])
    assert [change.module for change in changes.made] == ["part0"]
    assert len(tree.part0._forward_pre_hooks) == 1


def test_two_insertions_under_one_name_are_refused_and_taken_back(tree: Tree) -> None:
    before = snapshot(tree)
    with pytest.raises(EditError, match=r"part1.a exists already"):
        apply_edits(tree, [SetAttributes("part1", {"p": 0.9}, "s"), Insert("part1", "a", Shift(), "x"), Insert("part1", "a", Shift(), "y")])
    assert snapshot(tree) == before


@pytest.mark.parametrize(
    "container", [nn.Sequential(nn.Linear(3, 3)), nn.ModuleList([nn.Linear(3, 3)]), nn.ModuleDict({"x": nn.Linear(3, 3)})]
)
def test_nothing_is_inserted_at_a_container(container: nn.Module) -> None:
    """A Sequential would run the new child a second time, the others never call their hooks."""
    model = Tree([container])
    with pytest.raises(EditError, match=type(container).__name__):
        apply_edits(model, [Insert("part0", "a", Shift(), "x")])
    assert list(container._modules) == (["x"] if isinstance(container, nn.ModuleDict) else ["0"])


class Guarded(nn.Module):
    """Attributes of every kind: on the class, behind properties."""

    dim = 1

    def __init__(self) -> None:
        super().__init__()
        self._rate = 0.5
        self.own = 1

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        if value > 1:
            raise ValueError("too large")
        self._rate = value

    @property
    def fixed(self) -> int:
        return 1


def test_undo_takes_a_class_attribute_off_the_instance_again() -> None:
    model = Guarded()
    before = snapshot(model)
    changes = apply_edits(model, [SetAttributes("", {"dim": 2, "own": 5, "rate": 0.25}, "x")])
    assert (model.dim, model.own, model.rate) == (2, 5, 0.25)
    changes.undo()
    assert snapshot(model) == before
    assert (model.dim, model.own, model.rate) == (1, 1, 0.5)


def test_a_read_only_property_is_refused() -> None:
    with pytest.raises(EditError, match="cannot be set"):
        apply_edits(Guarded(), [SetAttributes("", {"own": 2, "fixed": 3}, "x")])


def test_a_setter_that_raises_half_way_leaves_nothing_behind() -> None:
    model = Guarded()
    before = snapshot(model)
    with pytest.raises(ValueError, match="too large"):
        apply_edits(model, [SetAttributes("", {"own": 2, "dim": 3}, "x"), SetAttributes("", {"dim": 4, "own": 3, "rate": 7.0}, "y")])
    assert snapshot(model) == before


class Explodes:
    """An edit whose check passes and whose making fails."""

    def check(self, model: nn.Module) -> None:
        return

    def is_done(self, model: nn.Module) -> bool:
        return False

    def apply(self, model: nn.Module) -> tuple[Change, Callable[[], None]]:
        raise KeyboardInterrupt


def test_whatever_an_edit_raises_the_ones_before_it_are_taken_back(tree: Tree) -> None:
    before = snapshot(tree)
    with pytest.raises(KeyboardInterrupt):
        apply_edits(tree, [Replace("part1.drop", nn.Identity(), "off"), Insert("part1", "a", Shift(), "x"), Explodes()])
    assert snapshot(tree) == before


def test_changes_taken_together_are_undone_in_reverse(tree: Tree) -> None:
    before = snapshot(tree)
    changes = Changes()
    changes.add(apply_edits(tree, [Replace("part1.drop", nn.Dropout(0.1), "one")]))
    changes.add(apply_edits(tree, [Replace("part1.drop", nn.Dropout(0.2), "two")], skipped=[Change("part0", "left alone")]))
    assert str(changes) == "part1.drop: one\npart1.drop: two\npart0: left alone (skipped)"
    changes.undo()
    assert snapshot(tree) == before


def test_no_changes_say_so() -> None:
    assert (str(Changes()), bool(Changes())) == ("nothing to change", False)


def test_an_unknown_path_is_refused_naming_the_nearest(tree: Tree) -> None:
    with pytest.raises(EditError) as caught:
        get_module(tree, "part1.linaer")
    assert (caught.value.what, caught.value.fix) == ("the model has no module 'part1.linaer'", "did you mean 'part1.linear'?")


def test_an_edited_model_compiles(tree: Tree) -> None:
    edits = [
        Insert("part1.linear", "a", Shift(2.0), "x"),
        Insert("part1", "b", Shift(3.0), "y", where="after"),
        Replace("part0.drop", nn.Identity(), "off"),
        SetAttributes("part1", {"scale_by": 2.0}, "z"),
    ]
    apply_edits(tree, edits)
    expected = tree(X)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(tree, backend="eager", fullgraph=True)(X), expected)


def test_an_edited_model_trains(tree: Tree) -> None:
    apply_edits(tree, [Insert("part1.linear", "a", nn.Linear(3, 3), "x")])
    tree(X).sum().backward()
    assert tree.part1.linear.a.weight.grad is not None


def test_weight_tied_parameters_stay_tied(tree: Tree) -> None:
    tree.part1.linear.weight = tree.part0.linear.weight
    changes = apply_edits(tree, [Insert("part1.linear", "a", Shift(), "x"), Replace("part0.drop", nn.Identity(), "y")])
    assert tree.part1.linear.weight is tree.part0.linear.weight
    changes.undo()
    assert tree.part1.linear.weight is tree.part0.linear.weight


def test_an_attached_child_acts_on_the_whole_call_and_a_mixin_on_methods(tree: Tree) -> None:
    expected = 2 * tree.part1(X + 5)
    changes = apply_edits(tree, [Attach("part1", "inserted_call", Shift(5.0), "a", shift_first), MixIn("part1", Doubled, "b")])
    assert torch.equal(tree.part1(X), expected)
    assert [str(change) for change in changes.made] == ["part1: a", "part1: b"]


def test_a_mixed_in_class_passes_for_the_one_it_stands_for(tree: Tree) -> None:
    other = Leaf()
    apply_edits(tree, [MixIn("part1", Doubled, "a")])
    apply_edits(other, [MixIn("", Doubled, "a")])
    kind = type(tree.part1)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == (Leaf.__name__, Leaf.__qualname__, Leaf.__module__)
    assert type(other) is kind
    assert [isinstance(tree.part1, base) for base in (Leaf, Doubled)] == [True, True]


def test_a_mixin_that_the_instance_would_hide_is_refused(tree: Tree) -> None:
    tree.part1.forward = tree.part1.linear.forward
    with pytest.raises(EditError, match="forward of this Leaf is set on the instance"):
        apply_edits(tree, [MixIn("part1", Doubled, "a")])


def test_a_class_changed_by_others_since_is_not_put_back(tree: Tree) -> None:
    changes = apply_edits(tree, [MixIn("part1", Doubled, "a")])
    tree.part1.__class__ = type("Sharded", (type(tree.part1),), {})
    with pytest.raises(EditError, match="changed after the edit"):
        changes.undo()


def test_a_child_without_a_hook_may_stand_in_a_container() -> None:
    model = Tree([nn.ModuleList([nn.Linear(3, 3)])])
    apply_edits(model, [Attach("part0", "a", Shift(), "x")])
    assert list(model.state_dict())[-1] == "part0.a.by"
    with pytest.raises(EditError, match="ModuleList"):
        apply_edits(model, [Attach("part0", "b", Shift(), "x", shift_first)])


def test_a_model_with_mixins_compiles(tree: Tree) -> None:
    apply_edits(tree, [Attach("part1", "inserted_call", Shift(5.0), "a", shift_first), MixIn("part1", Doubled, "b")])
    expected = tree(X)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(tree, backend="eager", fullgraph=True)(X), expected)
