"""Time of code that takes one image at a time over `effective_receptive_field`: prints a table, writes benchmarks/results/.

    python benchmarks/receptive_field.py

Two peers: `grad`, one image at a time with autograd.grad on the input (what OpenERF does), and `backward`, the same with
value.backward(), which many scripts use and which computes every parameter's gradient too. All sides get the same tensors, run in turn in
every round, and agree on the map; a ratio is a median of paired ratios of processor time (of wall time on a GPU).

What bounds the ratio on one core: a gradient of the input takes a forward pass and as many operations again backward, so no exact code is
faster than two forward passes without gradients, in batches. `at best` is the time of `grad` over that. Tried and not used: `vmap`, one
image at a time under torch.func.vmap(grad), and `bf16`, ours under torch.autocast; both as time of `grad` over theirs.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

from pl_normkit.receptive_field import effective_receptive_field
from pl_normkit.receptive_field.units import Unit, find_unit, run_to

RESULTS = Path(__file__).parent / "results"
Value = Callable[[nn.Module, Tensor], Tensor]
Case = tuple[str, Callable[[], nn.Module], int, str | None, Value]


def centre(output: Tensor) -> Tensor:
    return output[0, :, output.shape[2] // 2, output.shape[3] // 2].mean()


def layer2(model: nn.Module, x: Tensor) -> Tensor:
    """What a script with a forward hook does: the whole model runs."""
    kept: list[Tensor] = []
    handle = model.get_submodule("layer2").register_forward_hook(lambda _module, _arguments, output: kept.append(output))
    model(x)
    handle.remove()
    return centre(kept[0])


CASES: list[Case] = [
    ("resnet18, last map", lambda: timm.create_model("resnet18"), 224, None, lambda m, x: centre(m.forward_features(x))),
    ("resnet18, layer2", lambda: timm.create_model("resnet18"), 224, "layer2", layer2),
    (
        "mobilenetv3_small, last map",
        lambda: timm.create_model("mobilenetv3_small_100"),
        96,
        None,
        lambda m, x: centre(m.forward_features(x)),
    ),
    ("vit_tiny, last norm", lambda: timm.create_model("vit_tiny_patch16_224"), 224, None, lambda m, x: m.forward_features(x)[0, 91].mean()),
    (
        "vit_tiny at 96 px",
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=96),
        96,
        None,
        lambda m, x: m.forward_features(x)[0, 15].mean(),
    ),
    ("Unet resnet18, logits", lambda: smp.Unet("resnet18", encoder_weights=None), 128, None, lambda m, x: centre(m(x))),
]


def one_at_a_time(model: nn.Module, images: Tensor, value: Value, *, backward: bool) -> Tensor:
    total = torch.zeros(images.shape[2:], device=images.device)
    for image in images:
        x = image[None].clone().requires_grad_()
        if backward:
            model.zero_grad()
            value(model, x).backward()
            assert x.grad is not None
            grad = x.grad
        else:
            (grad,) = torch.autograd.grad(value(model, x), x)
        total += grad[0].mean(0).clamp(min=0)
    return total / total.sum()


def two_forward_passes(model: nn.Module, unit: Unit, images: Tensor, batch_size: int) -> None:
    with torch.no_grad():
        for batch in images.contiguous(memory_format=torch.channels_last).split(batch_size) * 2:
            run_to(model, unit.layer, batch, unit.calls)


def mapped(model: nn.Module, images: Tensor, value: Value) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda image: value(model, image[None])))(images)


def in_bfloat16(model: nn.Module, images: Tensor, layer: str | None, batch_size: int) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        return effective_receptive_field(model, images, layer, batch_size=batch_size).map


def seconds(step: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(case: Case, count: int, rounds: int, device: str, batch_size: int) -> dict[str, object]:
    name, build, size, layer, value = case
    torch.manual_seed(0)
    model = build().eval().to(device)
    images = torch.randn(count, 3, size, size).to(device)
    unit = find_unit(model, images[:1].clone().requires_grad_(), layer, None)
    steps: list[Callable[[], Tensor]] = [
        lambda: effective_receptive_field(model, images, layer, batch_size=batch_size).map,
        lambda: one_at_a_time(model, images, value, backward=False),
        lambda: one_at_a_time(model, images, value, backward=True),
    ]
    maps = [step().double().cpu() for step in steps]
    difference = float((maps[0] - maps[1]).abs().max() / maps[1].max())
    timed: list[Callable[[], object]] = [*steps, partial(two_forward_passes, model, unit, images, batch_size)]
    timed += [partial(mapped, model, images, value), partial(in_bfloat16, model, images, layer, batch_size)]
    rough = (in_bfloat16(model, images, layer, batch_size) - maps[0]).abs().max() / maps[0].max()
    times = [[seconds(step, device) for step in timed] for _ in range(rounds)]
    model.zero_grad()
    return {
        "case": name,
        "pixels": size,
        "images": count,
        "ms per image": statistics.median(row[0] for row in times) / count * 1e3,
        "grad over ours": statistics.median(row[1] / row[0] for row in times),
        "backward over ours": statistics.median(row[2] / row[0] for row in times),
        "grad over ours at best": statistics.median(row[1] / row[3] for row in times),
        "grad over vmap": statistics.median(row[1] / row[4] for row in times),
        "grad over bf16": statistics.median(row[1] / row[5] for row in times),
        "difference of the bf16 map, over the peak": float(rough),
        "largest difference of maps, over the peak": difference,
        "batch": batch_size,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [measure(case, options.images, options.rounds, options.device, options.batch_size) for case in CASES]
    RESULTS.mkdir(exist_ok=True)
    name = "receptive_field.csv" if options.device == "cpu" else "receptive_field_gpu.csv"
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    main()
