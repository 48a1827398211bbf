"""Is a step finite, without Lightning."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit.methods.nan_safety.guard.decision import Verdict, gradient_norm, gradients, measure, total_of


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=4), max_size=4),
    st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), min_size=4, max_size=4),
)
def test_a_step_is_finite_when_every_norm_is(values: list[list[float]], dtypes: list[torch.dtype]) -> None:
    grads = [torch.tensor(entries, dtype=torch.float64).to(dtype) for entries, dtype in zip(values, dtypes, strict=False)]
    wide = [gradient if gradient.dtype == torch.float64 else gradient.float() for gradient in grads]
    expected = all(bool(torch.isfinite(gradient.norm())) for gradient in wide)
    assert bool(torch.isfinite(gradient_norm(grads))) is expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20])
@pytest.mark.parametrize("position", [0, 777, 4095])
def test_one_entry_is_enough(value: float, position: int) -> None:
    grads = [torch.zeros(3), torch.zeros(64, 64), torch.zeros(())]
    assert torch.isfinite(gradient_norm(grads))
    grads[1].view(-1)[position] = value
    assert not torch.isfinite(gradient_norm(grads))


def test_sparse_and_mixed_gradients() -> None:
    table, layer = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD([*table.parameters(), *layer.parameters()], lr=0.1)
    layer(table(torch.tensor([1, 3])).double()).sum().backward()
    assert torch.isfinite(gradient_norm(gradients(optimizer)))
    assert table.weight.grad is not None
    table.weight.grad._values()[0, 0] = math.nan
    assert not torch.isfinite(gradient_norm(gradients(optimizer)))
    assert torch.isfinite(gradient_norm([]))


def test_clipping_cannot_save_a_step() -> None:
    for value, others in [(math.nan, math.nan), (math.inf, 0.0)]:
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        assert parameters[0].grad is not None
        parameters[0].grad[0] = value
        nn.utils.clip_grad_norm_(parameters, 35.0)
        assert parameters[1].grad is not None
        torch.testing.assert_close(parameters[1].grad, torch.full((2,), others), equal_nan=True)
        assert bool(parameters[0].grad[0].isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_the_total_is_finite_when_every_entry_is(dtype: torch.dtype, value: float | None) -> None:
    largest = torch.full((300,), torch.finfo(dtype).max / 2, dtype=dtype)  # neither a sum nor a square of these is finite
    values = [torch.zeros(0, dtype=dtype), largest, torch.arange(3)]
    if value is not None:
        largest[123] = value
    assert bool(torch.isfinite(total_of(values))) is (value is None)


def test_the_norm_in_half_precision_does_not_overflow_over_many_entries() -> None:
    assert float(gradient_norm([torch.full((100, 100), 200.0, dtype=torch.float16)])) == pytest.approx(20000.0)


PARTS = ["loss", "gradient", "buffer", "parameter", "state"]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.sets(st.sampled_from(PARTS)), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from([torch.float32, torch.float64]))
def test_the_verdict_names_what_is_bad(bad: set[str], value: float, dtype: torch.dtype) -> None:
    def some(part: str) -> list[Tensor]:
        tensors = [torch.tensor(1e300 if dtype == torch.float64 else 1.0, dtype=dtype), torch.ones(3, dtype=dtype)]
        if part in bad:
            tensors[1][1] = value
        return tensors

    grads = [torch.full((4,), value if "gradient" in bad else 2.0)]
    verdict = Verdict.of(measure(some("loss"), grads, torch.tensor("buffer" in bad), some("parameter"), some("state")))
    assert {part for part in PARTS if getattr(verdict, part)} == bad
    assert (verdict.bad, verdict.stays) == (bool(bad), bool(bad & {"parameter", "state"}))
    assert verdict.norm == (0.0 if "gradient" in bad else 4.0)


def test_sharded_ranks_agree_by_one_flag() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = str(Path(__file__).with_name("sharded_flag.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, script]
    running = [
        subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [out.splitlines()[-1] for out, _ in outputs] == ["[True, True, False]", "[True, False, False]"], outputs[0][1][-2000:]
