"""Contiguous sliding windows with wide loads: two other forms of `_pool_small`, compiled for sm_90 beside the one in use.

    python benchmarks/stochastic_pooling_wide.py     writes benchmarks/results/stochastic_pooling_wide.csv

`pairs` loads two neighbouring cells of each window of stride 2, so as many cells at once as the map's width allows, and takes them apart
in registers. `constant width` is the form in use with the width known at compile time and every cell unrolled, so that addresses are
immediate offsets: a compilation for every width of a map.
Instructions are counted as in stochastic_pooling_kernels.py; nothing is measured.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch
import triton
import triton.language as tl
from stochastic_pooling_kernels import BY_2, BY_3, CARDS, Case, Code, compiled, widths

from pl_normkit.methods.stochastic_pooling.kernels import _FIELDS
from pl_normkit.methods.stochastic_pooling.launch import Launch

# ruff: noqa: N803
RESULTS = Path(__file__).parent / "results" / "stochastic_pooling_wide.csv"
CASES = [
    ("2x2", BY_2, (256, 512, 28, 28)),
    ("2x2", BY_2, (256, 256, 56, 56)),
    ("2x2", BY_2, (256, 256, 14, 14)),
    ("3x3 stride 2", BY_3, (256, 256, 28, 28)),
    ("3x3 stride 2", BY_3, (64, 64, 112, 112)),
]


@triton.jit
def _kept(bits, cell, inside):
    return inside & (((bits >> tl.where(inside, cell, 0)) & 1) == 1)


@triton.jit
def _pairs(
    x_ptr, out_ptr, words_ptr, table_ptr, weight_ptr, channels, area, width, windows,
    TALLEST: tl.constexpr, WIDEST: tl.constexpr, ALIGNED: tl.constexpr, RUN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    windows = windows // ALIGNED * ALIGNED
    c_blocks, w_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(windows, BLOCK_P)
    pair = tl.program_id(0) // c_blocks
    sample = pair // w_blocks
    first = (pair % w_blocks) * BLOCK_P
    window = first + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(0) % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    real, within = (channel < channels)[:, None], window < windows
    field = table_ptr + window * _FIELDS
    top, left = tl.load(field, mask=within, other=0), tl.load(field + 1, mask=within, other=0)
    tall, wide = tl.load(field + 2, mask=within, other=0), tl.load(field + 3, mask=within, other=0)
    bits = tl.load(words_ptr + sample.to(tl.int64) * windows + window, mask=within, other=0)
    weight = tl.load(weight_ptr + window, mask=within, other=0)
    base = x_ptr + sample.to(tl.int64) * channels * area
    cell = tl.arange(0, 2 * BLOCK_P)
    of_cell = first + cell // 2
    is_there = of_cell < windows
    cell_field = table_ptr + of_cell * _FIELDS
    cell_left = tl.load(cell_field + 1, mask=is_there, other=0)
    spot = tl.load(cell_field, mask=is_there, other=0) * width + cell_left + cell_left % 2 + cell % 2
    cell_tall = tl.load(cell_field + 2, mask=is_there, other=0)
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    odd = left % 2
    for i in range(TALLEST):
        at = tl.max_contiguous(tl.multiple_of(spot + i * width, [RUN]), [RUN])
        mask = tl.max_constancy(is_there & (i < cell_tall), [RUN])
        value = tl.load(base + channel[:, None] * area + at[None, :], mask=mask[None, :] & real, other=0)
        even_value, odd_value = tl.split(tl.reshape(value, [BLOCK_C, BLOCK_P, 2]))
        inside = i < tall
        total += tl.where(_kept(bits, i * wide + odd, inside)[None, :], even_value, 0).to(ACC)
        total += tl.where(_kept(bits, i * wide + odd + 1, inside)[None, :], odd_value, 0).to(ACC)
        if WIDEST == 3:
            chosen = _kept(bits, i * wide, inside & (odd == 1))
            spots = channel[:, None] * area + ((top + i) * width + left)[None, :]
            total += tl.load(base + spots, mask=chosen[None, :] & real, other=0).to(ACC)
    out = out_ptr + sample.to(tl.int64) * channels * windows
    mean = (total * weight[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out + channel[:, None] * windows + window[None, :], mean, mask=within[None, :] & real)


@triton.jit
def _constant_width(
    x_ptr, out_ptr, words_ptr, table_ptr, weight_ptr, channels, area, windows,
    WIDTH: tl.constexpr, TALLEST: tl.constexpr, WIDEST: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    windows = windows // ALIGNED * ALIGNED
    c_blocks, w_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(windows, BLOCK_P)
    pair = tl.program_id(0) // c_blocks
    sample = pair // w_blocks
    window = (pair % w_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(0) % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    real, within = (channel < channels)[:, None], window < windows
    field = table_ptr + window * _FIELDS
    top, left = tl.load(field, mask=within, other=0), tl.load(field + 1, mask=within, other=0)
    tall, wide = tl.load(field + 2, mask=within, other=0), tl.load(field + 3, mask=within, other=0)
    bits = tl.load(words_ptr + sample.to(tl.int64) * windows + window, mask=within, other=0)
    weight = tl.load(weight_ptr + window, mask=within, other=0)
    spots = x_ptr + sample.to(tl.int64) * channels * area + (channel[:, None] * area + (top * WIDTH + left)[None, :])
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for tap in tl.static_range(TALLEST * WIDEST):
        chosen = _kept(bits, tap // WIDEST * wide + tap % WIDEST, (tap // WIDEST < tall) & (tap % WIDEST < wide))
        total += tl.load(spots + (tap // WIDEST * WIDTH + tap % WIDEST), mask=chosen[None, :] & real, other=0).to(ACC)
    out = out_ptr + sample.to(tl.int64) * channels * windows
    mean = (total * weight[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out + channel[:, None] * windows + window[None, :], mean, mask=within[None, :] & real)


def forms(case: Case) -> dict[str, tuple[Launch, int]]:
    """By name: the launch, and how often its loop runs."""
    *_, used = (launch for way, launch in case.launches() if way == "forward")
    constants = {key: value for key, value in used.constants.items() if key != "CHANNELS_LAST"}
    pairs = used._replace(kernel=_pairs, constants=constants | {"RUN": math.gcd(case.shape[3], 8)})
    arguments = (*used.arguments[:7], used.arguments[8])
    constant = used._replace(kernel=_constant_width, constants=constants | {"WIDTH": case.shape[3]}, arguments=arguments)
    return {"in use": (used, case.windows.largest), "pairs": (pairs, case.spec.size[0]), "constant width": (constant, 1)}


def issue(code: Code, rounds: int, launch: Launch, candidate: dict[str, int]) -> float:
    card = CARDS["sm_90"]
    instructions = (code.straight + code.looped * rounds) * candidate["num_warps"] * launch.programs(candidate)
    return instructions / (card.processors * 4 * card.ghz * 1e9) * 1e6


def main() -> None:
    rows = []
    for name, spec, shape in CASES:
        case = Case(name, spec, shape, torch.bfloat16, False)
        memory = 2 * math.prod(shape) * (1 + len(case.windows.all) / (shape[2] * shape[3])) / CARDS["sm_90"].bytes_per_second * 1e6
        for form, (launch, rounds) in forms(case).items():
            candidate = launch.candidates[0]
            code = compiled(launch, candidate, CARDS["sm_90"].target)
            row = {"pool": name, "shape": "x".join(map(str, shape)), "form": form, "registers": code.registers, "spilled bytes": code.stack}
            row |= {"load bits": widths(code.loads), "issue us": round(issue(code, rounds, launch, candidate), 1)}
            rows.append(row | {"memory us": round(memory, 1)})
            print(rows[-1], flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
