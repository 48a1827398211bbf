"""What the pooling kernels compile to, without a GPU: registers, spills, shared memory, widths, occupancy, instructions, bytes moved.

    python benchmarks/stochastic_pooling_kernels.py             # all cases and targets: benchmarks/results/stochastic_pooling_kernels.csv
    python benchmarks/stochastic_pooling_kernels.py --sample    # one candidate of the cases that need most registers, no file

The launches of a case are planned as on a GPU; Triton then compiles each candidate for each target as it would for these very arguments
(integers that are 1, or multiples of 16; aligned pointers), and the disassembler that Triton ships shows the result. Exits with 1 where
a kernel does not compile, spills, or takes more than 128 registers (256 of gfx942's 512, the count for two waves).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # Triton asks once, at its first import

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec, Windows, windows_of
from pl_normkit.methods.stochastic_pooling.launch import LIMIT, Launch, pooling, spreading

RESULTS = Path(__file__).parent / "results" / "stochastic_pooling_kernels.csv"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MOST_REGISTERS = {"gfx942": 256}
"""By target; 128 on the others."""
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
Row = dict[str, object]
COLUMNS = (
    *("target", "kernel", "way", "pool", "shape", "format", "dtype", "block", "warps", "registers", "spilled bytes", "shared bytes"),
    *("load bits", "store bits", "bytes per element", "least bytes per element", "occupancy", "instructions", "in loops"),
    *("issue us", "memory us"),
)


class Card(NamedTuple):
    """A target: multiprocessors, their clock, shared memory and warps; the memory's rate.

    The rates are what copies reach of the nominal rates 2.0, 4.8 (H200) and 8.0 TB/s: about nine tenths.
    """

    target: GPUTarget
    processors: int
    ghz: float
    bytes_per_second: float
    shared: int


CARDS = {
    "sm_80": Card(GPUTarget("cuda", 80, 32), 108, 1.41, 1.8e12, 164 * 1024),
    "sm_90": Card(GPUTarget("cuda", 90, 32), 132, 1.70, 4.3e12, 228 * 1024),
    "sm_100": Card(GPUTarget("cuda", 100, 32), 148, 1.85, 7.2e12, 228 * 1024),
}
AMD = GPUTarget("hip", "gfx942", 64)
SCHEDULERS, WARPS, REGISTERS = 4, 64, 65536


@dataclass(frozen=True)
class Case:
    """A pooling call."""

    name: str
    spec: PoolSpec
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    channels_last: bool

    @property
    def windows(self) -> Windows:
        return windows_of(self.spec, (self.shape[2], self.shape[3]), 0.5)

    def launches(self) -> Iterator[tuple[str, Launch]]:
        """(forward or backward, launch): each kernel once."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        x = torch.empty(self.shape, dtype=self.dtype, device="meta").contiguous(memory_format=memory_format)
        seed = torch.empty((), dtype=torch.int64, device="meta")
        out, forward = pooling(x, self.windows, seed, 0)
        _, backward = spreading(out, self.windows, seed, 0, self.channels_last)
        yield from (("forward", launch) for launch in forward)
        yield from (("backward", launch) for launch in backward[1:])


GLOBAL, BINS, BY_2, BY_3 = PoolSpec(1, (1, 1)), PoolSpec(1, (6, 6)), PoolSpec(0, (2, 2), (2, 2)), PoolSpec(0, (3, 3), (2, 2), (1, 1))
CALLS = [
    ("global", GLOBAL, (256, 2048, 7, 7)),
    ("global", GLOBAL, (256, 1024, 14, 14)),
    ("global", GLOBAL, (256, 256, 56, 56)),
    ("global", GLOBAL, (32, 250, 15, 20)),
    ("bins 6", BINS, (32, 512, 28, 28)),
    ("bins 6", BINS, (8, 2048, 61, 47)),
    ("2x2", BY_2, (256, 512, 28, 28)),
    ("2x2", BY_2, (256, 256, 14, 14)),
    ("3x3 stride 2", BY_3, (256, 256, 28, 28)),
    ("3x3 stride 2", BY_3, (64, 64, 112, 112)),
    ("3x3 stride 1", PoolSpec(0, (3, 3), (1, 1), (1, 1)), (64, 192, 35, 35)),
    ("5x5 stride 3", PoolSpec(0, (5, 5), (3, 3)), (64, 768, 17, 17)),
    ("7x7 stride 2", PoolSpec(0, (7, 7), (2, 2)), (8, 64, 56, 56)),
    ("2x2", BY_2, (1, 3, 5, 6)),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SAMPLE = {("7x7 stride 2", 56), ("global", 7), ("2x2", 28), ("3x3 stride 2", 28), ("3x3 stride 1", 35), ("bins 6", 28)}


HARDEST = ("3x3 stride 2", 28)


def cases() -> Iterator[Case]:
    for name, spec, shape in CALLS:
        for dtype in DTYPES:
            for channels_last in (True, False):
                yield Case(name, spec, shape, dtype, channels_last)


def in_sample(case: Case, target: str) -> bool:
    """For sm_90 a few pools in bfloat16; for every target the one that needs most registers, in float32."""
    place = (case.name, case.shape[2])
    return place == HARDEST if case.dtype == torch.float32 else case.dtype == torch.bfloat16 and target == "sm_90" and place in SAMPLE


def source_of(launch: Launch, candidate: dict[str, int]) -> ASTSource:
    """The launch's kernel, specialized as Triton's launcher does it."""
    names = launch.kernel.arg_names
    fixed = {**launch.constants, **{name: value for name, value in candidate.items() if name != "num_warps"}}
    unspecialized = {param.name for param in launch.kernel.params if param.do_not_specialize}
    signature, values, hints = {}, {}, {}
    for i, (name, value) in enumerate(zip(names, (*launch.arguments, *(fixed[name] for name in names if name in fixed)), strict=True)):
        if name in fixed or (isinstance(value, int) and value == 1 and name not in unspecialized):
            signature[name], values[(i,)] = "constexpr", fixed.get(name, value)
            continue
        signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or (value % 16 == 0 and name not in unspecialized):
            hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, values, hints)


class Code(NamedTuple):
    """A compiled kernel: instructions outside loops and inside, loads and stores of global memory by width in bits."""

    registers: int
    stack: int
    shared: int
    straight: int
    looped: int
    loads: Counter[int]
    stores: Counter[int]


_known: dict[tuple[str, int, GPUTarget], Code] = {}
"""What was compiled already: many cases share a kernel and what it is specialized for."""


def compiled(launch: Launch, candidate: dict[str, int], target: GPUTarget) -> Code:
    source = source_of(launch, candidate)
    key = (source.hash(), candidate["num_warps"], target)
    if key not in _known:
        _known[key] = _compiled(source, candidate["num_warps"], target)
    return _known[key]


def _compiled(source: ASTSource, warps: int, target: GPUTarget) -> Code:
    limit = LIMIT if target.backend == "cuda" else {}
    built = triton.compile(source, target=target, options={"num_warps": warps, **limit})
    if target.backend == "hip":
        return _amd(built.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = (_run("cuobjdump", option, file.name) for option in ("-res-usage", "-sass"))
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    straight, looped = _instructions(sass)
    loads, stores = (Counter(map(_width, re.findall(rf"\b{word}(\.[\w.]+)", sass))) for word in ("LDG", "STG"))
    return Code(found["REG"], found["STACK"], built.metadata.shared, straight, looped, loads, stores)


def _run(program: str, option: str, path: str) -> str:
    environment = {**os.environ, "PATH": f"{BINARIES}:{os.environ['PATH']}"}
    return subprocess.run([BINARIES / program, option, path], env=environment, capture_output=True, text=True, check=True).stdout


def _width(suffix: str) -> int:
    found = re.search(r"\.U?S?(128|64|16|8)\b", suffix)
    return int(found.group(1)) if found else 32


def _instructions(sass: str) -> tuple[int, int]:
    """Instructions outside and inside the code's loops (a jump back marks one), padding after the end left out."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", sass)
    inside: set[int] = set()
    end = 0
    for address, text in lines:
        here, jump = int(address, 16), re.search(r"\bBRA(?:\.\w+)?\s.*?0x([0-9a-f]+)", text)
        to = int(jump.group(1), 16) if jump else here
        if to < here:
            inside |= set(range(to, here + 1, 16))
        if "EXIT" in text:
            end = here
    addresses = [int(address, 16) for address, _ in lines if int(address, 16) <= end]
    return sum(address not in inside for address in addresses), sum(address in inside for address in addresses)


def _amd(text: str) -> Code:
    found = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|group_segment_fixed_size):\s+(\d+)", text)}
    words = {
        "dwordx4": 128,
        "dwordx2": 64,
        "dword": 32,
        "ushort": 16,
        "short": 16,
        "ubyte": 8,
        "byte": 8,
        "short_d16": 16,
        "short_d16_hi": 16,
    }
    loads, stores = (
        Counter(words.get(kind, 0) for kind in re.findall(rf"(?:global|buffer)_{word}_(\w+)", text)) for word in ("load", "store")
    )
    shared = found.get("group_segment_fixed_size", 0)
    return Code(found["vgpr_count"], 4 * found["vgpr_spill_count"], shared, 0, 0, loads, stores)


def occupancy(code: Code, warps: int, card: Card) -> float:
    """Share of the warps a multiprocessor can hold, by registers (given out 8 a thread) and shared memory (plus 1 KiB a program)."""
    by_registers = REGISTERS // (-(code.registers // -8) * 8 * 32) // warps
    by_shared = card.shared // (code.shared + 1024)
    return min(WARPS // warps, by_registers, by_shared, 32) * warps / WARPS


def traffic(case: Case, way: str, kernel: str) -> tuple[float, float]:
    """Bytes that the kernel moves and the least that any could, for each element of the map.

    Memory moves in sectors of 32 bytes: contiguous maps are read whole, channels-last maps only where a row is kept.
    """
    batch, channels, height, width = case.shape
    size, windows = case.dtype.itemsize, case.windows
    map_elements, out_elements = batch * channels * height * width, batch * channels * len(windows.all)
    kept = sum(window.kept for window in windows.all) / (height * width)
    words = batch * len(windows.all) * -(windows.largest // -32) * 4
    if kernel.startswith("_draw"):
        return words / map_elements, 0.0
    overlap = windows.overlap != (1, 1)
    touched = min(1.0, kept) if case.channels_last and not overlap else 1.0
    if way == "forward":
        ideal = min(1.0, kept) * map_elements * size + out_elements * size
        return (touched * map_elements * size + out_elements * size + words) / map_elements, ideal / map_elements
    moved = (map_elements + out_elements) * size
    return (moved + words) / map_elements, moved / map_elements


def issue_over_memory(case: Case, way: str, launch: Launch, candidate: dict[str, int], code: Code, card: Card) -> tuple[float, float]:
    """Microseconds to issue the launch's instructions on all schedulers, and to move its bytes."""
    name = launch.kernel.fn.__name__
    rounds = {
        "_pool_large": -(-case.windows.largest // candidate.get("BLOCK_P", 1)),
        "_pool_small": case.windows.largest,
        "_draw_large": launch.constants.get("WASTE", 1),
        "_spread": case.windows.overlap[0] * case.windows.overlap[1],
    }.get(name, 1)
    issued = (code.straight + code.looped * rounds) * candidate["num_warps"] * launch.programs(candidate)
    elements = case.shape[0] * case.shape[1] * case.shape[2] * case.shape[3]
    moved = traffic(case, way, name)[0] * elements
    return issued / (card.processors * SCHEDULERS * card.ghz * 1e9) * 1e6, moved / card.bytes_per_second * 1e6


def widths(counts: Counter[int]) -> str:
    return " ".join(f"{width}:{counts[width]}" for width in sorted(counts, reverse=True))


def row_of(case: Case, way: str, launch: Launch, candidate: dict[str, int], name: str) -> Row:
    card = CARDS.get(name)
    row: Row = {
        "target": name,
        "kernel": launch.kernel.fn.__name__,
        "way": way,
        "pool": case.name,
        "shape": "x".join(map(str, case.shape)),
        "format": "channels-last" if case.channels_last else "NCHW",
        "dtype": TYPES[case.dtype],
        "block": "x".join(str(value) for key, value in candidate.items() if key != "num_warps"),
        "warps": candidate["num_warps"],
    }
    code = compiled(launch, candidate, card.target if card else AMD)
    moved, least = traffic(case, way, launch.kernel.fn.__name__)
    row |= {"registers": code.registers, "spilled bytes": code.stack, "shared bytes": code.shared}
    row |= {"load bits": widths(code.loads), "store bits": widths(code.stores)}
    row |= {"bytes per element": round(moved, 3), "least bytes per element": round(least, 3)}
    if card:
        issue, memory = issue_over_memory(case, way, launch, candidate, code, card)
        row |= {"occupancy": occupancy(code, candidate["num_warps"], card), "instructions": code.straight, "in loops": code.looped}
        row |= {"issue us": round(issue, 2), "memory us": round(memory, 2)}
    return row


def table(sample: bool, targets: list[str], dtypes: list[str]) -> Iterator[Row]:
    for dtype, name, case in itertools.product(dtypes, targets, cases()):
        if TYPES[case.dtype] == dtype and (not sample or in_sample(case, name)):
            for way, launch in case.launches():
                for candidate in launch.candidates[:1] if sample else launch.candidates:
                    yield row_of(case, way, launch, candidate, name)


def faults(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["spilled bytes"] or int(str(row["registers"])) > MOST_REGISTERS.get(str(row["target"]), 128)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="a few cases, no file")
    parser.add_argument("--targets", nargs="+", help=f"of {', '.join(CARDS)}, gfx942")
    parser.add_argument("--dtypes", nargs="+", default=[TYPES[dtype] for dtype in DTYPES], help="of bf16, fp16, fp32, fp64")
    options = parser.parse_args()
    targets = options.targets or [*CARDS, *(() if options.sample else ("gfx942",))]
    found = []
    with Path(os.devnull if options.sample else RESULTS).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in table(options.sample, targets, options.dtypes):
            writer.writerow(row)
            file.flush()
            print(" | ".join(str(value) for value in row.values()), flush=True)
            found += faults([row])
    for row in found:
        print("FAULT", row)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
