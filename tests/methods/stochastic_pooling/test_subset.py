"""Subsets are exact in size, uniform, and independent between samples, windows, seeds and ranks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec, Windows, subset_size, windows_of
from pl_normkit.methods.stochastic_pooling.reference import selection
from pl_normkit.methods.stochastic_pooling.subset import mix, permute, window_keys

GLOBAL = PoolSpec(1, (1, 1))


def kept_cells(windows: Windows, samples: int, seed: int = 7, rank: int = 0) -> Tensor:
    """(samples, cells) of a global pool."""
    return selection(windows, torch.tensor(seed), rank, samples)[:, 0]


def excess(counts: Tensor, expected: float) -> float:
    """Pearson's statistic of counts over equally likely outcomes, in standard deviations above its mean."""
    freedom = counts.numel() - 1
    statistic = float(((counts - expected) ** 2).sum()) / expected
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(("cells", "keep"), [((2, 2), 0.5), ((2, 2), 0.25), ((3, 3), 0.5), ((2, 3), 0.7), ((1, 7), 0.4), ((3, 4), 0.3)])
def test_every_subset_of_a_small_window_is_equally_likely(cells: tuple[int, int], keep: float) -> None:
    samples = 60_000
    size = math.prod(cells)
    kept = kept_cells(windows_of(GLOBAL, cells, keep), samples)
    codes = (kept.long() << torch.arange(size)).sum(1)
    possible = [sum(1 << cell for cell in subset) for subset in itertools.combinations(range(size), subset_size(size, keep))]
    counts = torch.bincount(codes, minlength=1 << size)
    assert int(counts[possible].sum()) == samples
    assert abs(excess(counts[possible].double(), samples / len(possible))) < 4.0


@pytest.mark.parametrize(("cells", "keep"), [((7, 7), 0.0408), ((1, 37), 0.055), ((5, 9), 0.0445), ((1, 53), 0.038)])
def test_every_pair_of_a_large_window_is_equally_likely(cells: tuple[int, int], keep: float) -> None:
    samples = 100_000
    kept = kept_cells(windows_of(GLOBAL, cells, keep), samples)
    size = math.prod(cells)
    assert kept.sum(1).unique().tolist() == [2]
    pairs = (kept.float().T @ kept.float()).double()
    above = torch.triu_indices(size, size, 1)
    counts = pairs[above[0], above[1]]
    assert abs(excess(counts, samples / counts.numel())) < 4.0


@pytest.mark.parametrize("cells", [(7, 7), (14, 14), (1, 61)])
def test_half_of_a_large_window_shows_no_preferred_cell_or_pair(cells: tuple[int, int]) -> None:
    samples = 20_000
    windows = windows_of(GLOBAL, cells, 0.5)
    size, kept_size = windows.all[0].cells, windows.all[0].kept
    kept = kept_cells(windows, samples).double()
    share = kept_size / size
    single = (kept.mean(0) - share) / math.sqrt(share * (1 - share) / samples)
    assert float(single.abs().max()) < 5.0
    together = kept_size * (kept_size - 1) / (size * (size - 1))
    pairs = (kept.T @ kept / samples - together) / math.sqrt(together * (1 - together) / samples)
    off_diagonal = pairs[~torch.eye(size, dtype=torch.bool)]
    assert float(off_diagonal.abs().max()) < 5.5
    assert 0.9 < float(off_diagonal.std()) < 1.1


@pytest.mark.parametrize("cells", [(2, 2), (7, 7)])
def test_samples_windows_seeds_and_ranks_draw_independently(cells: tuple[int, int]) -> None:
    samples = 20_000
    windows = windows_of(GLOBAL, cells, 0.5)
    first = kept_cells(windows, samples)
    tiles = windows_of(PoolSpec(0, cells, cells), (cells[0], 2 * cells[1]), 0.5)
    left, right = (selection(tiles, torch.tensor(7), 0, samples)[:, i].view(samples, cells[0], 2, cells[1]) for i in (0, 1))
    others = {
        "next sample": first.roll(1, 0),
        "seed": kept_cells(windows, samples, seed=8),
        "high seed word": kept_cells(windows, samples, seed=7 + 2**40),
        "rank": kept_cells(windows, samples, rank=1),
    }
    pairs = {name: (first.double(), other.double()) for name, other in others.items()}
    pairs["window"] = (left[:, :, 0].flatten(1).double(), right[:, :, 1].flatten(1).double())
    for name, (one, other) in pairs.items():
        correlation = (one - one.mean(0)).T @ (other - other.mean(0)) / samples / (one.std(0)[:, None] * other.std(0))
        assert float(correlation.abs().max()) * math.sqrt(samples) < 5.0, name


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-6, 1.0), st.integers(0, 2**63 - 1))
def test_exactly_the_promised_number_is_kept(height: int, width: int, keep: float, seed: int) -> None:
    windows = windows_of(GLOBAL, (height, width), keep)
    expected = max(1, round(keep * height * width))
    assert [expected] * 3 == kept_cells(windows, 3, seed).sum(1).tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(33, 3000), st.integers(0, 2**63 - 1))
def test_a_window_is_permuted_onto_itself(cells: int, seed: int) -> None:
    window = windows_of(GLOBAL, (1, cells), 0.5).all[0]
    keys = window_keys(seed, 0, 2, np.zeros(1, np.uint32))
    permuted = permute(keys, window, np.arange(cells))
    assert (np.sort(permuted) == np.arange(cells)).all()
    assert permuted.shape == (2, 1, cells)


@pytest.mark.parametrize(("keep", "counts"), [(0.25, 12), (0.5, 24), (0.75, 37), (1e-6, 1), (0.999, 49), (1.0, 49)])
def test_subset_sizes_of_a_seven_by_seven_map(keep: float, counts: int) -> None:
    assert counts == subset_size(49, keep)


def test_mix_is_a_bijection_where_it_can_be_checked() -> None:
    words = np.arange(1 << 20, dtype=np.uint32)
    assert len(np.unique(mix(words))) == len(words)
    assert mix(words).dtype == np.uint32
