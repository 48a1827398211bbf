"""Everything that needs a GPU, in under 8 minutes: writes benchmarks/results/gpu.csv, a row for each figure, with the card's name.

    make gpu                                                        # on a machine with a CUDA device, torch >= 2.9 and Triton
    python benchmarks/gpu.py --rehearse --out FILE                  # the same code on the CPU with tiny shapes; its figures mean nothing

Sections run in order of weight, each until its share of the time is used up; what was not reached is a row that says so. A section
whose library is missing, or that fails, is a row too, the others go on, and the exit status is 1. Times on the device are medians of paired
rounds; goals: a channels-last forward pass of at most 0.65 of torch's pooling, at 85 % of the rate of a large copy.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
ROOT = Path(__file__).parents[1]
MINUTES = 7.5
NEEDED_BYTES = 12 * 2**30
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
SCOPES = ("global", "2x2", "3x3 stride 2")
SHAPES = [(32, 2048, 7, 7), (256, 2048, 7, 7), (256, 1024, 14, 14), (256, 512, 28, 28), (64, 256, 56, 56), (64, 64, 112, 112)]
TINY = [(2, 8, 7, 7), (2, 3, 6, 5)]


class NotReachedError(Exception):
    """The section's time is used up."""


@dataclass
class Bench:
    """Where the figures are taken and where they go."""

    device: str
    out: Path
    end: float
    rounds: int
    section: str = ""
    section_end: float = 0.0
    rows: list[dict[str, object]] = field(default_factory=list)

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def add(self, case: str, quantity: str, value: object, unit: str = "") -> None:
        shown = f"{value:.5g}" if isinstance(value, float) else value
        card = torch.cuda.get_device_name() if not self.rehearsal else "rehearsal on the CPU"
        row = {"section": self.section, "case": case, "quantity": quantity, "value": shown, "unit": unit, "card": card}
        self.rows.append(row | {"torch": torch.__version__})
        print(" | ".join(str(cell) for cell in row.values()), flush=True)
        if time.monotonic() > self.section_end:
            raise NotReachedError

    def check(self, case: str, held: bool) -> None:
        self.add(case, "held", bool(held))
        if not held:
            raise AssertionError(case)

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0].keys())
            writer.writeheader()
            writer.writerows(self.rows)

    def synchronize(self) -> None:
        if not self.rehearsal:
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], object], repeats: int = 10) -> float:
        """Time of one of several calls in a row, on the device's clock."""
        if self.rehearsal:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    def paired(self, steps: list[Callable[[], object]]) -> list[list[float]]:
        """Times of each step, all in turn in every round, after two rounds of warm-up."""
        times = [[self.seconds(step) for step in steps] for _ in range(self.rounds + 2)][2:]
        return [list(column) for column in zip(*times, strict=True)]

    def captured(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A CUDA graph of `step` and where its result lies."""
        if self.rehearsal:
            result = step()

            def repeat() -> None:
                result.copy_(step())

            return repeat, result
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        return graph.replay, result


def ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def missing(device: str) -> Iterator[str]:
    """What stands in the way of a run."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        yield f"torch {torch.__version__} is older than 2.9"
    try:
        import triton  # noqa: F401
    except ImportError:
        yield "Triton is not installed"
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        yield "torch sees no CUDA device"
        return
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED_BYTES:
        yield f"{free / 2**30:.1f} GiB of the device's memory are free, {NEEDED_BYTES / 2**30:.0f} are needed"
    if torch.cuda.get_device_capability() < (8, 0):
        yield f"{torch.cuda.get_device_name()} has no bfloat16"
    try:
        torch.randn(8, device="cuda").sum().item()
    except RuntimeError as error:
        yield f"the device does not compute: {error}"


def pool_of(scope: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Our pool and torch's."""
    from pl_normkit.nn import StochasticAdaptiveAvgPool2d, StochasticAvgPool2d

    if scope == "global":
        return StochasticAdaptiveAvgPool2d(1, keep=0.5), lambda x: F.adaptive_avg_pool2d(x, 1)
    kernel, stride, padding = (2, 2, 0) if scope == "2x2" else (3, 2, 1)
    return StochasticAvgPool2d(kernel, stride, padding, keep=0.5), lambda x: F.avg_pool2d(x, kernel, stride, padding)


def naive(x: Tensor) -> Tensor:
    """Global pooling over a random half, written with rand, argsort and gather."""
    flat = x.flatten(2)
    chosen = torch.rand(x.shape[0], 1, flat.shape[2], device=x.device).argsort(-1)[..., : max(1, flat.shape[2] // 2)]
    return flat.gather(2, chosen.expand(-1, flat.shape[1], -1)).mean(2)[..., None, None] * 0.5**0.5


def without_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.no_grad():
            return function(x)

    return step


def with_grad(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        function(x).backward(grad)

    return step


def correctness(bench: Bench) -> None:
    """The kernels keep the very cells of the definition, which runs on the CPU."""
    from pl_normkit.methods.stochastic_pooling import launch, reference
    from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec, windows_of

    specs = {"global": PoolSpec(1, (1, 1)), "2x2": PoolSpec(0, (2, 2), (2, 2)), "3x3 stride 2": PoolSpec(0, (3, 3), (2, 2), (1, 1))}
    specs["bins 3"] = PoolSpec(1, (3, 3))
    maps = [(2, 5, 7, 7)] if bench.rehearsal else [(4, 130, 7, 7), (3, 96, 14, 14), (2, 64, 57, 56)]
    for shape in maps:
        for name, spec in specs.items():
            for dtype in (torch.float32,) if bench.rehearsal else (torch.float32, torch.bfloat16, torch.float16):
                for layout, memory_format in FORMATS.items():
                    windows, seed = windows_of(spec, (shape[2], shape[3]), 0.5), torch.tensor(2**62 + 12345)
                    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
                    wanted = reference.pool(x, windows, seed, 1)
                    grad = torch.rand_like(wanted) + 0.5
                    last = not x.is_contiguous()
                    wanted_grad = reference.pool_backward(grad, windows, seed, 1, last)
                    got = launch.pool(x.to(bench.device), windows, seed.to(bench.device), 1).cpu()
                    got_grad = launch.pool_backward(grad.to(bench.device), windows, seed.to(bench.device), 1, last).cpu()
                    close = 2e-6 if dtype == torch.float32 else 2**-7
                    same = torch.allclose(got, wanted, rtol=close, atol=close) and torch.equal(got_grad != 0, wanted_grad != 0)
                    same &= torch.allclose(got_grad, wanted_grad, rtol=close, atol=close)
                    bench.check(f"{'x'.join(map(str, shape))} {layout} {dtype} {name}", same)


def device_tests(bench: Bench) -> None:
    """The suite's tests that need a GPU."""
    if bench.rehearsal:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/methods/stochastic_pooling"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
    print(done.stdout[-2000:], done.stderr[-500:])
    bench.check("pytest -m gpu", done.returncode == 0)


def graphs(bench: Bench) -> None:
    """A replayed CUDA graph draws anew."""
    pool, _ = pool_of("global")
    x = torch.randn(TINY[0] if bench.rehearsal else (8, 64, 28, 28), device=bench.device)
    replay, result = bench.captured(lambda: pool(x))
    seen = []
    for _ in range(3):
        replay()
        bench.synchronize()
        seen.append(result.clone())
    bench.check("every replay draws other cells", not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]))


def pooling(bench: Bench) -> None:
    """Forward, and forward with backward, over torch's pooling; share of what a large copy moves."""
    source = torch.randn(2**16 if bench.rehearsal else 2**29, device=bench.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() * 4 / min(bench.seconds(partial(target.copy_, source)) for _ in range(5))
    bench.add("copy of 2 GiB", "rate", rate / 1e12, "TB/s")
    del source, target  # before the maps come
    for dtype in (torch.bfloat16, torch.float32):
        for shape in TINY if bench.rehearsal else SHAPES:
            for layout, memory_format in FORMATS.items():
                for scope in SCOPES:
                    case = f"{'x'.join(map(str, shape))} {layout} {str(dtype).removeprefix('torch.')} {scope}"
                    x = torch.randn(shape, device=bench.device, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
                    one_pool(bench, case, x, scope, rate)


def one_pool(bench: Bench, case: str, x: Tensor, scope: str, rate: float) -> None:
    ours, plain = pool_of(scope)
    out = plain(x)
    grad = torch.randn_like(out)
    forward = bench.paired([without_grad(function, x) for function in (ours, plain)])
    both = bench.paired([with_grad(function, x, grad) for function in (ours, plain)])
    rows = not x.is_contiguous() and scope != "3x3 stride 2"
    moved = (x.numel() * (0.5 if rows else 1.0) + out.numel()) * x.element_size()
    bench.add(case, "forward", statistics.median(forward[0]) * 1e6, "us")
    bench.add(case, "forward over torch", ratio(*forward))
    bench.add(case, "forward and backward over torch", ratio(*both))
    bench.add(case, "forward share of copy rate", moved / statistics.median(forward[0]) / rate)


def compiled_form(bench: Bench) -> None:
    """Against torch.compile of the naive form, for global pools."""
    compiled = torch.compile(naive, backend="eager" if bench.rehearsal else "inductor", dynamic=False)
    ours, _ = pool_of("global")
    for shape in TINY[:1] if bench.rehearsal else SHAPES:
        for layout, memory_format in FORMATS.items():
            torch.compiler.reset()
            x = torch.randn(shape, device=bench.device, dtype=torch.bfloat16).contiguous(memory_format=memory_format).requires_grad_()
            grad = torch.randn_like(naive(x))
            forward = bench.paired([without_grad(function, x) for function in (ours, compiled, naive)])
            both = bench.paired([with_grad(function, x, grad) for function in (ours, compiled, naive)])
            case = f"{'x'.join(map(str, shape))} {layout} bfloat16 global"
            bench.add(case, "forward over the compiled naive form", ratio(forward[0], forward[1]))
            bench.add(case, "forward and backward over the compiled naive form", ratio(both[0], both[1]))
            bench.add(case, "forward and backward over the naive form", ratio(both[0], both[2]))


def memory(bench: Bench) -> None:
    """Peak memory of a forward and backward pass beyond its input and output."""
    shape = TINY[0] if bench.rehearsal else (256, 256, 56, 56)
    for layout, memory_format in FORMATS.items():
        x = torch.randn(shape, device=bench.device).contiguous(memory_format=memory_format).requires_grad_()
        for name, function in zip(("ours", "torch"), pool_of("2x2"), strict=True):
            grad = torch.randn_like(function(x))
            step = with_grad(function, x, grad)
            step()
            x.grad = None
            before = 0 if bench.rehearsal else torch.cuda.memory_allocated()
            if not bench.rehearsal:
                torch.cuda.reset_peak_memory_stats()
            step()
            peak = 0 if bench.rehearsal else torch.cuda.max_memory_allocated()
            bench.add(f"{'x'.join(map(str, shape))} {layout} float32 2x2, {name}", "peak beyond the input", (peak - before) / 2**20, "MiB")


def nan_guard(bench: Bench) -> None:
    """Weights stay finite and only the bad step is skipped: decided on the device, and under a float16 gradient scaler."""
    for case, precision, fused in (("fused AdamW, decided on the device", "32-true", True), ("float16 gradient scaler", "16-mixed", False)):
        guard, model = guarded_run(bench, precision, fused)
        bench.add(case, "skipped steps", len(guard.events))
        bench.check(f"{case}: weights are finite", all(bool(p.isfinite().all()) for p in model.parameters()))
        bench.check(f"{case}: one step was skipped, the third", [event["batch_index"] for event in guard.events] == [2])


def guarded_run(bench: Bench, precision: str, fused: bool) -> tuple[Any, nn.Module]:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision

    from pl_normkit.callbacks.nan_guard import NaNGuard

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layers(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=fused)

    batches = [torch.randn(8, 16) for _ in range(6)]
    batches[2][1, 3] = torch.nan
    how: dict[str, Any] = {"precision": precision}
    if bench.rehearsal and precision == "16-mixed":  # Lightning gives the CPU no scaler, torch has one
        how = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    with tempfile.TemporaryDirectory() as folder:
        guard, model = NaNGuard(folder=folder, device_side=fused or None), Net()
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu" if bench.rehearsal else "gpu", devices=1, callbacks=[guard], logger=False, **how,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    return guard, model


def gaussian_bias(bench: Bench) -> None:
    """One attention layer of ViT-B/16 with the bias, forward and backward, under each kernel of torch's attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from pl_normkit.nn import GaussianAttentionBias

    batch, grid, heads = (1, 3, 2) if bench.rehearsal else (64, 14, 12)
    dtype = torch.float32 if bench.rehearsal else torch.bfloat16
    tokens = grid * grid + 1
    q, k, v = (torch.randn(batch, heads, tokens, 64, device=bench.device, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = GaussianAttentionBias((grid, grid), num_prefix_tokens=1, device=bench.device)

    def attention(backend: SDPBackend | None, biased: bool) -> Callable[[], None]:
        def step() -> None:
            mask = bias().to(dtype) if biased else None
            if backend is None:
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
                return
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

        return step

    backends = [SDPBackend.MATH] if bench.rehearsal else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    for backend in [None, *backends]:
        case = f"attention layer, batch {batch}, {tokens} tokens, {backend.name if backend else 'torch chooses'}"
        try:
            times = bench.paired([attention(None, False), attention(backend, True)])
        except RuntimeError as error:
            bench.add(case, "cannot", str(error).splitlines()[0][:100])
            continue
        bench.add(case, "with the bias", statistics.median(times[1]) * 1e6, "us")
        bench.add(case, "with the bias over the default kernel without", ratio(times[1], times[0]))


SECTIONS: list[tuple[Callable[[Bench], None], float]] = [
    (correctness, 0.15),
    (graphs, 0.03),
    (nan_guard, 0.05),
    (pooling, 0.45),
    (memory, 0.03),
    (gaussian_bias, 0.06),
    (compiled_form, 0.15),
    (device_tests, 0.08),
]
"""Sections and the shares of the time that they may take; what one leaves over goes to the next."""


def run(bench: Bench, minutes: float) -> int:
    """Runs every section; gives how many failed or were not finished."""
    failed, allowed = 0, time.monotonic()
    for section, share in SECTIONS:
        allowed += share * minutes * 60
        bench.section, bench.section_end = section.__name__, min(allowed, bench.end)
        try:
            section(bench)
        except NotReachedError:
            failed += 1
            bench.section_end = float("inf")
            bench.add("", "not reached", "the section's time was used up")
        except Exception as error:  # the other sections still give their figures
            traceback.print_exc()
            failed += 1
            bench.section_end = float("inf")
            bench.add("", "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
        bench.write()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes; needs --out")
    parser.add_argument("--out", type=Path, help=f"CSV file, default {RESULTS}")
    parser.add_argument("--minutes", type=float, help=f"default {MINUTES}, of a rehearsal no limit")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    if options.rehearse:
        if options.out is None:
            parser.error("a rehearsal's figures mean nothing: name a file of its own with --out")
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    if reasons := list(missing(device)):
        sys.exit("cannot run: " + "; ".join(reasons))
    start = time.monotonic()
    minutes = (60 if options.rehearse else MINUTES) if options.minutes is None else options.minutes
    bench = Bench(device, options.out or RESULTS, start + minutes * 60, 1 if options.rehearse else 9)
    failed = run(bench, minutes)
    print(f"{len(bench.rows)} figures in {time.monotonic() - start:.0f} s, {failed} sections failed or were cut short: {bench.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
