"""The Triton kernels against the eager definition: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pl_normkit.methods.stochastic_pooling import reference
from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec, windows_of

pytest.importorskip("triton")
from pl_normkit.methods.stochastic_pooling import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = (torch.contiguous_format, torch.channels_last)
CASES: list[tuple[PoolSpec, tuple[int, int], float]] = [
    (PoolSpec(1, (1, 1)), (7, 7), 0.5),
    (PoolSpec(1, (1, 1)), (5, 7), 0.999),
    (PoolSpec(1, (1, 1)), (1, 37), 0.3),
    (PoolSpec(1, (1, 1)), (1, 1), 0.5),
    (PoolSpec(1, (2, 1)), (13, 5), 0.3),
    (PoolSpec(1, (2, 2)), (4, 5), 0.5),
    (PoolSpec(0, (2, 2), (2, 2)), (5, 6), 0.5),
    (PoolSpec(0, (3, 3), (2, 2), (1, 1), ceil_mode=1), (6, 5), 0.3),
    (PoolSpec(0, (3, 2), (1, 3), (1, 0), count_include_pad=0), (5, 6), 1e-6),
    (PoolSpec(0, (6, 6), (5, 5), (1, 1)), (10, 6), 0.5),
]
# The interpreter cuts float32 to bfloat16 instead of rounding: one unit in the last place.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def both(
    spec: PoolSpec, size: tuple[int, int], keep: float, memory_format: Any, dtype: torch.dtype, channels: int = 3
) -> tuple[torch.Tensor, ...]:
    """Output and input gradient of the reference and of the kernels."""
    windows = windows_of(spec, size, keep)
    seed = torch.tensor(2**62 + 987654321987)
    x = torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=memory_format)
    channels_last = not x.is_contiguous()
    expected = reference.pool(x, windows, seed, 3)
    grad = torch.rand_like(expected) + 0.5  # no two gradients cancel
    expected_grad = reference.pool_backward(grad, windows, seed, 3, channels_last)
    actual = launch.pool(x.to(DEVICE), windows, seed.to(DEVICE), 3)
    actual_grad = launch.pool_backward(grad.to(DEVICE), windows, seed.to(DEVICE), 3, channels_last)
    return expected, actual.cpu(), expected_grad, actual_grad.cpu()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("spec", "size", "keep"), CASES)
def test_kernels_keep_the_very_same_cells(spec: PoolSpec, size: tuple[int, int], keep: float, memory_format: Any) -> None:
    expected, actual, expected_grad, actual_grad = both(spec, size, keep, memory_format, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCES[torch.float32])
    torch.testing.assert_close(actual_grad, expected_grad, rtol=0, atol=TOLERANCES[torch.float32])
    assert torch.equal(expected_grad != 0, actual_grad != 0)
    assert expected.stride() == actual.stride()
    assert expected_grad.stride() == actual_grad.stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [CASES[0], CASES[6]])
def test_kernels_in_other_dtypes(case: tuple[PoolSpec, tuple[int, int], float], dtype: torch.dtype, memory_format: Any) -> None:
    expected, actual, expected_grad, actual_grad = both(*case, memory_format, dtype, channels=5)
    for one, other in ((actual, expected), (actual_grad, expected_grad)):
        assert dtype == one.dtype
        torch.testing.assert_close(one, other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] / 8)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_values_left_out_are_never_used(memory_format: Any) -> None:
    windows, seed = windows_of(PoolSpec(1, (1, 1)), (7, 7), 0.5), torch.tensor(5)
    kept = reference.selection(windows, seed, 0, 2).view(2, 1, 7, 7).expand(2, 3, 7, 7)
    x = torch.randn(2, 3, 7, 7).masked_fill(~kept, torch.nan).contiguous(memory_format=memory_format)
    out = launch.pool(x.to(DEVICE), windows, seed.to(DEVICE), 0).cpu()
    torch.testing.assert_close(out, reference.pool(x, windows, seed, 0))
    assert bool(out.isfinite().all())


def test_empty_batches_launch_nothing() -> None:
    windows, seed = windows_of(PoolSpec(1, (1, 1)), (7, 7), 0.5), torch.tensor(5, device=DEVICE)
    assert launch.pool(torch.empty(0, 3, 7, 7, device=DEVICE), windows, seed, 0).shape == (0, 3, 1, 1)
    assert launch.pool_backward(torch.empty(0, 3, 1, 1, device=DEVICE), windows, seed, 0, False).shape == (0, 3, 7, 7)


@pytest.mark.parametrize("channels_last", [True, False])
def test_block_sizes_fit_the_channels_and_hold_a_memory_sector(channels_last: bool) -> None:
    for places, channels, repeats, itemsize in [(49, 512, 32, 2), (3136, 256, 8, 4), (1, 1, 1, 2), (16384, 2048, 256, 2), (33, 3, 2, 8)]:
        for p, c, warps in launch.block_sizes(places, channels, repeats, itemsize, channels_last):
            assert (p & (p - 1), c & (c - 1)) == (0, 0)
            assert p * c <= 32 * 32 * warps
            assert not channels_last or c >= min(channels, launch.SECTOR_BYTES // itemsize)


@pytest.mark.gpu
def test_on_a_gpu_the_modules_repeat_the_cpu_definition_and_graphs_draw_anew() -> None:
    from pl_normkit.nn import StochasticAdaptiveAvgPool2d

    pool = StochasticAdaptiveAvgPool2d(1)
    x = torch.randn(8, 64, 28, 28, device="cuda", requires_grad=True)
    torch.manual_seed(1)
    first = pool(x)
    torch.manual_seed(1)
    assert torch.equal(first, pool(x))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            pool(x).sum().backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pool(x.detach())
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(out.clone())
    assert not torch.equal(replays[0], replays[1])
    assert not torch.equal(replays[1], replays[2])


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("spec", "size"), [(PoolSpec(1, (1, 1)), (56, 56)), (PoolSpec(1, (6, 6)), (61, 47)), (PoolSpec(0, (2, 2), (2, 2)), (57, 56))]
)
def test_large_maps_on_a_gpu(spec: PoolSpec, size: tuple[int, int], dtype: torch.dtype, memory_format: Any) -> None:
    expected, actual, expected_grad, actual_grad = both(spec, size, 0.5, memory_format, dtype, channels=130)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    torch.testing.assert_close(actual_grad, expected_grad, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert torch.equal(expected_grad != 0, actual_grad != 0)
