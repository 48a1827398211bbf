"""The last good buffers: written to, assigned anew, late, growing, empty, deleted, infinite from the start, of any type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit.methods.nan_safety.guard.buffers import SMALL, BufferShadow


@pytest.fixture
def watched() -> Iterator[Callable[[nn.Module], BufferShadow]]:
    """Shadows that are closed at the end of the test."""
    made: list[BufferShadow] = []

    def watch(module: nn.Module) -> BufferShadow:
        made.append(BufferShadow(module))
        return made[-1]

    yield watch
    for shadow in made:
        shadow.close()


Watch = Callable[[nn.Module], BufferShadow]


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.norm(x)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_shadow_restores_statistics_and_counters(watched: Watch) -> None:
    module = Buffers()
    shadow = watched(module)
    module(torch.randn(4, 3))
    shadow.accept()
    good = snapshot(module)
    module(torch.full((4, 3), math.inf))
    assert shadow.bad_names() == ["norm.running_mean", "norm.running_var"]
    shadow.restore()
    assert same(good, snapshot(module))
    assert shadow.bad_names() == []


def test_shadow_follows_assigned_buffers_and_changes_from_outside(watched: Watch) -> None:
    module = Buffers()
    shadow = watched(module)
    module.average = torch.ones(2)
    module.average.add_(1)
    assert shadow.accept_outside() == []
    module.average.add_(math.nan)
    assert shadow.accept_outside() == ["average"]
    shadow.restore()
    assert torch.equal(module.average, torch.full((2,), 2.0))


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_settling_on_the_device_equals_accept_and_restore(bad: float, watched: Watch) -> None:
    modules = [Buffers(), Buffers()]
    shadows = [watched(module) for module in modules]
    x = torch.randn(4, 3)
    for module in modules:
        module(x)
    shadows[0].settle(torch.tensor(bad))
    shadows[1].restore() if bad else shadows[1].accept()
    assert same(snapshot(modules[0]), snapshot(modules[1]))
    for module, shadow in zip(modules, shadows, strict=True):
        module(x + 1)
        shadow.restore()
    assert same(snapshot(modules[0]), snapshot(modules[1]))


def with_buffer(value: Tensor | None) -> nn.Module:
    module = nn.Module()
    module.register_buffer("q", value)
    return module


def same_value(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    if left.shape != right.shape or left.dtype != right.dtype or left.layout != right.layout:
        return False
    left, right = (tensor.to_dense() if tensor.layout != torch.strided else tensor for tensor in (left, right))
    return torch.equal(torch.isnan(left), torch.isnan(right)) and torch.equal(torch.nan_to_num(left), torch.nan_to_num(right))


STARTS: dict[str, Callable[[], Tensor | None]] = {
    "vector": lambda: torch.arange(4.0),
    "scalar": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0),
    "none": lambda: None,
    "float64": lambda: torch.arange(4, dtype=torch.float64),
    "bfloat16": lambda: torch.arange(4, dtype=torch.bfloat16),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "integer": lambda: torch.arange(5),
    "bool": lambda: torch.tensor([True, False]),
    "minus infinity": lambda: torch.tensor([0.0, -math.inf]),
    "plus infinity": lambda: torch.full((2,), math.inf),
    "nan": lambda: torch.tensor([math.nan, 1.0]),
    "large": lambda: torch.zeros(SMALL + 1),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "inference": torch.inference_mode()(lambda: torch.ones(3)),
}


def _spoil(module: nn.Module, value: float) -> None:
    """Write `value` where that is possible, else something else."""
    q = module.q
    if q is None:
        module.q = torch.full((2,), value)
    elif q.layout != torch.strided:
        module.q = q * value
    elif q.is_inference():
        module.q = torch.full((3,), value)
    elif q.is_floating_point() or q.is_complex():
        q.fill_(value)
    else:
        q.add_(1) if q.dtype != torch.bool else q.logical_not_()


SPOILS: dict[str, Callable[[nn.Module], Any]] = {
    "nan": lambda m: _spoil(m, math.nan),
    "data": lambda m: None if m.q is None or m.q.is_inference() or m.q.layout != torch.strided else m.q.data.zero_(),
    "assigned anew": lambda m: setattr(m, "q", torch.full((7,), math.nan)),
    "to None": lambda m: setattr(m, "q", None),
    "deleted": lambda m: delattr(m, "q"),
    "storage": lambda m: None if m.q is None or m.q.layout != torch.strided else setattr(m, "q", m.q.detach().clone()),
    "late": lambda m: m.register_buffer("late", torch.full((2,), math.nan)),
    "late and spoiled": lambda m: (m.register_buffer("late", torch.zeros(2)), m.late.fill_(math.nan)),
    "late part": lambda m: m.add_module("part", with_buffer(torch.full((), math.inf))),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("start", STARTS)
def test_a_skipped_step_restores_them_all(start: str, spoil: str, watched: Watch) -> None:
    module = with_buffer(STARTS[start]())
    shadow = watched(module)
    shadow.accept()
    expected = None if module.q is None else module.q.detach().clone()
    silent_large = (start, spoil) == ("large", "data")  # no counter moves; found in the next comparison
    SPOILS[spoil](module)
    shadow.restore()
    assert silent_large or same_value(expected, module._buffers["q"])
    others = [buffer for name, buffer in module.named_buffers() if name != "q"]
    assert all(bool(torch.isfinite(buffer).all()) for buffer in others)
    assert "late" not in module._buffers or spoil == "late and spoiled"
    assert shadow.bad_names() == []


def test_a_large_buffer_written_past_the_counter_is_found_and_followed(watched: Watch) -> None:
    module = with_buffer(torch.zeros(SMALL + 1))
    shadow = watched(module)
    module.q.data.fill_(1.0)
    shadow.accept()
    module.q.data.fill_(math.nan)
    assert bool(shadow.bad())
    shadow.restore()
    assert torch.equal(module.q, torch.ones(SMALL + 1))


def test_constant_large_buffers_are_not_read(watched: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = with_buffer(torch.zeros(SMALL + 1))
    shadow = watched(module)
    for _ in range(4):
        shadow.accept()
    monkeypatch.setattr("pl_normkit.methods.nan_safety.guard.buffers.local", lambda tensor: pytest.fail("read"))
    assert not shadow.bad()
    shadow.accept()  # the fifth: no comparison is due
    assert shadow.accept_outside() == []


@pytest.mark.parametrize(
    ("start", "becomes", "bad"),
    [
        (-math.inf, -math.inf, False), (-math.inf, 1.0, False), (-math.inf, math.inf, True), (-math.inf, math.nan, True),
        (math.inf, math.inf, False), (math.inf, -math.inf, True), (math.nan, math.nan, False), (0.0, -math.inf, True), (0.0, 5.0, False),
    ],
)  # fmt: skip
def test_what_is_infinite_from_the_start_may_stay_so(start: float, becomes: float, bad: bool, watched: Watch) -> None:
    module = with_buffer(torch.full((3,), start))
    shadow = watched(module)
    module.q.fill_(becomes)
    assert bool(shadow.bad()) is bad
    assert shadow.bad_names() == (["q"] if bad else [])


def test_a_mask_made_anew_in_another_shape_is_no_fault(watched: Watch) -> None:
    module = with_buffer(torch.zeros(1, 1))
    shadow = watched(module)
    for size in (4, 6):
        module.q = torch.full((size, size), -math.inf).triu(1)
        assert not shadow.bad()
        shadow.accept()
        assert not shadow.bad()
    module.q[0, 0] = math.nan
    assert shadow.bad_names() == ["q"]


def test_values_can_be_forgiven_except_in_norm_layers(watched: Watch) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), with_buffer(torch.zeros(2)))
    shadow = watched(module)
    module[1].q[0] = math.nan
    module[0](torch.full((4, 3), math.nan))
    assert shadow.forgive() == ["1.q"]
    assert shadow.bad_names() == ["0.running_mean", "0.running_var"]


def test_shared_buffers_and_modules_that_come_and_go(watched: Watch) -> None:
    shared = torch.zeros(2)
    module = nn.ModuleDict({"a": with_buffer(shared), "b": with_buffer(shared)})
    shadow = watched(module)
    shared.fill_(math.nan)
    module["c"] = with_buffer(torch.ones(1))
    del module["a"]
    shadow.restore()
    assert module["b"].q is shared
    assert torch.equal(shared, torch.zeros(2))
    assert torch.equal(module["c"].q, torch.ones(1))


class CustomNorm(nn.Module):
    """Batch norm written by hand: its statistics are written by a kernel that counts no version."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=True)


@pytest.mark.parametrize("width", [3, SMALL + 1])
def test_statistics_of_a_norm_layer_of_ones_own(width: int, watched: Watch) -> None:
    module = CustomNorm(width)
    shadow = watched(module)
    module(torch.randn(4, width))
    shadow.accept()
    good = snapshot(module)
    module(torch.full((4, width), math.nan))
    assert bool(shadow.bad())
    shadow.restore()
    assert same(good, snapshot(module))


OPERATIONS: dict[str, Callable[[nn.Module, float], Any]] = {
    "add": lambda m, v: m.q.add_(v) if m.q is not None else None,
    "assign": lambda m, v: setattr(m, "q", torch.full((3,), v)),
    "grow": lambda m, v: setattr(m, "q", torch.cat([m.q, torch.full((2,), v)]) if m.q is not None else torch.full((2,), v)),
    "shrink": lambda m, v: setattr(m, "q", m.q[1:] if m.q is not None else None),
    "none": lambda m, v: setattr(m, "q", None),
    "data": lambda m, v: m.q.data.mul_(v) if m.q is not None else None,
    "count": lambda m, v: m.count.add_(1),
    "late": lambda m, v: m.register_buffer(f"late{len(m._buffers)}", torch.full((2,), v)),
    "resize": lambda m, v: setattr(m.q, "data", torch.full((5,), v)) if m.q is not None else None,
}
VALUES = st.sampled_from([0.5, 2.0, math.nan, math.inf])


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), VALUES), max_size=4)), max_size=8))
def test_after_any_operations_a_bad_step_leaves_the_last_good_values(steps: list[tuple[bool, list[tuple[str, float]]]]) -> None:
    module = with_buffer(torch.ones(3))
    module.register_buffer("count", torch.zeros((), dtype=torch.long))
    shadow = BufferShadow(module)
    try:
        for skip, operations in steps:
            before = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
            for name, value in operations:
                OPERATIONS[name](module, value)
            if skip or bool(shadow.bad()):
                shadow.restore()
                assert all(same_value(value, module._buffers[name]) for name, value in before.items())
                added = [value for name, value in module._buffers.items() if name not in before and value is not None]
                assert all(bool(torch.isfinite(value).all()) for value in added)
                shadow.accept()
            else:
                shadow.accept()
    finally:
        shadow.close()
