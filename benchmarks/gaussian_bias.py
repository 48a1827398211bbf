"""What the Gaussian attention bias costs: building it, and a training step of ViT-B/16 at 224 pixels with it and without.

    python benchmarks/gaussian_bias.py          # CPU: benchmarks/results/gaussian_bias_cpu.csv
    python benchmarks/gaussian_bias.py --gpu    # CUDA, bfloat16: benchmarks/results/gaussian_bias_gpu.csv

Ratios are medians of pairs of interleaved steps in one process.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pl_normkit.methods.gaussian_bias import add_gaussian_bias
from pl_normkit.nn import GaussianAttentionBias

RESULTS = Path(__file__).parent / "results"
KINDS = {"one pair per layer": False, "one pair per head": True}


def vit(per_head: bool | None = None, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224").to(device)
    if per_head is not None:
        add_gaussian_bias(model, per_head=per_head)
    return model


def stepper(model: nn.Module, batch: int, device: str) -> Callable[[], None]:
    """A whole training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def build_all(model: nn.Module) -> Callable[[], None]:
    """Forward and backward of every bias alone."""
    biases = [module for module in model.modules() if isinstance(module, GaussianAttentionBias)]
    gradients = [torch.randn_like(bias()) for bias in biases]

    def build() -> None:
        for bias, gradient in zip(biases, gradients, strict=True):
            bias().backward(gradient)

    return build


def processor_time(act: Callable[[], None]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def device_time(act: Callable[[], None]) -> float:
    """Wall time of one call, the queue drained before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(acts: Sequence[Callable[[], None]], measure: Callable[[Callable[[], None]], float], rounds: int) -> list[float]:
    """Median seconds of each, and median ratio of each to the first, measured turn by turn."""
    for act in acts:
        act()
    turns = [[measure(act) for act in acts] for _ in range(rounds)]
    medians = [statistics.median(turn[i] for turn in turns) for i in range(len(acts))]
    ratios = [statistics.median(turn[i] / turn[0] for turn in turns) for i in range(len(acts))]
    return [*medians, *ratios]


def on_cpu(rounds: int, batch: int) -> list[list[str]]:
    torch.set_num_threads(1)
    rows = []
    for kind, per_head in KINDS.items():
        biased = vit(per_head)
        acts = [stepper(vit(), batch, "cpu"), stepper(biased, batch, "cpu"), build_all(biased)]
        plain, step, built, _, ratio, share = compare(acts, processor_time, rounds)
        rows.append(
            [f"ViT-B/16, batch {batch}, float32, {kind}", *(f"{1e3 * t:.1f}" for t in (plain, step, built)), f"{ratio:.3f}", f"{share:.4f}"]
        )
    return rows


def on_gpu(rounds: int, batch: int) -> list[list[str]]:
    """Each kernel of `F.scaled_dot_product_attention` with and without the bias; the flash kernel takes no mask."""
    rows = []
    baseline = stepper(vit(device="cuda"), batch, "cuda")
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        for kind, per_head in KINDS.items():
            biased = vit(per_head, "cuda")
            step, build = stepper(biased, batch, "cuda"), build_all(biased)
            acts = [baseline, within(backend, baseline), within(backend, step), build]
            what = f"ViT-B/16, batch {batch}, bfloat16, {kind}, {backend.name} against the default kernel"
            rows.append(gpu_row(what, acts, rounds))
            del biased, step, build, acts
    return [*rows, *flex_rows(rounds, batch)]


def gpu_row(what: str, acts: Sequence[Callable[[], None]], rounds: int) -> list[str]:
    """A kernel that cannot do it says so in the row."""
    try:
        plain, _, step, built, _, _, ratio, share = compare(acts, device_time, rounds)
    except RuntimeError as error:
        return [what, "", "", "", f"cannot: {str(error).splitlines()[0][:80]}", ""]
    return [what, *(f"{1e3 * t:.2f}" for t in (plain, step, built)), f"{ratio:.3f}", f"{share:.4f}"]


def within(backend: SDPBackend, act: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with sdpa_kernel(backend):
            act()

    return run


def flex_rows(rounds: int, batch: int) -> list[list[str]]:
    """One attention layer, forward and backward: FlexAttention with the Gaussian in its score function against masked SDPA."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (torch.randn(batch, 12, 197, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bias = GaussianAttentionBias((14, 14), num_prefix_tokens=1, device="cuda")
    compiled: Any = torch.compile(flex_attention)

    def gaussian(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        rows, columns = (i - 1) // 14 - (j - 1) // 14, (i - 1) % 14 - (j - 1) % 14
        value = bias.amplitude[0] ** 2 * torch.exp(-0.5 * (rows * rows + columns * columns) / (bias.sigma[0] ** 2 + 1e-6))
        return score + torch.where((i > 0) & (j > 0), value, 0.0)

    def plain() -> None:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    def masked() -> None:
        nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias().to(q.dtype)).sum().backward()

    def flexible() -> None:
        compiled(q, k, v, score_mod=gaussian).sum().backward()

    shape = f"attention layer alone, batch {batch}, bfloat16"
    rows = [gpu_row(f"{shape}, SDPA with the bias against SDPA", [plain, plain, masked, plain], rounds)]
    return [*rows, gpu_row(f"{shape}, FlexAttention with the bias against SDPA", [plain, plain, flexible, plain], rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure on the CUDA device")
    parser.add_argument("--rounds", type=int, default=0, help="pairs of steps (default 5 on the CPU, 30 on a GPU)")
    parser.add_argument("--batch", type=int, default=0, help="images per step (default 1 on the CPU, 64 on a GPU)")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device")
    measure = on_gpu if options.gpu else on_cpu
    rows = measure(options.rounds or (30 if options.gpu else 5), options.batch or (64 if options.gpu else 1))
    machine = torch.cuda.get_device_name() if options.gpu else f"{platform.machine()} CPU, 1 thread"
    path = RESULTS / f"gaussian_bias_{'gpu' if options.gpu else 'cpu'}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["what", "plain_ms", "with_bias_ms", "building_biases_ms", "step_ratio", "building_share_of_plain_step", "machine", "torch"]
        )
        writer.writerows([*row, machine, torch.__version__] for row in rows)
    print(path.read_text())


if __name__ == "__main__":
    main()
