from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pl_normkit.preserve import objects_kept, preserved


class Hoarder(nn.Module):
    """Touches everything a forward pass may touch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("running", torch.zeros(3))
        self.plain = torch.zeros(3)
        self.calls = 0
        self.cache: Tensor | None = None
        self.lists = [[1], [2, [3]]]
        self.table: dict[str, Any] = {"inner": {"n": [0]}}
        self.seen = {1}
        self.recent = deque([1, 2], maxlen=2)
        self.counts: dict[str, int] = defaultdict(int, a=1)
        self.order = OrderedDict(a=1, b=2)
        self.tensors = ([torch.zeros(2)], {"t": torch.ones(2)})

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = self.linear(x)
        self.fresh = "new"
        self.running = self.running + 1
        self.plain.add_(1)
        self.lists[1].append(4)
        self.lists.append([5])
        self.table["inner"]["n"].append(1)
        self.table["more"] = 1
        self.seen.add(2)
        self.recent.append(3)
        self.counts["b"] += 1
        self.order.move_to_end("a")
        self.tensors[0][0].add_(1)
        self.tensors[1]["t"].mul_(0)
        self.linear.touched = True
        self.linear.eval()
        return self.cache


def snapshot(model: nn.Module) -> list[Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value.tolist()
        if isinstance(value, dict):
            return id(value), [(key, plain(inner)) for key, inner in value.items()]
        if isinstance(value, (list, tuple, deque)):
            return id(value), [plain(inner) for inner in value]
        return id(value), repr(value)

    return [(name, [(key, plain(value)) for key, value in vars(module).items()]) for name, module in model.named_modules()]


def random_snapshot() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return random.getstate(), torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2:]


@pytest.mark.parametrize("training", [True, False])
def test_everything_a_forward_pass_set_is_put_back(training: bool) -> None:
    model = Hoarder().train(training)
    before = snapshot(model)
    with preserved(model):
        model(torch.ones(1, 3))
        model.train(not training)
        assert snapshot(model) != before
    assert snapshot(model) == before


def test_everything_is_put_back_when_the_block_raises() -> None:
    model = Hoarder()
    before = snapshot(model)

    def break_down() -> None:
        with preserved(model):
            model(torch.ones(1, 3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_down()
    assert snapshot(model) == before


def test_random_states_are_put_back() -> None:
    before = random_snapshot()
    with preserved(nn.Linear(1, 1)):
        inside = random_snapshot()
        random.random()
        torch.rand(1)
        np.random.rand(1)  # noqa: NPY002
        assert random_snapshot() != inside
    inside_again = random_snapshot()
    assert inside_again == inside
    assert before != inside  # nn.Linear drew its weights before the block began


@pytest.mark.parametrize("buffers", [True, False])
def test_buffer_values_are_put_back_when_asked(buffers: bool) -> None:
    norm = nn.BatchNorm1d(3)
    with preserved(norm, buffers=buffers):
        norm(torch.randn(4, 3) + 5)
    assert (norm.num_batches_tracked.item(), norm.running_mean.eq(0).all().item()) == ((0, True) if buffers else (1, False))


@pytest.mark.parametrize("training", [True, False])
def test_a_pending_backward_pass_stays_valid(training: bool) -> None:
    """Writing a buffer back must not tell autograd that what it saved was modified."""
    norm = nn.BatchNorm1d(3).train(training)
    norm.cache = torch.rand(3, requires_grad=True).exp()
    loss = (norm(torch.randn(4, 3, requires_grad=True)) * norm.cache.exp()).sum()
    with preserved(norm, buffers=True):
        norm(torch.randn(4, 3))
    loss.backward()
    assert norm.weight.grad is not None


def test_gradients_and_parameters_keep_their_objects() -> None:
    model = nn.Linear(3, 1)
    model(torch.ones(2, 3)).sum().backward()
    before = [(id(p), id(p.grad), p._version) for p in model.parameters()]
    with preserved(model, buffers=True):
        model(torch.ones(2, 3))
    assert [(id(p), id(p.grad), p._version) for p in model.parameters()] == before


def test_a_container_that_holds_itself_is_no_trap() -> None:
    model = nn.Linear(1, 1)
    model.ring = []
    model.ring.append(model.ring)
    with preserved(model):
        model.ring.append(1)
    assert len(model.ring) == 1


def test_tensors_of_inference_mode_are_left_alone() -> None:
    model = nn.Linear(1, 1)
    with torch.inference_mode():
        model.cache = torch.ones(2)
        model.register_buffer("b", torch.ones(2))
    with preserved(model, buffers=True):
        model.cache = None
    assert model.cache.tolist() == [1, 1]


def test_frozen_parameters_are_put_back_as_buffers_are() -> None:
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entries = nn.Parameter(torch.zeros(3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.entries.data += x
            return self.entries * x

    model = Codebook()
    with preserved(model, buffers=True):
        model(torch.ones(3))
        assert model.entries.eq(1).all()
    assert model.entries.eq(0).all()


def test_objects_that_hang_on_a_root_are_put_back() -> None:
    class Counts:
        def __init__(self) -> None:
            self.calls, self.seen, self.inner = 0, [1], {"generator": random.Random(3), "own": torch.Generator().manual_seed(3)}
            self.itself, self.empty = self, ([], {}, set())

    found = Counts()
    drawn = copy.deepcopy(found.inner["generator"]).random(), torch.rand(1, generator=found.inner["own"].clone_state()).item()
    with objects_kept(found, nn.Linear(1, 1)):
        found.calls, found.added = 5, True  # type: ignore[attr-defined]
        found.seen.append(2)
        found.empty[0].append(1)
        found.empty[1]["key"] = 1
        found.empty[2].add(1)
        found.inner["generator"].random()
        torch.rand(1, generator=found.inner["own"])
    assert (found.calls, found.seen, found.empty, hasattr(found, "added")) == (0, [1], ([], {}, set()), False)
    assert (found.inner["generator"].random(), torch.rand(1, generator=found.inner["own"]).item()) == drawn
