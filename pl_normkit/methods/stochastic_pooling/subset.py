"""Random subsets of exactly n cells, computed from a seed: the definition that the kernels repeat bit for bit.

Windows of at most 32 cells are decided cell by cell (Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S). Larger ones
use a keyed permutation of their cells, of which the first n places are kept: cells stand in a grid of rows and columns, and each
round rotates every column (then every row) by its own pseudo-random amount, a Feistel network on two unequal alphabets. Where the
grid holds more places than the window, a place outside is permuted again until it falls inside (cycle walking); as the places
outside are few, that takes at most as many steps as there are.
"""

from __future__ import annotations

__all__ = ["ROUNDS", "draw", "mix", "permute", "window_keys"]

import torch
from torch import Tensor

from pl_normkit.methods.stochastic_pooling.geometry import Window, Windows

ROUNDS = 8
GOLDEN = 0x9E3779B9
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B
WORD = 0xFFFFFFFF
ROUND_SHIFT = 20


def mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every input bit (C. Wellons, hash prospector, "lowbias32").

    Args:
        word: int64 tensor holding values in [0, 2**32).
    """
    word = word ^ (word >> 16)
    word = (word * MIX_1) & WORD
    word = word ^ (word >> 15)
    word = (word * MIX_2) & WORD
    return word ^ (word >> 16)


def window_keys(seed: Tensor, rank: int, batch: int, windows: Tensor) -> Tensor:
    """One 32-bit key for each sample and window.

    Args:
        seed: int64 scalar, drawn from torch's generator once per call.
        rank: rank of this process, so that replicas seeded alike draw differently.
        batch: samples.
        windows: (K,) window numbers.

    Returns:
        (batch, K) int64.
    """
    key = mix(((seed & WORD) + GOLDEN) & WORD)
    key = mix(key ^ ((seed >> 32) & WORD))
    key = mix((key ^ rank) + GOLDEN & WORD)
    key = mix((key ^ torch.arange(batch, device=seed.device)) + GOLDEN & WORD)
    return mix((key[:, None] ^ windows) + GOLDEN & WORD)


def draw(windows: Windows, numbers: tuple[int, ...], seed: Tensor, rank: int, batch: int) -> Tensor:
    """Which cells are kept in windows that all have the shape of the first.

    Args:
        windows: the pooling call.
        numbers: K window numbers.
        seed: int64 scalar.
        rank: rank of this process.
        batch: samples.

    Returns:
        (batch, K, cells) bool, exactly `kept` of them true in each window; cells in row-major order.
    """
    window = windows.all[numbers[0]]
    keys = window_keys(seed, rank, batch, torch.tensor(numbers, device=seed.device))
    if windows.is_small:
        return _decide_in_turn(keys, window.cells, window.kept)
    places = permute(keys, window, torch.arange(window.kept, device=seed.device))
    kept = torch.zeros((*keys.shape, window.cells), dtype=torch.bool, device=seed.device)
    return kept.scatter_(2, places, True)


def _decide_in_turn(keys: Tensor, cells: int, kept: int) -> Tensor:
    """Algorithm S; one word serves four decisions, its low part after each being as uniform as before (at least 12 bits remain)."""
    missing = torch.full_like(keys, kept)
    decisions = []
    word = keys
    for cell in range(cells):
        if cell % 4 == 0:
            word = mix(keys + (cell // 4 + 1) * GOLDEN & WORD)
        product = word * (cells - cell)
        taken = (product >> 32) < missing
        word = product & WORD
        missing = missing - taken.long()
        decisions.append(taken)
    return torch.stack(decisions, dim=-1)


def permute(keys: Tensor, window: Window, places: Tensor) -> Tensor:
    """Cells at the given places of each window's permutation.

    Args:
        keys: (B, K) from `window_keys`.
        window: its grid and number of cells.
        places: (P,) in [0, cells).

    Returns:
        (B, K, P) int64 in [0, cells), distinct for distinct places.
    """
    shifts = _shifts(keys, window)
    cells = _permute_once(shifts, window, places.expand(*keys.shape, -1))
    for _ in range(window.waste):
        cells = torch.where(cells >= window.cells, _permute_once(shifts, window, cells), cells)
    return cells


def _shifts(keys: Tensor, window: Window) -> list[Tensor]:
    """Per round how far each column (even rounds) or row (odd rounds) is rotated: (B, K, columns or rows)."""
    shifts = []
    for number in range(ROUNDS):
        lines, length = (window.columns, window.rows) if number % 2 == 0 else (window.rows, window.columns)
        line = torch.arange(lines, device=keys.device) + (number << ROUND_SHIFT)
        word = mix(keys[..., None] + line * GOLDEN & WORD)
        shifts.append((word >> 16) * length >> 16)
    return shifts


def _permute_once(shifts: list[Tensor], window: Window, places: Tensor) -> Tensor:
    row, column = places // window.columns, places % window.columns
    for number, shift in enumerate(shifts):
        if number % 2 == 0:
            row = (row + shift.gather(2, column)) % window.rows
        else:
            column = (column + shift.gather(2, row)) % window.columns
    return row * window.columns + column
