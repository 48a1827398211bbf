"""Random subsets of exactly n cells, computed from a seed: the definition that the kernels repeat bit for bit.

Windows of at most 32 cells are decided cell by cell (Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S). Larger ones
use a keyed permutation of their cells, of which the first n places are kept: cells stand in a grid of rows and columns, and each
round rotates every column (then every row) by its own pseudo-random amount, a Feistel network on two unequal alphabets. Where the
grid holds more places than the window, a place outside is permuted again until it falls inside (cycle walking); as the places
outside are few, that takes at most as many steps as there are.
"""

from __future__ import annotations

__all__ = ["ROUNDS", "draw", "mix", "permute", "window_keys"]

from functools import lru_cache

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
    word = (word >> 16).bitwise_xor_(word).mul_(MIX_1).bitwise_and_(WORD)
    word = (word >> 15).bitwise_xor_(word).mul_(MIX_2).bitwise_and_(WORD)
    return (word >> 16).bitwise_xor_(word)


def _mix_number(word: int) -> int:
    word = ((word ^ (word >> 16)) * MIX_1) & WORD
    word = ((word ^ (word >> 15)) * MIX_2) & WORD
    return word ^ (word >> 16)


def window_keys(seed: int, rank: int, batch: int, windows: Tensor) -> Tensor:
    """One 32-bit key for each sample and window.

    Args:
        seed: 63-bit number, drawn from torch's generator once per call.
        rank: rank of this process, so that replicas seeded alike draw differently.
        batch: samples.
        windows: (K,) window numbers.

    Returns:
        (batch, K) int64.
    """
    key = _mix_number((seed & WORD) + GOLDEN & WORD)
    key = _mix_number(key ^ ((seed >> 32) & WORD))
    key = _mix_number((key ^ rank) + GOLDEN & WORD)
    samples = torch.arange(batch, device=windows.device)
    of_samples = mix((samples ^ key).add_(GOLDEN).bitwise_and_(WORD))
    return mix((of_samples[:, None] ^ windows).add_(GOLDEN).bitwise_and_(WORD))


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
    which, _, kept_of = _sizes(windows, numbers)
    keys = window_keys(seed, rank, batch, which)
    if windows.is_small:
        return _decide_in_turn(keys, _left(windows, numbers), kept_of)
    window = windows.all[numbers[0]]
    places = permute(keys, window, torch.arange(window.kept))
    kept = torch.zeros((*keys.shape, window.cells), dtype=torch.bool)
    return kept.scatter_(2, places, True)


@lru_cache(maxsize=256)
def _sizes(windows: Windows, numbers: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, cells and subset sizes of some windows."""
    some = [windows.all[number] for number in numbers]
    return torch.tensor(numbers), torch.tensor([window.cells for window in some]), torch.tensor([window.kept for window in some])


@lru_cache(maxsize=256)
def _left(windows: Windows, numbers: tuple[int, ...]) -> Tensor:
    """(most cells, K): how many cells of a window are left when it is a cell's turn."""
    _, cells, _ = _sizes(windows, numbers)
    return (cells - torch.arange(int(cells.max()))[:, None]).clamp_min_(0)


def _decide_in_turn(keys: Tensor, left: Tensor, kept_of: Tensor) -> Tensor:
    """Algorithm S; one word serves four decisions, its low part after each being as uniform as before (at least 12 bits remain)."""
    missing = (kept_of << 32).repeat(len(keys), 1)
    kept = torch.empty((*keys.shape, len(left)), dtype=torch.bool)
    word = keys
    for cell, left_now in enumerate(left.unbind()):
        if cell % 4 == 0:
            word = mix((keys + (cell // 4 + 1) * GOLDEN).bitwise_and_(WORD))
        product = word * left_now
        taken = torch.lt(product, missing, out=kept[..., cell])
        missing.add_(taken, alpha=-(1 << 32))
        word = product.bitwise_and_(WORD)
    return kept


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


@lru_cache(maxsize=256)
def _round_words(lines: int) -> Tensor:
    """(rounds, lines): what tells one line's rotation from another's, before the key."""
    return ((torch.arange(ROUNDS)[:, None] << ROUND_SHIFT) + torch.arange(lines)) * GOLDEN


def _shifts(keys: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """How far each column is rotated in the even rounds, and each row in the odd ones: (B, K, rounds / 2, repeated lines).

    Rows and columns are counted without wrapping while the rounds run, so the tables repeat themselves as often as an index
    can have wrapped.
    """
    words = _round_words(max(window.rows, window.columns))
    half_words = mix((words + keys[..., None, None]).bitwise_and_(WORD)) >> 16
    wraps = (1, 1, 1, ROUNDS // 2 + 1)
    of_columns = (half_words[..., ::2, : window.columns] * window.rows).bitwise_right_shift_(16).repeat(wraps)
    of_rows = (half_words[..., 1::2, : window.rows] * window.columns).bitwise_right_shift_(16).repeat(wraps)
    return of_columns, of_rows


def _permute_once(shifts: tuple[Tensor, Tensor], window: Window, places: Tensor) -> Tensor:
    row, column = places // window.columns, places % window.columns
    for of_columns, of_rows in zip(shifts[0].unbind(2), shifts[1].unbind(2), strict=True):
        row += of_columns.gather(2, column)
        column += of_rows.gather(2, row)
    return row.remainder_(window.rows).mul_(window.columns).add_(column.remainder_(window.columns))
