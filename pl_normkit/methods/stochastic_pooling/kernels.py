"""Triton kernels: one launch draws the subsets of `subset.py`, a bit for each cell of each window; one more pools, or spreads gradients.

Drawing inside the pooling kernels would save a launch, but there every thread repeats what its neighbours draw: see "What bounds the
kernels" in docs/stochastic_pooling.md. Forward loads kept cells only where a cell is a row of memory (channels-last); in contiguous
maps neighbouring cells share a memory sector, so it reads in order. Backward goes over the input's cells and asks each window that
holds a cell whether it kept it: every gradient is written once, without atomics. Sums run in float32, for float64 in float64.
"""

# Triton reads the signatures itself: constants in capitals by its convention, no types on the rest; it
# compiles what follows a branch on a constant unless that stands in `else`.
# ruff: noqa: N803, RET505
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
from __future__ import annotations

__all__: list[str] = []

import triton
import triton.language as tl

from pl_normkit.methods.stochastic_pooling.subset import GOLDEN, MIX_1, MIX_2, ROUND_SHIFT, ROUNDS

_GOLDEN = tl.constexpr(GOLDEN)
_MIX_1 = tl.constexpr(MIX_1)
_MIX_2 = tl.constexpr(MIX_2)
_ROUNDS = tl.constexpr(ROUNDS)
_ROUND_STEP = tl.constexpr(1 << ROUND_SHIFT)
FIELDS = 8
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _mix(word):
    word ^= word >> 16
    word *= _MIX_1
    word ^= word >> 15
    word *= _MIX_2
    return word ^ (word >> 16)


@triton.jit
def _key(seed_ptr, rank, sample, window):
    seed = tl.load(seed_ptr)
    key = _mix((seed & 0xFFFFFFFF).to(tl.uint32) + _GOLDEN)
    key = _mix(key ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    key = _mix((key ^ rank.to(tl.uint32)) + _GOLDEN)
    key = _mix((key ^ sample.to(tl.uint32)) + _GOLDEN)
    return _mix((key ^ window.to(tl.uint32)) + _GOLDEN)


@triton.jit
def _kept_bits(key, cells, kept, MOST: tl.constexpr):
    """Algorithm S: bit i says whether cell i is kept."""
    word = key
    missing = kept.to(tl.uint32)
    bits = key * 0
    for cell in tl.static_range(MOST):
        if cell % 4 == 0:
            word = _mix(key + ((cell // 4 + 1) * _GOLDEN & 0xFFFFFFFF))
        left = tl.maximum(cells - cell, 0).to(tl.uint32)
        taken = (tl.umulhi(word, left) < missing).to(tl.uint32)
        word *= left
        missing -= taken
        bits |= taken << cell
    return bits


@triton.jit
def _rotation(key, number, line, length):
    word = _mix(key + (line.to(tl.uint32) + number * _ROUND_STEP) * _GOLDEN)
    return (((word >> 16) * length.to(tl.uint32)) >> 16).to(tl.int32)


@triton.jit
def _unpermute_once(key, cell, rows, columns):
    row = cell // columns
    column = cell % columns
    for number in tl.static_range(_ROUNDS - 1, -1, -1):
        if number % 2 == 0:
            row -= _rotation(key, number, column, rows)
            row = tl.where(row < 0, row + rows, row)
        else:
            column -= _rotation(key, number, row, columns)
            column = tl.where(column < 0, column + columns, column)
    return row * columns + column


@triton.jit
def _place_of(key, cell, cells, rows, columns, WASTE: tl.constexpr):
    place = _unpermute_once(key, cell, rows, columns)
    for _ in range(WASTE):
        place = tl.where(place >= cells, _unpermute_once(key, place, rows, columns), place)
    return place


@triton.jit(do_not_specialize=["rank"])
def _draw_small(words_ptr, seed_ptr, table_ptr, rank, windows, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """One word for each window of a block: bit i says whether cell i is kept."""
    blocks = tl.cdiv(windows, BLOCK)
    sample = tl.program_id(0) // blocks
    window = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = window < windows
    field = table_ptr + window * _FIELDS
    tall, wide = tl.load(field + 2, mask=real, other=0), tl.load(field + 3, mask=real, other=0)
    kept = tl.load(field + 4, mask=real, other=0)
    bits = _kept_bits(_key(seed_ptr, rank, sample, window), tall * wide, kept, MOST)
    tl.store(words_ptr + sample.to(tl.int64) * windows + window, bits.to(tl.int32), mask=real)


@triton.jit(do_not_specialize=["rank"])
def _draw_large(words_ptr, seed_ptr, table_ptr, rank, windows, words, WASTE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of words, of which each window has `words`: bit i of word w says whether cell 32 w + i is kept."""
    count = windows * words
    blocks = tl.cdiv(count, BLOCK)
    sample = tl.program_id(0) // blocks
    number = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = number < count
    window = number // words
    field = table_ptr + window * _FIELDS
    tall, wide = tl.load(field + 2, mask=real, other=0), tl.load(field + 3, mask=real, other=0)
    kept = tl.load(field + 4, mask=real, other=0)[:, None]
    rows, columns = tl.load(field + 5, mask=real, other=1)[:, None], tl.load(field + 6, mask=real, other=1)[:, None]
    cells = (tall * wide)[:, None]
    key = _key(seed_ptr, rank, sample, window)[:, None]
    bit = tl.arange(0, 32)[None, :]
    cell = (number % words)[:, None] * 32 + bit
    inside = cell < cells
    chosen = inside & (_place_of(key, tl.where(inside, cell, 0), cells, rows, columns, WASTE) < kept)
    bits = tl.sum(chosen.to(tl.int32) << bit, axis=1)
    tl.store(words_ptr + sample.to(tl.int64) * count + number, bits, mask=real)


@triton.jit
def _aligned(channels, places, ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Both unchanged; Triton learns that ALIGNED divides the one that lies along memory, and may load and store as much at once."""
    if CHANNELS_LAST:
        return channels // ALIGNED * ALIGNED, places
    else:
        return channels, places // ALIGNED * ALIGNED


@triton.jit
def _of_places(values, CHANNELS_LAST: tl.constexpr):
    """Cells or windows along their axis of a tile. What lies next to each other in memory is a tile's last axis: Triton gives
    neighbouring threads of equal rights to that one.
    """
    if CHANNELS_LAST:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def _of_channels(values, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def _spots(place, channel, places, channels, CHANNELS_LAST: tl.constexpr):
    """Offsets in one sample of a map of `places` cells."""
    if CHANNELS_LAST:
        return place[:, None] * channels + channel[None, :]
    else:
        return channel[:, None] * places + place[None, :]


@triton.jit
def _is_kept(words_ptr, cell, mask):
    return ((tl.load(words_ptr + cell // 32, mask=mask, other=0) >> (cell % 32)) & 1) == 1


@triton.jit
def _pool_large(
    x_ptr, out_ptr, words_ptr, table_ptr, weight_ptr, channels, area, width, windows, words,
    CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One window and a block of channels, a block of cells at a time."""
    channels, area = _aligned(channels, area, ALIGNED, CHANNELS_LAST)
    blocks = tl.cdiv(channels, BLOCK_C)
    pair = tl.program_id(0) // blocks
    sample = pair // windows
    window = pair % windows
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = _of_channels(channel < channels, CHANNELS_LAST)
    field = table_ptr + window * _FIELDS
    top, left, tall, wide = tl.load(field), tl.load(field + 1), tl.load(field + 2), tl.load(field + 3)
    cells = area if WHOLE else tall * wide
    bits = words_ptr + pair.to(tl.int64) * words
    base = x_ptr + sample.to(tl.int64) * channels * area
    out = out_ptr + sample.to(tl.int64) * channels * windows + (window * channels if CHANNELS_LAST else window)
    weight = tl.load(weight_ptr + window)
    total = _of_places(tl.zeros([BLOCK_P], ACC), CHANNELS_LAST) + _of_channels(tl.zeros([BLOCK_C], ACC), CHANNELS_LAST)
    for first in range(0, cells, BLOCK_P):
        cell = first + tl.arange(0, BLOCK_P)
        inside = cell < cells
        chosen = _of_places(_is_kept(bits, cell, inside), CHANNELS_LAST)
        position = cell if WHOLE else (top + cell // wide) * width + left + cell % wide
        spot = _spots(position, channel, area, channels, CHANNELS_LAST)
        if WHOLE and not CHANNELS_LAST and ALIGNED > 1:  # several cells a load, kept or not
            value = tl.load(base + spot, mask=_of_places(inside, CHANNELS_LAST) & real, other=0)
            total += tl.where(chosen, value, 0).to(ACC)
        else:
            total += tl.load(base + spot, mask=chosen & real, other=0).to(ACC)
    mean = tl.sum(total, axis=0 if CHANNELS_LAST else 1) * weight
    tl.store(out + channel * (1 if CHANNELS_LAST else windows), mean.to(out_ptr.dtype.element_ty), mask=channel < channels)


@triton.jit
def _tap(base, i, j, bits, tall, wide, real, width, step, CHANNELS_LAST: tl.constexpr):
    """Cell (i, j) of each window, zero where it has none or did not keep it."""
    inside = (i < tall) & (j < wide)
    chosen = inside & (((bits >> tl.where(inside, i * wide + j, 0)) & 1) == 1)
    return tl.load(base + (i * width + j) * step, mask=_of_places(chosen, CHANNELS_LAST) & real, other=0)


@triton.jit
def _pool_small(
    x_ptr, out_ptr, words_ptr, table_ptr, weight_ptr, channels, area, width, windows,
    CHANNELS_LAST: tl.constexpr, TALLEST: tl.constexpr, WIDEST: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of small windows and of channels, cell by cell."""
    channels, windows = _aligned(channels, windows, ALIGNED, CHANNELS_LAST)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    w_blocks = tl.cdiv(windows, BLOCK_P)
    pair = tl.program_id(0) // c_blocks
    sample = pair // w_blocks
    window = (pair % w_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(0) % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = window < windows
    real = _of_channels(channel < channels, CHANNELS_LAST)
    field = table_ptr + window * _FIELDS
    top, left = tl.load(field, mask=within, other=0), tl.load(field + 1, mask=within, other=0)
    tall, wide = tl.load(field + 2, mask=within, other=0), tl.load(field + 3, mask=within, other=0)
    bits = tl.load(words_ptr + sample.to(tl.int64) * windows + window, mask=within, other=0)
    weight = tl.load(weight_ptr + window, mask=within, other=0)
    base = x_ptr + sample.to(tl.int64) * channels * area + _spots(top * width + left, channel, area, channels, CHANNELS_LAST)
    total = _of_places(tl.zeros([BLOCK_P], ACC), CHANNELS_LAST) + _of_channels(tl.zeros([BLOCK_C], ACC), CHANNELS_LAST)
    step = channels if CHANNELS_LAST else 1
    if CHANNELS_LAST and TALLEST * WIDEST <= 9:
        for tap in tl.static_range(TALLEST * WIDEST):
            total += _tap(base, tap // WIDEST, tap % WIDEST, bits, tall, wide, real, width, step, CHANNELS_LAST).to(ACC)
    else:  # unrolled, the addresses would take too many registers: of 25 cells, or of each element where those do not share loads
        for tap in range(TALLEST * WIDEST):
            total += _tap(base, tap // WIDEST, tap % WIDEST, bits, tall, wide, real, width, step, CHANNELS_LAST).to(ACC)
    mean = total * _of_places(weight, CHANNELS_LAST)
    spot = _spots(window, channel, windows, channels, CHANNELS_LAST)
    out = out_ptr + sample.to(tl.int64) * channels * windows
    tl.store(out + spot, mean.to(out_ptr.dtype.element_ty), mask=_of_places(within, CHANNELS_LAST) & real)


@triton.jit
def _spread(
    grad_ptr, out_ptr, words_ptr, table_ptr, weight_ptr, cover_ptr, channels, area, height, width, out_width, windows, words,
    CHANNELS_LAST: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr, OVER_V: tl.constexpr, OVER_H: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Backward: a block of cells and of channels, one after the other of the windows that hold a cell."""
    channels, area = _aligned(channels, area, ALIGNED, CHANNELS_LAST)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    p_blocks = tl.cdiv(area, BLOCK_P)
    pair = tl.program_id(0) // c_blocks
    sample = pair // p_blocks
    position = (pair % p_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(0) % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = position < area
    real = _of_channels(channel < channels, CHANNELS_LAST)
    bits = words_ptr + sample.to(tl.int64) * windows * words
    grad = grad_ptr + sample.to(tl.int64) * channels * windows
    row, column = position // width, position % width
    if SINGLE:
        top, left, tall, wide = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3)
        holds = within & (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
        chosen = _is_kept(bits, tl.where(holds, (row - top) * wide + column - left, 0), holds)
        value = tl.load(grad + channel, mask=channel < channels, other=0).to(ACC) * tl.load(weight_ptr)
        total = tl.where(_of_places(chosen, CHANNELS_LAST), _of_channels(value, CHANNELS_LAST), 0)
    else:
        total = _of_places(tl.zeros([BLOCK_P], ACC), CHANNELS_LAST) + _of_channels(tl.zeros([BLOCK_C], ACC), CHANNELS_LAST)
        first_v = tl.load(cover_ptr + 2 * row, mask=within, other=0)
        count_v = tl.load(cover_ptr + 2 * row + 1, mask=within, other=0)
        cover_h = cover_ptr + 2 * height
        first_h = tl.load(cover_h + 2 * column, mask=within, other=0)
        count_h = tl.load(cover_h + 2 * column + 1, mask=within, other=0)
        for over in range(OVER_V * OVER_H):
            v, h = over // OVER_H, over % OVER_H
            holds = (v < count_v) & (h < count_h)
            window = tl.where(holds, (first_v + v) * out_width + first_h + h, 0)
            field = table_ptr + window * _FIELDS
            top, left, wide = tl.load(field, mask=holds), tl.load(field + 1, mask=holds), tl.load(field + 3, mask=holds)
            cell = tl.where(holds, (row - top) * wide + column - left, 0)
            chosen = _of_places(_is_kept(bits + window * words, cell, holds), CHANNELS_LAST)
            spot = _spots(window, channel, windows, channels, CHANNELS_LAST)
            value = tl.load(grad + spot, mask=chosen & real, other=0).to(ACC)
            total += value * _of_places(tl.load(weight_ptr + window), CHANNELS_LAST)
    out = out_ptr + sample.to(tl.int64) * channels * area
    spot = _spots(position, channel, area, channels, CHANNELS_LAST)
    tl.store(out + spot, total.to(out_ptr.dtype.element_ty), mask=_of_places(within, CHANNELS_LAST) & real)
