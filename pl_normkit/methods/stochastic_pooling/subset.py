"""Random subsets of exactly n cells, computed from a seed: the definition that the kernels repeat bit for bit.

Windows of at most 32 cells are decided cell by cell (Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S). Larger ones
use a keyed permutation of their cells, of which the first n places are kept: cells stand in a grid of rows and columns, and each
round rotates every column (then every row) by its own pseudo-random amount, a Feistel network on two unequal alphabets. Where the
grid holds more places than the window, a place outside is permuted again until it falls inside (cycle walking); as the places
outside are few, that takes at most as many steps as there are.

In numpy: words of 32 bits wrap there by themselves, and a call on a few hundred of them costs a quarter of one of torch.
"""

from __future__ import annotations

__all__ = ["ROUNDS", "draw", "mix", "permute", "window_keys"]

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pl_normkit.methods.stochastic_pooling.geometry import Window, Windows

ROUNDS = 8
GOLDEN = 0x9E3779B9
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B
WORD = 0xFFFFFFFF
ROUND_SHIFT = 20
Words = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]
_16, _GOLDEN, _32, _WORD = np.uint32(16), np.uint32(GOLDEN), np.uint64(32), np.uint64(WORD)


def mix(word: Words) -> Words:
    """A bijection of 32-bit words that spreads every input bit (C. Wellons, hash prospector, "lowbias32")."""
    word = word ^ (word >> _16)
    word *= MIX_1
    word ^= word >> 15
    word *= MIX_2
    word ^= word >> 16
    return word


def _mix_number(word: int) -> int:
    word = ((word ^ (word >> 16)) * MIX_1) & WORD
    word = ((word ^ (word >> 15)) * MIX_2) & WORD
    return word ^ (word >> 16)


def window_keys(seed: int, rank: int, batch: int, windows: Words) -> Words:
    """One 32-bit key for each sample and window.

    Args:
        seed: 63-bit number, drawn from torch's generator once per call.
        rank: rank of this process, so that replicas seeded alike draw differently.
        batch: samples.
        windows: (K,) window numbers.

    Returns:
        (batch, K).
    """
    key = _mix_number((seed & WORD) + GOLDEN & WORD)
    key = _mix_number(key ^ ((seed >> 32) & WORD))
    key = _mix_number((key ^ rank) + GOLDEN & WORD)
    of_samples = mix((np.arange(batch, dtype=np.uint32) ^ np.uint32(key)) + _GOLDEN)
    return mix((of_samples[:, None] ^ windows) + _GOLDEN)


def draw(windows: Windows, numbers: tuple[int, ...], seed: int, rank: int, batch: int) -> Tensor:
    """Which cells are kept in some of the windows.

    Args:
        windows: the pooling call.
        numbers: K window numbers; of one shape unless `windows.is_small`.
        seed: 63-bit number.
        rank: rank of this process.
        batch: samples.

    Returns:
        (batch, K, most cells) bool, exactly `kept` of them true in each window; cells in row-major order.
    """
    which, left, kept_of = _sizes(windows, numbers)
    keys = window_keys(seed, rank, batch, which)
    if windows.is_small:
        return torch.from_numpy(_decide_in_turn(keys, left, kept_of))
    window = windows.all[numbers[0]]
    places = torch.from_numpy(permute(keys, window, np.arange(window.kept)))
    kept = torch.zeros((*keys.shape, window.cells), dtype=torch.bool)
    return kept.scatter_(2, places, True)


@lru_cache(maxsize=256)
def _sizes(windows: Windows, numbers: tuple[int, ...]) -> tuple[Words, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Of K windows their numbers; (most cells, K) how many cells are left when it is a cell's turn; and subset sizes."""
    some = [windows.all[number] for number in numbers]
    cells = np.array([window.cells for window in some])
    left = np.maximum(cells - np.arange(cells.max())[:, None], 0) if windows.is_small else np.empty((0, len(some)))
    return np.array(numbers, np.uint32), left.astype(np.uint64), np.array([window.kept for window in some], np.uint64)


def _decide_in_turn(keys: Words, left: npt.NDArray[np.uint64], kept_of: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Algorithm S; one word serves four decisions, its low part after each being as uniform as before (at least 12 bits remain)."""
    missing = np.repeat((kept_of << _32)[None], len(keys), axis=0)
    kept = np.empty((*keys.shape, len(left)), np.bool_)
    word = np.empty(keys.shape, np.uint64)
    for cell, left_now in enumerate(left):
        if cell % 4 == 0:
            word[...] = mix(keys + ((cell // 4 + 1) * GOLDEN & WORD))
        word *= left_now
        taken = np.less(word, missing, out=kept[..., cell])
        missing -= taken.astype(np.uint64) << _32
        word &= _WORD
    return kept


def permute(keys: Words, window: Window, places: Indices) -> Indices:
    """Cells at the given places of each window's permutation.

    Args:
        keys: (B, K) from `window_keys`.
        window: its grid and number of cells.
        places: (P,) in [0, cells).

    Returns:
        (B, K, P) in [0, cells), distinct for distinct places.
    """
    shifts = _shifts(keys, window)
    cells = _permute_once(shifts, window, np.broadcast_to(places, (*keys.shape, len(places))))
    for _ in range(window.waste):
        outside = cells >= window.cells
        if not outside.any():
            break
        cells = np.where(outside, _permute_once(shifts, window, cells), cells)
    return cells


@lru_cache(maxsize=256)
def _round_words(lines: int) -> Words:
    """(rounds, 1, 1, lines): what tells one line's rotation from another's, before the key."""
    rounds: Words = np.arange(ROUNDS, dtype=np.uint32)[:, None, None, None] << np.uint32(ROUND_SHIFT)
    of_lines: Words = np.arange(lines, dtype=np.uint32)
    words: Words = rounds + of_lines
    return words * _GOLDEN


def _shifts(keys: Words, window: Window) -> tuple[Indices, Indices]:
    """How far each column is rotated in the even rounds, and each row in the odd ones: (rounds / 2, B, K, repeated lines).

    Rows and columns are counted without wrapping while the rounds run, so the tables repeat themselves as often as an index
    can have wrapped.
    """
    half_words = mix(_round_words(max(window.rows, window.columns)) + keys[..., None]) >> 16
    wraps = (1, 1, 1, ROUNDS // 2 + 1)
    of_columns = half_words[::2, ..., : window.columns] * np.uint32(window.rows) >> 16
    of_rows = half_words[1::2, ..., : window.rows] * np.uint32(window.columns) >> 16
    return np.tile(of_columns, wraps).astype(np.int64), np.tile(of_rows, wraps).astype(np.int64)


def _permute_once(shifts: tuple[Indices, Indices], window: Window, places: Indices) -> Indices:
    row, column = places // window.columns, places % window.columns
    tables = np.arange(row.shape[0] * row.shape[1]).reshape(*row.shape[:2], 1)
    first_column, first_row = (tables * shift.shape[-1] for shift in shifts)
    index, moved = np.empty_like(row), np.empty_like(row)  # fresh memory in each round would cost more than the arithmetic
    for of_columns, of_rows in zip(*shifts, strict=True):
        row += of_columns.take(np.add(first_column, column, out=index), out=moved, mode="clip")
        column += of_rows.take(np.add(first_row, row, out=index), out=moved, mode="clip")
    row %= window.rows
    row *= window.columns
    row += np.remainder(column, window.columns, out=column)
    return row
