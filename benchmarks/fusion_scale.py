"""Cost of scale equalizers: calibration over the forward passes it uses, a training step with them over one without, operations.

    python benchmarks/fusion_scale.py

Ratios of interleaved runs in one process. Writes benchmarks/results/fusion_scale.csv.
"""

from __future__ import annotations

import copy
import csv
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from pl_normkit.graph import ModelGraph
from pl_normkit.methods.fusion_scale import calibrate_scales, equalize_scales, fold, insert_equalizers
from pl_normkit.methods.fusion_scale.calibrate import equalizers_of

MODELS = {"Unet": {}, "UPerNet": {}, "Segformer": {}, "DeepLabV3Plus": {}}
SIZE, SAMPLES, BATCHES, TURNS = 128, 4, 8, 3


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(smp, name)("resnet18", encoder_weights=None, classes=8, **MODELS[name])  # type: ignore[no-any-return]


def timed(act: Callable[[], object]) -> float:
    start = time.process_time()  # of this process: the machine is shared
    act()
    return time.process_time() - start


def paired(first: Callable[[], object], second: Callable[[], object], turns: int = TURNS) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median of the paired ratios second / first."""
    first(), second()
    gc.collect()
    pairs = [(timed(first), timed(second)) if turn % 2 else (timed(second), timed(first))[::-1] for turn in range(turns)]
    return (
        1e3 * statistics.median(a for a, _ in pairs),
        1e3 * statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def calibration(name: str, loader: list[Tensor]) -> tuple[float, float, float]:
    """Against the same passes alone, one for each level: training mode, no gradients, the same identity equalizers in place."""
    model = build(name)
    insert_equalizers(model, loader[0])
    plain = copy.deepcopy(model)
    levels = len({equalizer.level for equalizer in equalizers_of(model).values()})

    def forward_passes() -> None:
        with torch.no_grad():
            for _ in range(levels):
                for x in loader:
                    plain(x)

    def calibrate() -> None:
        calibrate_scales(model, loader).undo()

    return paired(forward_passes, calibrate)


def stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def training_step(name: str, loader: list[Tensor]) -> tuple[float, float, float]:
    plain, equalized = build(name), build(name)
    equalize_scales(equalized, loader)
    return paired(stepper(plain, loader[0]), stepper(equalized, loader[0]), 4 * TURNS + 1)


def equalizers_alone(name: str, loader: list[Tensor]) -> tuple[float, float, float]:
    """Their own forward and backward on the features of a step, over the step: steadier than the difference of two steps."""
    model = build(name)
    equalize_scales(model, loader)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda grad: seen.append((module, inputs[0].detach().requires_grad_(), grad.detach())))

    handles = [module.register_forward_hook(keep) for module in equalizers_of(model).values()]
    model(loader[0]).square().mean().backward()
    for handle in handles:
        handle.remove()

    def alone() -> None:
        for module, features, grad in seen:
            torch.autograd.grad(module(features), features, grad)

    return paired(stepper(build(name), loader[0]), alone, 4 * TURNS + 1)


def operations(name: str, loader: list[Tensor]) -> tuple[int, int, int]:
    """Of the exported graph: as it was, with equalizers, folded (giving up zero-padded borders)."""
    model = build(name)
    counts = [len(ModelGraph.from_model(model, loader[0]).nodes)]
    equalize_scales(model, loader)
    counts.append(len(ModelGraph.from_model(model, loader[0]).nodes))
    fold(model, border="ignore")
    return counts[0], counts[1], len(ModelGraph.from_model(model, loader[0]).nodes)


def main() -> None:
    torch.set_num_threads(1)
    loader = list(torch.randn(BATCHES, SAMPLES, 3, SIZE, SIZE))
    where = (f"{platform.machine()} CPU, 1 thread", torch.__version__)
    path = Path(__file__).parent / "results" / "fusion_scale.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "model", "plain", "ours", "ratio", "machine", "torch"])
        for name in MODELS:
            for what, measure in (
                ("calibration over its forward passes, ms", calibration),
                ("training step, explicit over plain, ms", training_step),
                ("equalizers' own part of a training step, ms", equalizers_alone),
            ):
                a, b, ratio = measure(name, loader)
                writer.writerow([what, name, f"{a:.1f}", f"{b:.1f}", f"{ratio:.4f}", *where])
            before, explicit, folded = operations(name, loader)
            writer.writerow(["operations in the exported graph, explicit", name, before, explicit, f"{explicit / before:.4f}", *where])
            writer.writerow(["operations in the exported graph, folded", name, before, folded, f"{folded / before:.4f}", *where])
            file.flush()
    print(path.read_text())


if __name__ == "__main__":
    main()
