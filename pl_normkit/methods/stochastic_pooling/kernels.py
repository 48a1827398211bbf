"""Triton kernels: one launch forward, one backward, the subsets of `subset.py` computed where they are needed and never stored.

Forward reads only kept cells where a cell is a row of memory (channels-last); in contiguous maps neighbouring cells share a memory
sector, so it reads in order under a mask. Backward goes over the input's cells and asks each window that holds a cell whether it kept
it: every gradient is written once, without atomics. Sums run in float32, for float64 in float64.
"""

# Triton reads the signatures itself: constants in capitals by its convention, no types on the rest.
# ruff: noqa: N803
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
def _permute_once(key, place, rows, columns):
    row = place // columns
    column = place % columns
    for number in tl.static_range(_ROUNDS):
        if number % 2 == 0:
            row += _rotation(key, number, column, rows)
            row = tl.where(row >= rows, row - rows, row)
        else:
            column += _rotation(key, number, row, columns)
            column = tl.where(column >= columns, column - columns, column)
    return row * columns + column


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
def _cell_at(key, place, cells, rows, columns, WASTE: tl.constexpr):
    cell = _permute_once(key, place, rows, columns)
    for _ in range(WASTE):
        cell = tl.where(cell >= cells, _permute_once(key, cell, rows, columns), cell)
    return cell


@triton.jit
def _place_of(key, cell, cells, rows, columns, WASTE: tl.constexpr):
    place = _unpermute_once(key, cell, rows, columns)
    for _ in range(WASTE):
        place = tl.where(place >= cells, _unpermute_once(key, place, rows, columns), place)
    return place


@triton.jit(do_not_specialize=["rank"])
def _pool_large(
    x_ptr, out_ptr, seed_ptr, table_ptr, weight_ptr, rank, channels, area, width, windows,
    CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr, WASTE: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One window and a block of channels: the kept cells in the order of the permutation, or all cells in order under a mask."""
    blocks = tl.cdiv(channels, BLOCK_C)
    pair = tl.program_id(0) // blocks
    sample = pair // windows
    window = pair % windows
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    field = table_ptr + window * _FIELDS
    top, left, tall, wide = tl.load(field), tl.load(field + 1), tl.load(field + 2), tl.load(field + 3)
    kept, rows, columns = tl.load(field + 4), tl.load(field + 5), tl.load(field + 6)
    cells = area if WHOLE else tall * wide
    key = _key(seed_ptr, rank, sample, window)
    base = x_ptr + sample.to(tl.int64) * channels * area
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for first in range(0, kept if CHANNELS_LAST else cells, BLOCK_P):
        place = first + tl.arange(0, BLOCK_P)
        if CHANNELS_LAST:
            cell = _cell_at(key, place, cells, rows, columns, WASTE)
            chosen = place < kept
        else:
            cell = place
            chosen = (place < cells) & (_place_of(key, place, cells, rows, columns, WASTE) < kept)
        position = cell if WHOLE else (top + cell // wide) * width + left + cell % wide
        if CHANNELS_LAST:
            spot = position[:, None] * channels + channel[None, :]
            total += tl.load(base + spot, mask=chosen[:, None] & (channel < channels)[None, :], other=0).to(ACC)
        else:
            spot = channel[None, :] * area + position[:, None]
            value = tl.load(base + spot, mask=(place < cells)[:, None] & (channel < channels)[None, :], other=0)
            total += tl.where(chosen[:, None], value, 0).to(ACC)
    mean = tl.sum(total, axis=0) * tl.load(weight_ptr + window)
    out = out_ptr + sample.to(tl.int64) * channels * windows
    spot = window * channels + channel if CHANNELS_LAST else channel * windows + window
    tl.store(out + spot, mean.to(out_ptr.dtype.element_ty), mask=channel < channels)


@triton.jit(do_not_specialize=["rank"])
def _pool_small(
    x_ptr, out_ptr, seed_ptr, table_ptr, weight_ptr, rank, channels, area, width, windows,
    CHANNELS_LAST: tl.constexpr, TALLEST: tl.constexpr, WIDEST: tl.constexpr, MOST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of small windows and of channels, cell by cell."""
    c_blocks = tl.cdiv(channels, BLOCK_C)
    w_blocks = tl.cdiv(windows, BLOCK_P)
    pair = tl.program_id(0) // c_blocks
    sample = pair // w_blocks
    window = (pair % w_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(0) % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = window < windows
    field = table_ptr + window * _FIELDS
    top, left = tl.load(field, mask=real, other=0), tl.load(field + 1, mask=real, other=0)
    tall, wide = tl.load(field + 2, mask=real, other=0), tl.load(field + 3, mask=real, other=0)
    kept = tl.load(field + 4, mask=real, other=0)
    bits = _kept_bits(_key(seed_ptr, rank, sample, window), tall * wide, kept, MOST)
    base = x_ptr + sample.to(tl.int64) * channels * area
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for i in tl.static_range(TALLEST):
        for j in tl.static_range(WIDEST):
            inside = (i < tall) & (j < wide)
            cell = tl.where(inside, i * wide + j, 0).to(tl.uint32)
            chosen = inside & (((bits >> cell) & 1) == 1)
            position = (top + i) * width + left + j
            if CHANNELS_LAST:
                spot = position[:, None] * channels + channel[None, :]
            else:
                spot = channel[None, :] * area + position[:, None]
            total += tl.load(base + spot, mask=chosen[:, None] & (channel < channels)[None, :], other=0).to(ACC)
    mean = total * tl.load(weight_ptr + window, mask=real, other=0)[:, None]
    out = out_ptr + sample.to(tl.int64) * channels * windows
    if CHANNELS_LAST:
        spot = window[:, None] * channels + channel[None, :]
    else:
        spot = channel[None, :] * windows + window[:, None]
    tl.store(out + spot, mean.to(out_ptr.dtype.element_ty), mask=real[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=["rank"])
def _spread(
    grad_ptr, out_ptr, seed_ptr, table_ptr, weight_ptr, cover_ptr, rank, channels, area, height, width, out_width, windows,
    CHANNELS_LAST: tl.constexpr, SINGLE: tl.constexpr, MOST: tl.constexpr, WASTE: tl.constexpr,
    OVER_V: tl.constexpr, OVER_H: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Backward: a block of cells and of channels; MOST is 0 where subsets come from the permutation."""
    c_blocks = tl.cdiv(channels, BLOCK_C)
    p_blocks = tl.cdiv(area, BLOCK_P)
    pair = tl.program_id(0) // c_blocks
    sample = pair // p_blocks
    position = (pair % p_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(0) % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = position < area
    row, column = position // width, position % width
    grad = grad_ptr + sample.to(tl.int64) * channels * windows
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    first_v = tl.load(cover_ptr + 2 * row, mask=real, other=0)
    count_v = tl.load(cover_ptr + 2 * row + 1, mask=real, other=0)
    cover_h = cover_ptr + 2 * height
    first_h = tl.load(cover_h + 2 * column, mask=real, other=0)
    count_h = tl.load(cover_h + 2 * column + 1, mask=real, other=0)
    for v in tl.static_range(OVER_V):
        for h in tl.static_range(OVER_H):
            holds = (v < count_v) & (h < count_h)
            if SINGLE:
                window = sample * 0
                field = table_ptr
                top, left = tl.load(field), tl.load(field + 1)
                tall, wide, kept = tl.load(field + 2), tl.load(field + 3), tl.load(field + 4)
                rows, columns = tl.load(field + 5), tl.load(field + 6)
            else:
                window = tl.where(holds, (first_v + v) * out_width + first_h + h, 0)
                field = table_ptr + window * _FIELDS
                top, left = tl.load(field), tl.load(field + 1)
                tall, wide, kept = tl.load(field + 2), tl.load(field + 3), tl.load(field + 4)
                rows, columns = tl.load(field + 5), tl.load(field + 6)
            key = _key(seed_ptr, rank, sample, window)
            cell = tl.where(holds, (row - top) * wide + column - left, 0)
            if MOST > 0:
                chosen = holds & (((_kept_bits(key, tall * wide, kept, MOST) >> cell.to(tl.uint32)) & 1) == 1)
            else:
                chosen = holds & (_place_of(key, cell, tall * wide, rows, columns, WASTE) < kept)
            if SINGLE:
                value = tl.load(grad + channel, mask=channel < channels, other=0).to(ACC) * tl.load(weight_ptr)
                total += tl.where(chosen[:, None], value[None, :], 0)
            else:
                if CHANNELS_LAST:
                    spot = window[:, None] * channels + channel[None, :]
                else:
                    spot = channel[None, :] * windows + window[:, None]
                value = tl.load(grad + spot, mask=chosen[:, None] & (channel < channels)[None, :], other=0).to(ACC)
                total += value * tl.load(weight_ptr + window)[:, None]
    out = out_ptr + sample.to(tl.int64) * channels * area
    if CHANNELS_LAST:
        spot = position[:, None] * channels + channel[None, :]
    else:
        spot = channel[None, :] * area + position[:, None]
    tl.store(out + spot, total.to(out_ptr.dtype.element_ty), mask=real[:, None] & (channel < channels)[None, :])
