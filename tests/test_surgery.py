from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit.errors import EditError
from pl_normkit.surgery import Attach, Change, Changes, Edit, Insert, MixIn, Replace, SetAttributes, apply_edits, get_module


class Leaf(nn.Module):
    """A layer with every kind of state."""

    scale_by = 1.0

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(width)
        self.p = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.linear(x))) * self.scale_by


class Tree(nn.Module):
    """Runs its children one after another; the same child may stand at several names."""

    def __init__(self, children: Sequence[nn.Module]) -> None:
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(f"part{index}", child)

    def forward(self, x: Tensor) -> Tensor:
        for child in list(self._modules):
            if child.startswith("part"):
                x = self.get_submodule(child)(x)
        return x


class Shift(nn.Module):
    """Something to insert that has a buffer."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("by", torch.tensor(by))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Doubled(nn.Module):
    """Mix-in that uses a method of the class behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Raised(nn.Module):
    """A second one; it uses a child where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        child = self._modules.get("inserted_child")
        return super().forward(x) + (1 if child is None else child(torch.zeros(())))


def noop_hook(*_: Any) -> None:
    return


def shift_first(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    child = host.get_submodule("inserted_call")
    return (child(args[0]), *args[1:]), kwargs


trees = st.recursive(
    st.builds(Leaf),
    lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda parts: st.booleans().map(lambda shared: Tree([*parts, parts[0]] if shared else parts))
    ),
    max_leaves=4,
)


def snapshot(model: nn.Module) -> Any:
    """Objects, hooks, attributes and values, bit for bit; the order of every registry too."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, id(inner)) for key, inner in value.items()]
        return id(value), repr(value) if isinstance(value, (bool, int, float, str)) else ""

    tree = [
        (name, id(module), type(module), [(key, plain(value)) for key, value in vars(module).items()])
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    return tree, [(key, id(value), value.detach().clone().numpy().tobytes()) for key, value in model.state_dict(keep_vars=True).items()]


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
