"""The modules: torch's own pooling in evaluation, the defined weighted subset in training."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.methods.stochastic_pooling import functional
from pl_normkit.methods.stochastic_pooling.functional import SEED_LIMIT, matching_scale, pool_spec
from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec, windows_of
from pl_normkit.methods.stochastic_pooling.reference import selection
from pl_normkit.nn import StochasticAdaptiveAvgPool1d, StochasticAdaptiveAvgPool2d, StochasticAvgPool1d, StochasticAvgPool2d

KEEPS = (1e-6, 0.3, 0.5, 0.999, 1.0)
POOLS_2D: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (StochasticAdaptiveAvgPool2d, {"output_size": 1}),
    (StochasticAdaptiveAvgPool2d, {"output_size": 3}),
    (StochasticAdaptiveAvgPool2d, {"output_size": (2, None)}),
    (StochasticAdaptiveAvgPool2d, {"output_size": 6}),
    (StochasticAvgPool2d, {"kernel_size": 2}),
    (StochasticAvgPool2d, {"kernel_size": 2, "ceil_mode": True, "count_include_pad": False}),
    (StochasticAvgPool2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (StochasticAvgPool2d, {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False}),
    (StochasticAvgPool2d, {"kernel_size": (7, 5), "stride": (1, 3), "padding": (3, 2), "ceil_mode": True}),
    (StochasticAvgPool2d, {"kernel_size": (2, 3), "stride": (3, 4), "divisor_override": 5}),
]
POOLS_1D: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (StochasticAdaptiveAvgPool1d, {"output_size": 1}),
    (StochasticAdaptiveAvgPool1d, {"output_size": 4}),
    (StochasticAvgPool1d, {"kernel_size": 2}),
    (StochasticAvgPool1d, {"kernel_size": 5, "stride": 2, "padding": 2, "ceil_mode": True, "count_include_pad": False}),
]
POOLS = [(kind, arguments, (3, 4, 13, 11)) for kind, arguments in POOLS_2D] + [
    (kind, arguments, (3, 4, 29)) for kind, arguments in POOLS_1D
]
FORMATS = (torch.contiguous_format, torch.channels_last)


def plain(pool: nn.Module) -> Callable[[Tensor], Tensor]:
    """Torch's own pooling with the arguments of a stochastic pool."""
    kind = type(pool).__mro__[1]
    return lambda x: kind.forward(pool, x)


def drawn_seed(state: Tensor) -> Tensor:
    """The seed that the next call draws from this generator state."""
    torch.set_rng_state(state)
    return torch.randint(SEED_LIMIT, (), dtype=torch.int64)


def by_the_book(pool: Any, x: Tensor, seed: Tensor) -> Tensor:
    """The definition, one window at a time, in float64."""
    spec, dims = pool_spec(pool)
    maps = (x.unsqueeze(-2) if dims == 1 else x).double()
    windows = windows_of(spec, (maps.shape[2], maps.shape[3]), pool.keep)
    kept = selection(windows, seed, 0, maps.shape[0])
    outputs = []
    for number, window in enumerate(windows.all):
        share = window.kept / window.cells
        mean = (maps.flatten(2) * kept[:, None, number]).sum(-1) / window.kept
        outputs.append(mean * math.sqrt(share) * window.padding_factor)
    return torch.stack(outputs, -1).view(*maps.shape[:2], *(windows.out_size if dims == 2 else windows.out_size[1:]))


@pytest.mark.parametrize(("kind", "arguments", "shape"), POOLS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_evaluation_is_torch_bit_for_bit(
    kind: Any, arguments: dict[str, Any], shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    x = torch.randn(shape)
    x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
    for pool in (kind(**arguments, keep=0.5).eval(), kind(**arguments, keep=1.0).train()):
        expected = plain(pool)(x)
        assert torch.equal(expected, pool(x))
        assert expected.stride() == pool(x).stride()


@pytest.mark.parametrize(("kind", "arguments", "shape"), POOLS)
@pytest.mark.parametrize("keep", KEEPS[:-1])
def test_training_is_the_definition(kind: Any, arguments: dict[str, Any], shape: tuple[int, ...], keep: float) -> None:
    pool = kind(**arguments, keep=keep)
    for memory_format in FORMATS[: len(shape) - 2]:
        x = torch.randn(shape, dtype=torch.float64)
        x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
        state = torch.get_rng_state()
        actual = pool(x)
        expected = by_the_book(pool, x, drawn_seed(state))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert actual.stride() == plain(pool)(x).stride()


@pytest.mark.parametrize(("kind", "arguments", "shape"), POOLS)
def test_gradients(kind: Any, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    pool = kind(**arguments, keep=0.5)
    x = torch.randn((1, 2, 7, 6)[: len(shape)], dtype=torch.float64, requires_grad=True)

    def same_subset(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return pool(x)

    torch.autograd.gradcheck(same_subset, x)
    torch.autograd.gradgradcheck(same_subset, x, fast_mode=True)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_exactly_n_cells_get_a_gradient_of_s_over_n_in_every_channel(keep: float, memory_format: torch.memory_format) -> None:
    x = torch.randn(5, 6, 7, 7).contiguous(memory_format=memory_format).requires_grad_()
    StochasticAdaptiveAvgPool2d(1, keep=keep)(x).sum().backward()
    assert x.grad is not None
    kept = x.grad != 0
    n = max(1, round(keep * 49))
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert [n] * 5 == kept[:, 0].sum((1, 2)).tolist()
    torch.testing.assert_close(x.grad[kept], torch.full_like(x.grad[kept], math.sqrt(n / 49) / n))
    assert x.grad.is_contiguous(memory_format=memory_format)
    assert keep == 1.0 or n == 49 or not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize(("scale", "ratio"), [("sqrt", 1.0), ("none", 49 / 24)])
def test_second_moment_of_zero_mean_features(scale: str, ratio: float) -> None:
    x = torch.randn(64, 512, 7, 7)
    pool = StochasticAdaptiveAvgPool2d(1, keep=0.5, scale=scale)
    measured = pool(x).square().mean() / pool.eval()(x).square().mean()
    assert abs(float(measured) / ratio - 1) < 0.02


@pytest.mark.parametrize(("scale", "ratio"), [("sqrt", 0.510), ("none", 1.041), ("match", 1.0)])
def test_second_moment_after_a_relu_is_about_halved_by_the_sqrt_scale(scale: str, ratio: float) -> None:
    x = torch.randn(64, 512, 7, 7).relu()
    pool = StochasticAdaptiveAvgPool2d(1, keep=0.5, scale=scale)
    measured = pool(x).square().mean() / pool.eval()(x).square().mean()
    assert abs(float(measured) / ratio - 1) < 0.02


def test_unscaled_mean_over_subsets_is_the_plain_average() -> None:
    x = torch.randn(1, 3, 6, 7).expand(20_000, -1, -1, -1)
    for pool in (StochasticAdaptiveAvgPool2d((1, 2), keep=0.3, scale="none"), StochasticAvgPool2d(3, 2, 1, keep=0.5, scale="none")):
        outputs = pool(x)
        error = (outputs.mean(0) - pool.eval()(x[0])).abs() / (outputs.std(0) / math.sqrt(len(x))).clamp_min(1e-6)
        assert float(error.max()) < 5.0


def test_matching_scale_agrees_with_the_formula() -> None:
    x = torch.randn(256, 64, 7, 7) + 0.5
    n, cells, mu2, sigma2 = 24, 49, 0.25, 1.0
    expected = math.sqrt((mu2 + sigma2 / cells) / (mu2 + sigma2 / n))
    assert abs(float(matching_scale(x, PoolSpec(1, (1, 1)), 0.5)) / expected - 1) < 0.01
    assert float(matching_scale(torch.zeros(2, 3, 7, 7), PoolSpec(1, (1, 1)), 0.5)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dtypes_accumulate_in_float32_or_wider(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Half types are rounded once, at the end; float32 and float64 err like a sum of 800 terms, sqrt(800) eps at random."""
    x = (torch.rand(2, 8, 40, 40) * 60000).to(dtype).contiguous(memory_format=memory_format)
    pool = StochasticAdaptiveAvgPool2d(1, keep=0.5)
    state = torch.get_rng_state()
    actual = pool(x)
    expected = by_the_book(pool, x.double(), drawn_seed(state))
    assert dtype == actual.dtype
    terms = 800 if dtype in (torch.float32, torch.float64) else 1
    torch.testing.assert_close(actual.double(), expected, rtol=math.sqrt(terms) * torch.finfo(dtype).eps, atol=0)


def test_autocast_keeps_the_input_dtype() -> None:
    conv, pool = nn.Conv2d(3, 4, 3), StochasticAdaptiveAvgPool2d(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pool(conv(torch.randn(2, 3, 9, 9)))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("kind", "arguments", "shape"), POOLS)
def test_manual_seed_repeats_and_calls_differ(kind: Any, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    pool, x = kind(**arguments, keep=0.5), torch.randn(shape)
    torch.manual_seed(11)
    first, second = pool(x), pool(x)
    torch.manual_seed(11)
    assert torch.equal(first, pool(x))
    assert not torch.equal(first, second)


def test_checkpointing_recomputes_the_same_subset() -> None:
    block = nn.Sequential(nn.Conv2d(2, 3, 3), StochasticAdaptiveAvgPool2d(2), nn.Flatten())
    x = torch.randn(4, 2, 12, 12)
    gradients = []
    for run in (lambda: block(x), lambda: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(5)
        block.zero_grad()
        run().square().sum().backward()
        gradients.append(block[0].weight.grad.clone())
    assert torch.equal(*gradients)


def test_replicas_with_one_seed_draw_different_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, x = StochasticAdaptiveAvgPool2d(1), torch.randn(4, 2, 7, 7)
    outputs = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(functional, "_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        outputs.append(pool(x))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(("kind", "arguments", "shape"), POOLS)
def test_odd_inputs(kind: Any, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    pool = kind(**arguments, keep=0.5)
    x = torch.randn(shape)
    views = {
        "expanded": x[:1].expand(3, *shape[1:]),
        "sliced": torch.randn(shape[0] * 2, *shape[1:])[::2],
        "channel slice": torch.randn(shape[0], 2 * shape[1], *shape[2:])[:, ::2],
        "transposed": torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1),
        "flipped axes": torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2) if len(shape) == 4 else x,
        "empty batch": x[:0],
    }
    for name, view in views.items():
        view = view.detach().requires_grad_()
        torch.manual_seed(1)
        out = pool(view)
        out.sum().backward()
        torch.manual_seed(1)
        same = view.detach().contiguous().requires_grad_()
        expected = pool(same)
        expected.sum().backward()
        torch.testing.assert_close(out, expected, msg=name)
        torch.testing.assert_close(view.grad, same.grad, msg=name)
    torch.manual_seed(1)
    unbatched = pool(x[0])
    torch.manual_seed(1)
    torch.testing.assert_close(unbatched, pool(x[:1])[0])


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_one_pixel_maps(keep: float, memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 5, 1, 1).contiguous(memory_format=memory_format)
    for pool in (StochasticAdaptiveAvgPool2d(1, keep=keep), StochasticAvgPool2d(1, keep=keep), StochasticAvgPool2d(3, 2, 1, keep=keep)):
        torch.testing.assert_close(pool(x), plain(pool)(x))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("pool", [StochasticAdaptiveAvgPool2d(1), StochasticAvgPool2d(2), StochasticAdaptiveAvgPool2d(2)])
def test_cells_left_out_cannot_poison_the_output(pool: nn.Module, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 14, 14).contiguous(memory_format=memory_format).requires_grad_()
    torch.manual_seed(4)
    expected = pool(x)
    expected.sum().backward()
    assert x.grad is not None
    left_out = x.grad == 0
    for poison in (torch.inf, -torch.inf, torch.nan):
        torch.manual_seed(4)
        torch.testing.assert_close(pool(x.detach().masked_fill(left_out, poison)), expected)
    torch.manual_seed(4)
    poisoned = pool(x.detach().masked_fill(~left_out, torch.inf))
    assert bool((poisoned == torch.inf).all())
    x.grad = None
    torch.manual_seed(4)
    pool(x).backward(torch.full_like(expected, torch.inf))
    assert torch.equal(x.grad == 0, left_out)
    assert not bool(x.grad.isnan().any())


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, math.nan, True, "0.5", None])
def test_keep_outside_its_range(keep: Any) -> None:
    for make in (lambda: StochasticAdaptiveAvgPool2d(1, keep=keep), lambda: StochasticAvgPool1d(2, keep=keep)):
        with pytest.raises(ConfigError, match=r"keep must lie in \(0, 1\]"):
            make()


@pytest.mark.parametrize("scale", ["root", 0.0, -1.0, math.inf, math.nan, True, None])
def test_unknown_scales(scale: Any) -> None:
    with pytest.raises(ConfigError, match="unknown scale"):
        StochasticAvgPool2d(2, scale=scale)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("pool", "x", "words"),
    [
        (StochasticAvgPool2d(5), torch.randn(1, 2, 4, 9), "larger than the map"),
        (StochasticAvgPool1d(5), torch.randn(1, 2, 4), "larger than the map"),
        (StochasticAdaptiveAvgPool2d(1), torch.randn(1, 2, 0, 4), "larger than the map"),
        (StochasticAdaptiveAvgPool2d(1), torch.ones(1, 2, 4, 4, dtype=torch.int64), "floating point"),
        (StochasticAvgPool2d(2), torch.randn(4, 4), r"takes \(N, C, H, W\)"),
        (StochasticAvgPool1d(2), torch.randn(1, 2, 4, 4), r"takes \(N, C, L\)"),
        (StochasticAdaptiveAvgPool2d(1), torch.randn(1, 1, 2, 4, 4), r"takes \(N, C, H, W\)"),
    ],
)
def test_unfit_tensors(pool: nn.Module, x: Tensor, words: str, training: bool) -> None:
    with pytest.raises(DataError, match=words):
        pool.train(training)(x)


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (StochasticAvgPool2d(2, padding=2), "half the kernel"),
        (StochasticAvgPool2d((2, 2, 2)), "kernel_size"),
        (StochasticAvgPool2d(0), "kernel_size"),
        (StochasticAvgPool2d(2, divisor_override=0), "divisor_override"),
        (StochasticAdaptiveAvgPool2d(0), "output_size"),
    ],
)
def test_arguments_out_of_range(pool: nn.Module, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pool(torch.randn(1, 2, 8, 8))


def test_copies_pickles_and_prints() -> None:
    pool = StochasticAvgPool2d(3, 2, 1, keep=0.3, scale="none")
    x = torch.randn(2, 3, 9, 9)
    outputs = []
    for twin in (pool, copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        torch.manual_seed(2)
        outputs.append(twin(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert repr(pool) == "StochasticAvgPool2d(kernel_size=3, stride=2, padding=1, keep=0.3, scale='none')"
    assert pool.state_dict() == {}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.booleans(),
    st.booleans(),
)
def test_windows_are_those_of_torch(size: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include: bool) -> None:
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    if any(n + 2 * p < k for n, p, k in zip(size, padding, kernel, strict=True)):
        return
    windows = windows_of(PoolSpec(0, kernel, stride, padding, int(ceil_mode), int(include)), size, 1.0)
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    expected = F.avg_pool2d(x, kernel, stride, padding, ceil_mode, include)
    sums = [x[0, 0, w.top : w.top + w.height, w.left : w.left + w.width].sum() * w.weight for w in windows.all]
    torch.testing.assert_close(torch.stack(sums).view(windows.out_size), expected[0, 0])
